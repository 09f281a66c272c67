"""Figures of the chapter on the reward model: they show the numbers they are given."""

from __future__ import annotations

import pytest

from rlreason.evaluation.classifier import calibration_curve
from rlreason.publishing import figures

PIECES = [" 4", "+", "1", "\n", "####", " 5", ""]
SCORES = [0.5, 0.6, 0.4, 0.7, 0.8, 0.9, 0.95]
CURVE = calibration_curve([0.1, 0.15, 0.8, 0.9, 0.85], [0, 1, 1, 1, 0], bins=5)
DRAWN = {
    "draw_scores": lambda: figures.draw_scores(
        {"right": (PIECES, SCORES), "wrong": (PIECES[:3], SCORES[:3])}
    ),
    "plot_calibration": lambda: figures.plot_calibration(
        {"balanced": CURVE, "as sampled": CURVE[:1]}
    ),
}


def test_the_score_of_each_token_stands_over_its_token():
    upper, lower = DRAWN["draw_scores"]().axes
    assert upper.lines[0].get_ydata().tolist() == SCORES
    assert [t.get_text() for t in upper.get_xticklabels()][3] == "↵"
    assert len(lower.lines[0].get_ydata()) == 3


def test_a_range_stands_at_its_mean_score_and_not_in_its_middle():
    (axes,) = DRAWN["plot_calibration"]().axes
    points = axes.containers[0].lines[0]
    assert points.get_xdata() == pytest.approx([0.125, 0.85])
    assert points.get_ydata() == pytest.approx([0.5, 2 / 3])

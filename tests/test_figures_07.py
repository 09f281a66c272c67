"""Figures of the chapter on PPO: they show the numbers they are given."""

from __future__ import annotations

import pytest

from rlreason.publishing import figures

LAMBDAS = [0.0, 0.5, 1.0]
FALLING, RISING = {"exact": [0.0, 0.0, 0.0], "zero": [0.9, 0.5, 0.0]}, [0.3, 0.5, 1.0]
RATIOS = [0.5, 0.8, 1.0, 1.2, 1.5]
SURROGATE = {1.0: [0.5, 0.8, 1.0, 1.2, 1.2], -1.0: [-0.8, -0.8, -1.0, -1.2, -1.5]}
PHASES = [
    {"phase": 1, "reward": 0.4, "kl": 0.0},
    {"phase": 2, "reward": 0.5, "kl": 0.2, "validation_maj_1": 0.5},
    {"phase": 3, "reward": 0.6, "kl": 5.0},
]
TITLES = {"reward": "reward", "kl": "KL", "validation_maj_1": "validation"}
DRAWN = {
    "plot_bias_variance": lambda: figures.plot_bias_variance(
        LAMBDAS, FALLING, dict.fromkeys(FALLING, RISING)
    ),
    "draw_clip": lambda: figures.draw_clip(RATIOS, SURROGATE, 0.2),
    "plot_phases": lambda: figures.plot_phases(PHASES, TITLES, {"kl": (0, 1)}),
}


def test_each_value_function_has_a_line_in_both_panels():
    left, right = DRAWN["plot_bias_variance"]().axes
    assert [list(line.get_ydata()) for line in left.lines] == list(FALLING.values())
    assert [list(line.get_ydata()) for line in right.lines] == [RISING, RISING]
    # Told apart by more than colour
    assert len({line.get_marker() for line in left.lines}) == 2


@pytest.mark.parametrize(("panel", "flat"), [(0, (1.2, 1.5)), (1, (0.5, 0.8))])
def test_the_hatched_part_is_where_the_surrogate_is_flat(panel, flat):
    axes = DRAWN["draw_clip"]().axes[panel]
    (box,) = axes.patches
    assert (box.get_x(), box.get_x() + box.get_width()) == pytest.approx(flat)
    _, clipped, _ = axes.lines
    inside = [
        y
        for x, y in zip(clipped.get_xdata(), clipped.get_ydata(), strict=True)
        if flat[0] <= x <= flat[1]
    ]
    assert len(set(inside)) == 1


def test_a_metric_is_drawn_at_the_phases_that_have_it():
    reward, kl, validation = DRAWN["plot_phases"]().axes
    assert list(reward.lines[0].get_xdata()) == [1, 2, 3]
    assert list(validation.lines[0].get_xdata()) == [2]
    assert len(kl.patches) == 1  # the healthy range
    assert not reward.patches


def test_a_band_does_not_squeeze_the_line_that_leaves_it():
    kl = DRAWN["plot_phases"]().axes[1]
    low, high = kl.get_ylim()
    assert low < 0
    assert high > 5
    # Nor does a band that is far wider than the line
    wide = figures.plot_phases(PHASES, TITLES, {"reward": (-100, 100)}).axes[0]
    low, high = wide.get_ylim()
    assert 0 < low < high < 1

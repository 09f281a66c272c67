"""Figures of what RL finds that SFT does not: they show what they are given."""

from __future__ import annotations

from rlreason.evaluation.intervals import Interval
from rlreason.publishing import figures


def line(*means):
    return {
        4**i: Interval(mean, mean - 0.05, mean + 0.05, 50, "bootstrap")
        for i, mean in enumerate(means)
    }


CURVES = {"SFT": line(0.3, 0.6, 0.9), "PPO": line(0.5, 0.7, 0.8)}
AHEAD = {"PPO": line(0.2, 0.1, -0.1)}
PPO, EI = (line(0.1)[1], line(-0.2)[1]), (line(0.3)[1], line(0.4)[1])
STEPS = {"pass@16": {"PPO": PPO, "EI": EI}, "pass@96": {"EI": EI}}
DRAWN = {
    "plot_coverage": lambda: figures.plot_coverage(
        {"PPO by SFT": line(0.5, 0.7, 0.9), "SFT by PPO": line(0.4, 0.5, 0.6)},
        {"SFT by itself": line(0.5, 0.7, 0.8)},
    ),
    "plot_pass_curves": lambda: figures.plot_pass_curves(CURVES, AHEAD, against="SFT"),
    "plot_steps": lambda: figures.plot_steps(STEPS, x="maj@1"),
}


def test_each_share_is_above_its_k_and_chance_is_a_band():
    (axes,) = DRAWN["plot_coverage"]().axes
    band, *_ = axes.lines
    assert list(band.get_xdata()) == [1, 4, 16]
    assert list(band.get_ydata()) == [0.5, 0.7, 0.8]
    (means,) = [c[0] for c in axes.containers if c.get_label() == "SFT by PPO"]
    assert list(means.get_ydata()) == [0.4, 0.5, 0.6]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "16"]


def test_what_is_behind_is_below_the_line_of_the_one_compared_with():
    figure = DRAWN["plot_pass_curves"]()
    top, bottom = figure.axes
    assert [line.get_label() for line in top.lines] == ["SFT", "PPO"]
    ahead, zero = bottom.lines
    assert list(ahead.get_ydata()) == [0.2, 0.1, -0.1]
    assert set(zero.get_ydata()) == {0}
    # The one line looks the same in both panels, and each name is explained once
    assert ahead.get_color() == top.lines[1].get_color()
    assert ahead.get_linestyle() == top.lines[1].get_linestyle() != "-"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["SFT", "PPO"]


def test_distinct_solutions_are_counted_and_no_share():
    figure = figures.plot_pass_curves(CURVES, AHEAD, against="SFT", solutions=True)
    top, bottom = figure.axes
    assert (top.get_yscale(), bottom.get_yscale()) == ("log", "linear")
    assert bottom.get_ylabel() == "more than\nSFT"
    figure.draw_without_rendering()
    assert not any("%" in text.get_text() for text in top.get_yticklabels())


def test_a_step_stands_at_both_of_its_differences():
    left, right = DRAWN["plot_steps"]().axes
    points = {c.get_label(): c[0].get_xydata().tolist() for c in left.containers}
    assert points == {"PPO": [[0.1, -0.2]], "EI": [[0.3, 0.4]]}
    (only,) = right.containers
    assert only[0].get_color() == left.containers[1][0].get_color()

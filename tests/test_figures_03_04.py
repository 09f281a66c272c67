"""Figures of the chapters on SFT and sampling: they show the numbers they are given."""

from __future__ import annotations

import pytest

from rlreason.evaluation.intervals import Interval, wilson_interval
from rlreason.publishing import figures
from rlreason.publishing.figures.style import place_tokens

PIECES = ["A", ":", " 5", "+", "1", "\n", "####", " 6", ""]
SHADES = [None, None, 0.5, 1.0, 0.2, 0.0, 0.1, 0.3, 3.0]
INTERVALS = {k: wilson_interval(k, 20) for k in (1, 2, 8)}
DRAWN = {
    "draw_tokens": lambda: figures.draw_tokens(
        PIECES, {"before": SHADES, "after": SHADES}, label="nats", largest=2
    ),
    "draw_batches": lambda: figures.draw_batches(
        {"whole": [[(3, 4), (2, 1)]], "cut": [[(3, 4)], [(2, 1)]]}, 7
    ),
    "plot_training": lambda: figures.plot_training(
        {"seed 0": [0.3, 0.2], "seed 1": [0.4, 0.1]}, [1e-3, 5e-4]
    ),
    "plot_bars": lambda: figures.plot_bars(
        {"base": {"words": 1.0, "plan": 2.0}, "SFT": {"words": 0.5, "plan": 1.5}},
        y="nats",
    ),
    "plot_intervals": lambda: figures.plot_intervals(
        {"pass@k": INTERVALS, "maj@k": INTERVALS}, x="k", y="share", logarithmic=True
    ),
    "draw_inverse_cdf": lambda: figures.draw_inverse_cdf(
        ["a", "b", "c"], [0.2, 0.5, 0.3], [0.1, 0.95]
    ),
    "draw_rows": lambda: figures.draw_rows([9, 5, 2], 4),
    "draw_coverage": lambda: figures.draw_coverage(
        [wilson_interval(c, 20) for c in (2, 10, 19)], 0.5, "maj@1"
    ),
}


def test_only_tokens_with_a_value_have_a_box():
    before, after, _ = DRAWN["draw_tokens"]().axes
    assert len(before.patches) == len(after.patches) == 7
    assert [t.get_text() for t in before.texts][-1] == "EOS"


def test_a_larger_value_has_a_darker_box():
    boxes = DRAWN["draw_tokens"]().axes[0].patches
    light, dark = boxes[3], boxes[6]  # 0.0 and 3.0, which is clipped at 2
    assert sum(dark.get_facecolor()) < sum(light.get_facecolor())


def test_a_line_of_tokens_breaks_at_a_line_break_and_at_the_margin():
    shown = figures.token_labels(PIECES)
    places, lines = place_tokens(PIECES, shown, 80)
    assert [y for _, y in places] == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert lines == 2
    assert place_tokens(PIECES, shown, 6)[1] > 2


def test_padding_fills_up_to_the_longest_row_of_its_micro_batch():
    whole, cut = DRAWN["draw_batches"]().axes
    assert [p.get_width() for p in whole.patches] == [3, 4, 0, 2, 1, 4]
    assert [p.get_width() for p in cut.patches] == [3, 4, 0, 2, 1, 0]


def test_bars_are_as_high_as_their_values():
    heights = [p.get_height() for p in DRAWN["plot_bars"]().axes[0].patches]
    assert heights == [1.0, 2.0, 0.5, 1.5]


def test_points_stand_at_the_means_and_bars_reach_the_ends():
    axes = DRAWN["plot_intervals"]().axes[0]
    line, _, (bars,) = axes.containers[0].lines
    assert list(line.get_ydata()) == [i.mean for i in INTERVALS.values()]
    for (low, high), interval in zip(
        bars.get_segments(), INTERVALS.values(), strict=True
    ):
        assert (low[1], high[1]) == pytest.approx((interval.low, interval.high))


def test_a_uniform_number_points_at_the_token_whose_step_holds_it():
    lines = [line.get_xdata() for line in DRAWN["draw_inverse_cdf"]().axes[0].lines]
    assert [line[1] for line in lines if len(line) == 2] == [0.5, 2.5]


def test_the_plain_batch_computes_each_prompt_and_waits_for_the_longest():
    plain, ours = DRAWN["draw_rows"]().axes
    work = [sum(abs(p.get_width()) for p in ax.patches) for ax in (plain, ours)]
    assert work == [3 * (4 + 9), 4 + 9 + 5 + 2]


def test_an_interval_that_misses_is_marked_by_more_than_its_colour():
    def markers(intervals: list[Interval]) -> list[str]:
        axes = figures.draw_coverage(intervals, 0.5, "maj@1").axes[0]
        return [line.get_marker() for line in axes.lines if line.get_marker() in "xo"]

    assert markers([wilson_interval(10, 20), wilson_interval(1, 20)]) == ["o", "x"]

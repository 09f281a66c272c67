"""Figures of the chapter on return-conditioned RL: they show what they are given."""

from __future__ import annotations

from rlreason.evaluation.intervals import Interval, wilson_interval
from rlreason.publishing import figures

PROMPT = ["", "Q", ":", " 1", "+", "1", "\n"]
RESPONSE = ["", " 1", "+", "1", "\n", "", "####", " 2", ""]
LABELS = {0: "[GOOD]", 5: "[BAD]"}
ACCURACIES = {name: wilson_interval(n, 20) for name, n in (("good", 12), ("bad", 7))}
DRAWN = {
    "draw_layout": lambda: figures.draw_layout(PROMPT, RESPONSE, LABELS),
    "plot_accuracies": lambda: figures.plot_accuracies(
        ACCURACIES, {"good": figures.RIGHT, "bad": figures.WRONG}, x="maj@1"
    ),
}


def test_what_is_learned_what_is_a_label_and_what_is_prompt_look_different():
    (axes,) = DRAWN["draw_layout"]().axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[0] == "BOS"  # and not EOS, which has no text either
    assert texts[7:] == [
        *("[GOOD]", "·1", "+", "1", "↵"),
        *("[BAD]", "####", "·2", "EOS"),
    ]
    boxes = [patch.get_facecolor() for patch in axes.patches]
    assert len(boxes) == len(RESPONSE)  # the prompt has none
    assert boxes[0] == boxes[5] != boxes[1]
    assert len(set(boxes)) == 2
    bold = [text.get_text() for text in axes.texts if text.get_weight() == "bold"]
    assert bold == list(LABELS.values())  # not by their colour alone
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert heights["[BAD]"] > heights["[GOOD]"] > heights["Q"]


def test_differences_are_in_points_with_a_line_at_0():
    (axes,) = figures.plot_accuracies(
        {"a": Interval(0.05, -0.01, 0.11, 3, "")},
        {"a": figures.RIGHT},
        x="difference",
        differences=True,
    ).axes
    assert list(axes.lines[0].get_xdata()) == [0, 0]
    assert [text.get_text() for text in axes.texts] == ["+5.0"]
    assert axes.xaxis.get_major_formatter()(-0.025) == "-2.5"


def test_panels_can_have_ticks_of_their_own_and_one_y_axis():
    panels = {title: {"line": {0.0: 1.0, 2.0: 3.0}} for title in "ab"}
    one, other = figures.plot_panels(
        panels, x="x", ticks={0.0: "0", 2.0: "99k"}, sharey=True
    ).axes
    assert [label.get_text() for label in one.get_xticklabels()] == ["0", "99k"]
    one.set_ylim(0, 7)
    assert other.get_ylim() == (0, 7)


def test_each_policy_has_a_row_with_its_interval_from_the_top_down():
    (axes,) = DRAWN["plot_accuracies"]().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["good", "bad"]
    assert axes.yaxis_inverted()
    for row, interval in enumerate(ACCURACIES.values()):
        bar, point = axes.lines[2 * row : 2 * row + 2]
        assert list(bar.get_xdata()) == [interval.low, interval.high]
        assert list(point.get_xdata()) == [interval.mean]
        assert set(bar.get_ydata()) == {row}
    assert axes.lines[1].get_marker() != axes.lines[3].get_marker()
    assert [text.get_text() for text in axes.texts] == ["60.0%", "35.0%"]

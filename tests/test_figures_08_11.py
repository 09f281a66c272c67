"""Figures of the chapters on rewards and exploration: they show what they are given."""

from __future__ import annotations

from rlreason.publishing import figures

PIECES = [" 4", "+", "1", "\n", "####", " 5", ""]
PAID = {
    "sparse": [0.0] * 6 + [1.0],
    "shaped": [0.0, 0.0, 0.25, 0.0, 0.0, 0.0, -0.25],
}
PANELS = {
    "reward": {"one": {1: 0.1, 2: 0.4}, "two": {1: 0.2, 2: 0.3}},
    "accuracy": {"two": {1: 0.5, 2: 0.6}, "three": {1: 0.5, 2: 0.4}},
    "length": {"one": {1: 60, 2: 70}},
}
DRAWN = {
    "draw_payments": lambda: figures.draw_payments(PIECES, PAID),
    "plot_panels": lambda: figures.plot_panels(PANELS, x="phase"),
    "plot_draws": lambda: figures.plot_draws(
        [0.0, 0.5, 0.2], {"uniform": [1, 1, 1], "replay": [0, 2, 1]}, x="S", y="draws"
    ),
}


def test_what_is_paid_stands_over_its_token_and_what_is_taken_is_hatched_too():
    sparse, shaped = DRAWN["draw_payments"]().axes
    heights = [p.get_height() for p in shaped.patches]
    assert [a + b for a, b in zip(heights[:7], heights[7:], strict=True)] == PAID[
        "shaped"
    ]
    assert [text.get_text() for text in shaped.texts] == ["+0.25", "-0.25"]
    below = [p for p in shaped.patches if p.get_height() < 0]
    assert [p.get_hatch() for p in below] == ["////"]  # not by its colour alone
    assert [p.get_hatch() for p in sparse.patches if p.get_height() > 0] == [""]


def test_a_line_looks_the_same_in_every_panel_and_unlike_the_others():
    figure = DRAWN["plot_panels"]()
    reward, accuracy, length, unused = figure.axes

    def looks(axes, name: str):
        (line,) = (line for line in axes.lines if line.get_label() == name)
        return line.get_color(), line.get_marker(), line.get_linestyle()

    assert looks(reward, "two") == looks(accuracy, "two")
    assert looks(reward, "one") == looks(length, "one")
    different = [looks(reward, "one"), looks(reward, "two"), looks(accuracy, "three")]
    for kind in zip(*different, strict=True):
        assert len(set(kind)) == 3
    assert list(accuracy.lines[1].get_ydata()) == [0.5, 0.4]
    assert not unused.axison
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["one", "two", "three"]


def test_every_question_is_a_point_at_its_score_and_its_draws():
    uniform, replay = DRAWN["plot_draws"]().axes
    assert list(uniform.lines[0].get_ydata()) == [1, 1, 1]
    assert list(replay.lines[0].get_xdata()) == [0.0, 0.5, 0.2]
    assert list(replay.lines[0].get_ydata()) == [0, 2, 1]
    for axes in (uniform, replay):  # the panel with the fewest draws must not cut
        low, high = axes.get_ylim()
        assert low < 0
        assert high > 2

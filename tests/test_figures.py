"""Figures: they draw, they are read on any ground, and colour is never needed alone.

What each chapter draws is in ``DRAWN`` of its own file, with what its figures show;
what holds of all of them is tested here.
"""

from __future__ import annotations

from importlib import import_module
from io import BytesIO
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from rlreason.publishing import figures

PIECES = [" 4", "+", "1", "\n", "####", " 5", ""]
SCORES = [-0.1, -2.0, -0.5, -0.1, -0.2, -0.3, -1.0]
ROUNDS = [
    {
        "round": number,
        "accuracy": 0.3 * number,
        "solved_questions": 0.4 * number,
        "truncated": 0.0,
        "validation_maj_1": 0.2 * number,
        "solutions": 50 * number,
        "new_solutions": 20,
        "solutions_per_question": 1.5,
    }
    for number in (1, 2)
]
DRAWN = {
    "plot_update": lambda: figures.plot_update(
        PIECES,
        SCORES,
        [score / 2 for score in SCORES],
        changes=[0.1, -0.1, 0.2],
        correct=[True, False, False],
    ),
    "draw_loop": figures.draw_loop,
    "plot_task": lambda: figures.plot_task([2, 3, 3, 5], [1, 4, 16, 900]),
    "draw_episode": lambda: figures.draw_episode(
        PIECES, [(0, 4), (4, 7)], {1.0: [1.0] * 7, 0.9: [0.9**t for t in range(7)]}
    ),
    "plot_gradient": lambda: figures.plot_gradient(
        ["a", "b"], [0.1, -0.2], [0.11, -0.19], [0.01, 0.02]
    ),
    "draw_expert_iteration": figures.draw_expert_iteration,
    "plot_rounds": lambda: figures.plot_rounds(ROUNDS),
    "plot_seeds": lambda: figures.plot_seeds(
        {"base": [0.1], "SFT": [0.4, 0.5], "expert iteration": [0.5, 0.6]}, y="maj@1"
    ),
    "plot_rollouts": lambda: figures.plot_rollouts(
        {"seed 0": {0: 0.4, 6000: 0.5}, "seed 1": {0: 0.3, 6000: 0.4}}, y="maj@1"
    ),
}


ALL = DRAWN.copy()
for path in Path(__file__).parent.glob("test_figures_*.py"):
    ALL |= import_module(path.stem).DRAWN


def svg(figure) -> bytes:
    file = BytesIO()
    with plt.rc_context(figures.STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def test_every_figure_of_the_library_is_drawn_here():
    names = {name for name in vars(figures) if name.startswith(("draw_", "plot_"))}
    assert names == set(ALL)


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_figure_is_the_same_file_each_time_on_an_opaque_ground(name):
    figure = ALL[name]()
    assert svg(figure) == svg(ALL[name]())
    assert figure.get_facecolor() == (1, 1, 1, 1)
    assert plt.get_fignums() == []  # pyplot would show it once more


def test_every_token_is_named_unless_they_are_too_many_to_read():
    def axes(times: int):
        tokens = PIECES * times
        returns = {1.0: [1.0] * len(tokens)}
        return figures.draw_episode(tokens, [(0, len(tokens))], returns).axes[0]

    assert [t.get_text() for t in axes(1).get_xticklabels()][-1] == "EOS"
    assert len(axes(10).get_xticks()) == 70
    assert len(axes(40).get_xticks()) == 70


def test_an_axis_shows_tokens_that_cannot_be_seen():
    assert figures.token_labels(PIECES) == ["·4", "+", "1", "↵", "####", "·5", "EOS"]


# Colours


def luminance(color: str) -> float:
    """Relative luminance, by WCAG 2.1."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast_with_white(color: str) -> float:
    return 1.05 / (luminance(color) + 0.05)


@pytest.mark.parametrize("color", sorted({*figures.COLORS.values(), *figures.PALETTE}))
def test_what_is_drawn_stands_out_from_the_ground(color):
    assert contrast_with_white(color) >= 3


@pytest.mark.parametrize(
    "color", [figures.INK, figures.MUTED, figures.RIGHT, figures.WRONG]
)
def test_what_is_written_can_be_read(color):
    assert contrast_with_white(color) >= 4.5


def test_other_colours_of_the_set_would_not_stand_out():
    # The wrong version: the rest of Okabe and Ito's set
    for color in ("#e69f00", "#56b4e9", "#f0e442"):
        assert contrast_with_white(color) < 3


# What a person without one kind of cone sees, on linear RGB (Machado et al., 2009)
WITHOUT_CONE = {
    "red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def seen(color: str, cone: str) -> np.ndarray:
    rgb = np.array(to_rgb(color)) ** 2.2
    return np.clip(np.array(WITHOUT_CONE[cone]) @ rgb, 0, 1) ** (1 / 2.2)


def distance(a: str, b: str, cone: str) -> float:
    return float(np.linalg.norm(seen(a, cone) - seen(b, cone)))


@pytest.mark.parametrize("cone", WITHOUT_CONE)
def test_methods_are_told_apart_without_one_kind_of_cone(cone):
    pairs = combinations(figures.COLORS.values(), 2)
    assert min(distance(a, b, cone) for a, b in pairs) > 0.12
    assert distance(figures.RIGHT, figures.WRONG, cone) > 0.12


def test_two_colours_that_were_tried_would_not_be_told_apart():
    # The wrong version: vermilion and a dark amber
    assert distance("#d55e00", "#997000", "red") < 0.01


# Expert iteration


def test_the_bars_of_the_data_add_up_to_its_size():
    data = figures.plot_rounds(ROUNDS).axes[-1]
    tops = [bar.get_y() + bar.get_height() for bar in data.patches]
    assert tops == [30, 80, 50, 100]  # before, then with the new ones on top


def test_one_accuracy_without_a_seed_is_that_of_every_seed():
    (axes,) = figures.plot_seeds({"base": [0.1], "SFT": [0.4, 0.6]}, y="maj@1").axes
    paths = [list(line.get_ydata()) for line in axes.lines[:2]]
    assert paths == [[0.1, 0.4], [0.1, 0.6]]
    assert [text.get_text() for text in axes.texts] == ["10.0%", "50.0%"]


def test_the_mean_path_is_the_mean_of_the_runs():
    (axes,) = figures.plot_rollouts(
        {"seed 0": {0: 0.25, 60: 0.5}, "seed 1": {0: 0.75, 60: 0.5}}, y="maj@1"
    ).axes
    assert list(axes.lines[-1].get_xdata()) == [0, 60]
    assert list(axes.lines[-1].get_ydata()) == [0.5, 0.5]

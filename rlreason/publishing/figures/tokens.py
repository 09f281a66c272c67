"""Drawings of texts, token by token, and of the batches that they fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from rlreason.publishing.figures.style import (
    COLORS,
    INK,
    MUTED,
    PROMPT,
    RESPONSE,
    RIGHT,
    WASTE,
    WRONG,
    key,
    label_tokens,
    look,
    new_figure,
    place_tokens,
    token_labels,
    write_tokens,
)

WIDTH = 84  # characters in a line


def plot_update(
    pieces: Sequence[str],
    before: Sequence[float],
    after: Sequence[float],
    *,
    changes: Sequence[float],
    correct: Sequence[bool],
) -> Figure:
    """Show what one update did to a solution, and to all samples of its question.

    Args:
        pieces: The T decoded tokens of the solution that was reinforced.
        before: Their log-probabilities before the update, T numbers.
        after: And after it.
        changes: Change of the log-probability a token of each of the K samples.
        correct: Whether each is right.
    """
    figure, (top, bottom) = new_figure(
        2, height=5.0, gridspec_kw={"height_ratios": [3, 1.3]}
    )
    places = range(len(pieces))
    top.vlines(places, before, after, color=COLORS["expert_iteration"], linewidth=1.2)
    top.plot(places, before, "o", color=COLORS["base"], markersize=4, label="before")
    top.plot(
        places,
        after,
        "^",
        color=COLORS["expert_iteration"],
        markersize=5,
        label="after",
    )
    label_tokens(top, pieces)
    top.set_ylabel("log-probability (nats)")
    top.set_title("Every token of the right solution")
    figure.legend(loc="outside upper right", ncols=2)
    for wanted, marker, color in ((False, "x", WRONG), (True, "o", RIGHT)):
        points = [c for c, ok in zip(changes, correct, strict=True) if ok is wanted]
        # Each at a height of its own, since many changes are the same
        rows = np.linspace(wanted - 0.35, wanted + 0.35, len(points) + 2)[1:-1]
        bottom.plot(points, rows, marker, color=color, alpha=0.7)
    bottom.axvline(0, color=INK, linewidth=0.8)
    bottom.set_yticks([0, 1], ["wrong", "right"])
    bottom.set_ylim(-0.6, 1.6)
    bottom.set_xlabel("change of log-probability a token (nats)")
    bottom.set_title("All samples of the question")
    return figure


def draw_episode(
    pieces: Sequence[str],
    spans: Sequence[tuple[int, int]],
    returns: Mapping[float, Sequence[float]],
) -> Figure:
    """Draw a rollout as an episode: tokens, steps, and the return of every token.

    Args:
        pieces: The T decoded tokens.
        spans: Which tokens make each step, ``[start, end)``.
        returns: For each discount, the return of each of the T actions.
    """
    figure, axes = new_figure(height=3.6)
    for i, (start, end) in enumerate(spans):
        shade = "#eef3f8" if i % 2 == 0 else "#fdf1e7"
        axes.axvspan(start - 0.5, end - 0.5, color=shade, linewidth=0)
        place = (start + end - 1) / 2
        axes.text(place, 1.14, f"step {i + 1}", ha="center", fontsize="small")
    for i, (gamma, values) in enumerate(returns.items()):
        line = look(i, rf"$\gamma$ = {gamma:g}")
        axes.plot(values, markersize=3, linewidth=1.2, **line)
    label_tokens(axes, pieces)
    axes.set_ylim(-0.05, 1.25)
    axes.set_ylabel("return $G_t$")
    axes.set_xlabel("token")
    axes.legend(loc="lower right", frameon=True, framealpha=0.9)
    axes.grid(axis="x", visible=False)
    return figure


def draw_tokens(
    pieces: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    *,
    label: str,
    largest: float,
) -> Figure:
    """Draw a text token by token, each in a box as dark as its value.

    Args:
        pieces: The decoded tokens.
        values: Under the title of each drawing, one number a token; None leaves the
            token without a box.
        label: What the number is.
        largest: The value of the darkest box.
    """
    shown = token_labels(pieces)
    places, lines = place_tokens(pieces, shown, WIDTH)
    figure, axes = new_figure(
        len(values), height=(0.26 * lines + 0.45) * len(values) + 0.1, squeeze=False
    )
    # Light enough at its dark end for black letters
    shades = matplotlib.colors.LinearSegmentedColormap.from_list(
        "shades", ["#ffffff", "#6fa8d6"]
    )
    norm = matplotlib.colors.Normalize(0, largest, clip=True)
    edge = {"edgecolor": "#aab4be", "linewidth": 0.6}
    for ax, (title, numbers) in zip(axes.flat, values.items(), strict=True):
        ax.set_axis_off()
        ax.set_xlim(0, WIDTH)
        ax.set_ylim(lines, 0)
        ax.set_title(title)
        boxes = [
            None if n is None else edge | {"facecolor": shades(norm(n))}
            for n in numbers
        ]
        write_tokens(ax, shown, places, boxes)
    bar = matplotlib.cm.ScalarMappable(norm, shades)
    if largest > 0:
        figure.colorbar(bar, ax=axes, location="bottom", label=label, aspect=60)
    return figure


def draw_layout(
    prompt: Sequence[str],
    response: Sequence[str],
    labels: Mapping[int, str],
) -> Figure:
    """Draw a labelled solution token by token: what is read, what is learned.

    Args:
        prompt: The decoded tokens of the prompt, without boxes.
        response: The decoded tokens of the response; all but labels are learned.
        labels: Place in ``response`` to the name of the label that stands there.
    """
    spelled = [labels.get(i, text) for i, text in enumerate(token_labels(response))]
    # No response ends in a prompt: what has no text there is BOS
    asked = [text or "BOS" for text in prompt]
    shown = [*token_labels(asked), *spelled]
    places, lines = place_tokens([*prompt, *response], shown, WIDTH)
    figure, axes = new_figure(height=0.26 * lines + 0.6)
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(lines, 0)
    learned = {"facecolor": "#d6e6f4", "edgecolor": "#6b8299", "linewidth": 0.6}
    given = {"facecolor": "white", "edgecolor": INK, "linewidth": 1.4}
    bold = [n - len(prompt) in labels for n in range(len(shown))]
    boxes = [given if is_label else learned for is_label in bold]
    boxes[: len(prompt)] = [None] * len(prompt)
    write_tokens(axes, shown, places, boxes, bold=bold)
    key(
        figure,
        {"learned": learned, "label: read, not learned": given},
        place="lower left",
    )
    return figure


def draw_payments(pieces: Sequence[str], paid: Mapping[str, Sequence[float]]) -> Figure:
    """Draw what each token of a response is paid, a panel a reward.

    Args:
        pieces: The T decoded tokens.
        paid: Under the name of a reward, T numbers; those below 0 are hatched.
    """
    figure, panels = new_figure(
        len(paid), height=1.1 * len(paid) + 1.0, sharex=True, sharey=True, squeeze=False
    )
    places = range(len(pieces))
    for axes, (name, numbers) in zip(panels.flat, paid.items(), strict=True):
        kinds = [(RIGHT, ""), (WRONG, "////")]
        for (color, hatch), sign in zip(kinds, (1, -1), strict=True):
            heights = [max(0.0, sign * number) * sign for number in numbers]
            axes.bar(places, heights, color=color, hatch=hatch, edgecolor="white")
        for t, number in enumerate(numbers):
            if number:
                side = 1 if number > 0 else -1
                axes.annotate(
                    f"{number:+.2f}",
                    (t, number),
                    xytext=(0, 3 * side),
                    textcoords="offset points",
                    ha="center",
                    va="bottom" if number > 0 else "top",
                    fontsize="x-small",
                )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_title(name, fontsize="small")
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.3)
    label_tokens(panels.flat[-1], pieces)
    return figure


def draw_scores(
    solutions: Mapping[str, tuple[Sequence[str], Sequence[float]]],
) -> Figure:
    """Draw the score after each token of some solutions, a panel a solution.

    Args:
        solutions: Under a title, the T decoded tokens and T probabilities.
    """
    figure, panels = new_figure(
        len(solutions), height=2.1 * len(solutions) + 0.2, squeeze=False
    )
    for i, (axes, (title, (pieces, scores))) in enumerate(
        zip(panels.flat, solutions.items(), strict=True)
    ):
        axes.plot(scores, markersize=3.5, **look(i, title, {title: COLORS["orm"]}))
        axes.axhline(0.5, color=MUTED, linewidth=1, linestyle="--")
        for t, piece in enumerate(pieces):
            if "\n" in piece:
                axes.axvline(t, color=MUTED, linewidth=0.8, linestyle=":")
        label_tokens(axes, pieces)
        axes.set_ylim(0, 1)
        axes.set_title(title, fontsize="small")
        axes.set_ylabel("score")
        axes.grid(axis="x", visible=False)
    return figure


def draw_batches(
    cuts: Mapping[str, Sequence[Sequence[tuple[int, int]]]], max_columns: int
) -> Figure:
    """Draw how batches fill the rectangles that go through the model.

    Args:
        cuts: Under a title, micro-batches of (prompt tokens, response tokens) a row.
        max_columns: Length of the longest row, for the axis.
    """
    figure, axes = new_figure(1, len(cuts), height=3.4, sharey=True)
    parts = {"prompt": PROMPT, "response": RESPONSE, "padding": WASTE}
    for ax, (title, batches) in zip(axes, cuts.items(), strict=True):
        y = 0.0
        for rows in batches:
            longest = max(prompt + response for prompt, response in rows)
            for prompt, response in rows:
                rest = longest - prompt - response
                x = 0
                for part, size in zip(parts, (prompt, response, rest), strict=True):
                    ax.barh(y, size, left=x, height=0.86, linewidth=0, **parts[part])
                    x += size
                y += 1
            y += 0.7
        ax.set_title(title)
        ax.set_xlabel("tokens")
        ax.set_xlim(0, max_columns)
        ax.set_yticks([])
        ax.grid(visible=False)
    axes[0].set_ylabel("examples")
    axes[0].invert_yaxis()
    key(figure, parts, place="upper right")
    return figure


def draw_rows(lengths: Sequence[int], prompt: int) -> Figure:
    """Draw the work of a plain batch beside that of a batch which rows leave.

    Args:
        lengths: Tokens of each of a question's K samples.
        prompt: Tokens of its prompt.
    """
    figure, axes = new_figure(1, 2, height=3.2, sharey=True, sharex=True)
    longest, middle = max(lengths), (len(lengths) - 1) / 2
    for row, length in enumerate(lengths):
        for ax in axes:
            ax.barh(row, length, height=0.86, linewidth=0, **RESPONSE)
        axes[0].barh(row, -prompt, height=0.86, linewidth=0, **PROMPT)
        rest = longest - length
        axes[0].barh(row, rest, left=length, height=0.86, linewidth=0, **WASTE)
    axes[1].barh(middle, -prompt, height=0.86, linewidth=0, **PROMPT)
    axes[0].set_title("A plain batch")
    axes[1].set_title("One prompt, rows leave")
    for ax in axes:
        ax.set_xlabel("token")
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.axvline(0, color=INK, linewidth=0.8)
    axes[0].set_ylabel("samples")
    names = {"prompt": PROMPT, "response": RESPONSE, "computed, thrown away": WASTE}
    key(figure, names, place="upper right")
    return figure

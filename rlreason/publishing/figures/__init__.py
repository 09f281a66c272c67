"""How it is shown: every figure of the book, in one style.

A function here takes what was measured and returns a ``Figure``; it runs nothing and
reads no file. Notebooks glue the figure and give it a caption, in which
:func:`provenance` names profile, seeds and date.

Figures stand on an opaque white ground, so that they read alike on light and dark
pages. Colours are from the sets of Okabe and Ito (2008) and of Tol (2021), picked so
that each has a contrast of 3:1 on white and no two look alike to a reader who lacks
one kind of cone; and no figure tells things apart by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator

from rlreason.evaluation.classifier import Bin
from rlreason.evaluation.intervals import Interval

INK = "#1f2328"  # text and axes
MUTED = "#6e7681"  # grid labels, what is only for comparison

COLORS = {
    "base": MUTED,
    "sft": "#0072b2",
    "expert_iteration": "#d55e00",
    "ppo": "#009e73",
    "rcrl": "#882255",
    "orm": "#332288",
}
"""The colour of each method, the same in every figure."""

RIGHT, WRONG = "#007f5f", "#c2410c"
PALETTE = tuple(COLORS[m] for m in ("sft", "expert_iteration", "ppo", "rcrl", "orm"))
"""For series that are no methods, in this order."""

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e4e6e9",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10.0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "rlreason",  # the same figure is the same file
}


def use_style() -> None:
    """Set the style for all figures of a notebook; called once, in its first cell."""
    matplotlib.rcParams.update(STYLE)


def new_figure(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 7.0,
    height: float = 3.2,
    **subplots: Any,
) -> tuple[Figure, Any]:
    """Make an empty figure and its axes; sizes in inches.

    It is not registered with pyplot, so a notebook shows it where it is asked for and
    nowhere else. ``subplots`` goes to ``Figure.subplots``; what that returns, one Axes
    or an array of them, is the second part.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **subplots)


def count_bars(
    axes: Axes, labels: Sequence[Any], counts: Sequence[float], **bar: Any
) -> None:
    """Draw one labelled bar a category, with its value on top."""
    bars = axes.bar([str(label) for label in labels], counts, **bar)
    axes.bar_label(bars, padding=2, color=MUTED, fontsize="small", fmt="{:g}")
    axes.grid(axis="x", visible=False)


def token_labels(pieces: Sequence[str]) -> list[str]:
    """Make decoded tokens visible on an axis: a line break, a space, EOS (``""``).

    >>> token_labels([" 4", "\\n", ""])
    ['·4', '↵', 'EOS']
    """
    return [p.replace("\n", "↵").replace(" ", "·") or "EOS" for p in pieces]


def _label_tokens(axes: Axes, pieces: Sequence[str]) -> None:
    """Write the tokens along the x axis, every n-th where they are too many."""
    every = -(-len(pieces) // 70)
    places = range(0, len(pieces), every)
    axes.set_xticks(places, token_labels(pieces[::every]), rotation=90)
    axes.tick_params(axis="x", labelsize="x-small")
    axes.set_xlim(-0.5, len(pieces) - 0.5)


# A tour


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
    _label_tokens(top, pieces)
    top.set_ylabel("log-probability (nats)")
    top.set_title("Every token of the right solution")
    figure.legend(loc="outside upper right", ncols=2)
    for wanted, marker, color in ((False, "x", WRONG), (True, "o", RIGHT)):
        points = [c for c, ok in zip(changes, correct, strict=True) if ok is wanted]
        bottom.plot(points, [int(wanted)] * len(points), marker, color=color, alpha=0.7)
    bottom.axvline(0, color=INK, linewidth=0.8)
    bottom.set_yticks([0, 1], ["wrong", "right"])
    bottom.set_ylim(-0.6, 1.6)
    bottom.set_xlabel("change of log-probability a token (nats)")
    bottom.set_title("All samples of the question")
    return figure


# Background


def draw_loop() -> Figure:
    """Draw the loop that all methods share: question, samples, reward, update."""
    figure, axes = new_figure(width=7.0, height=2.5)
    axes.set_axis_off()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 3.4)
    boxes = {
        "question": (1.0, 2.5, "question"),
        "policy": (3.6, 2.5, "policy"),
        "solutions": (6.3, 2.5, "K solutions"),
        "reward": (9.0, 2.5, "reward"),
        "update": (6.3, 0.6, "update"),
    }
    for x, y, text in boxes.values():
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.8, y - 0.38),
                1.6,
                0.76,
                boxstyle="round,pad=0.05",
                facecolor="#eef3f8",
                edgecolor=COLORS["sft"],
            )
        )
        axes.text(x, y, text, ha="center", va="center")
    _arrow(axes, (1.9, 2.5), (2.7, 2.5), "prompt")
    _arrow(axes, (4.5, 2.5), (5.4, 2.5), "sample")
    _arrow(axes, (7.2, 2.5), (8.1, 2.5), "check")
    _arrow(axes, (9.0, 2.05), (7.2, 0.6), "", bend=-0.3)
    _arrow(axes, (5.4, 0.6), (3.6, 2.05), "", bend=-0.3)
    axes.text(8.75, 0.95, "what is\npaid", ha="left", va="center", color=MUTED)
    axes.text(3.75, 0.95, "new\nweights", ha="right", va="center", color=MUTED)
    return figure


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str,
    *,
    bend: float = 0.0,
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=12,
            color=INK,
        )
    )
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.3)
    axes.text(*middle, text, ha="center", color=MUTED, fontsize="small")


def plot_task(steps: Sequence[int], sequences: Sequence[int]) -> Figure:
    """Show how long the solutions of a task are, and in how many orders they go.

    Args:
        steps: Steps of each problem's reference solution.
        sequences: Right sequences of operations of each problem, at least 1.
    """
    figure, (left, right) = new_figure(1, 2)
    lengths = range(min(steps), max(steps) + 1)
    count_bars(left, lengths, [list(steps).count(n) for n in lengths], color=PALETTE[0])
    left.set_xlabel("steps of the reference solution")
    left.set_ylabel("problems")
    bins = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, max(17, *sequences)))
    labels = ["1", "2", "3-4", "5-8", "9-16", "17+"]
    counts = [sum(low <= n <= high for n in sequences) for low, high in bins]
    count_bars(right, labels, counts, color=PALETTE[3])
    right.set_xlabel("right sequences of operations, at least")
    return figure


# Reasoning as a decision process


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
    for (gamma, values), marker in zip(returns.items(), "os^Dv", strict=False):
        label = rf"$\gamma$ = {gamma:g}"
        axes.plot(values, marker=marker, markersize=3, linewidth=1.2, label=label)
    _label_tokens(axes, pieces)
    axes.set_ylim(-0.05, 1.25)
    axes.set_ylabel("return $G_t$")
    axes.set_xlabel("token")
    axes.legend(loc="lower right", frameon=True, framealpha=0.9)
    axes.grid(axis="x", visible=False)
    return figure


def plot_gradient(
    names: Sequence[str],
    exact: Sequence[float],
    estimate: Sequence[float],
    standard_error: Sequence[float],
) -> Figure:
    """Set a sampled gradient, with 1.96 standard errors, against the exact one."""
    figure, axes = new_figure()
    places = range(len(names))
    axes.bar(places, exact, color="#c9d7e6", label="exact, all sequences counted")
    axes.errorbar(
        places,
        estimate,
        yerr=[1.96 * error for error in standard_error],
        fmt="o",
        color=COLORS["expert_iteration"],
        capsize=4,
        label="sampled, with 95% interval",
    )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(places, names, fontsize="small")
    axes.set_ylabel("derivative of the mean reward")
    axes.set_xlabel("logit of: token before → token")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def plot_curves(
    curves: Mapping[str, Sequence[float]],
    *,
    x: str,
    y: str,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Draw one line a name over 0, 1, 2, ..., told apart by marker too."""
    figure, axes = new_figure()
    for (name, values), marker in zip(curves.items(), "os^Dv", strict=False):
        color = (colors or {}).get(name)
        axes.plot(values, marker=marker, markersize=4, label=name, color=color)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()
    return figure


# The model and SFT


def draw_tokens(
    pieces: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    *,
    label: str,
    largest: float,
    width: int = 84,
) -> Figure:
    """Draw a text token by token, each in a box as dark as its value.

    Args:
        pieces: The decoded tokens.
        values: Under the title of each drawing, one number a token; None leaves the
            token without a box.
        label: What the number is.
        largest: The value of the darkest box.
        width: Characters in a line.
    """
    shown = token_labels(pieces)
    places, lines = _places(pieces, shown, width)
    figure, axes = new_figure(
        len(values), height=(0.26 * lines + 0.45) * len(values) + 0.1, squeeze=False
    )
    # Light enough at its dark end for black letters
    shades = matplotlib.colors.LinearSegmentedColormap.from_list(
        "shades", ["#ffffff", "#6fa8d6"]
    )
    norm = matplotlib.colors.Normalize(0, largest, clip=True)
    for ax, (title, numbers) in zip(axes.flat, values.items(), strict=True):
        ax.set_axis_off()
        ax.set_xlim(0, width)
        ax.set_ylim(lines, 0)
        ax.set_title(title)
        for text, (x, y), number in zip(shown, places, numbers, strict=True):
            color = MUTED if number is None else INK
            if number is not None:
                box = Rectangle((x, y + 0.08), len(text), 0.84, linewidth=0.6)
                box.set(facecolor=shades(norm(number)), edgecolor="#aab4be")
                ax.add_patch(box)
            ax.text(
                x + len(text) / 2,
                y + 0.52,
                text,
                ha="center",
                va="center",
                color=color,
                family="monospace",
                fontsize=7.2,
            )
    bar = matplotlib.cm.ScalarMappable(norm, shades)
    if largest > 0:
        figure.colorbar(bar, ax=axes, location="bottom", label=label, aspect=60)
    return figure


def _places(
    pieces: Sequence[str], shown: Sequence[str], width: int
) -> tuple[list[tuple[float, int]], int]:
    """Column and line of each token, in characters, and the number of lines."""
    places: list[tuple[float, int]] = []
    x, y = 0.0, 0
    for piece, text in zip(pieces, shown, strict=True):
        if x + len(text) > width:
            x, y = 0.0, y + 1
        places.append((x, y))
        x += len(text) + 0.15
        if "\n" in piece:
            x, y = 0.0, y + 1
    return places, y + 1


def draw_batches(
    cuts: Mapping[str, Sequence[Sequence[tuple[int, int]]]], max_columns: int
) -> Figure:
    """Draw how batches fill the rectangles that go through the model.

    Args:
        cuts: Under a title, micro-batches of (prompt tokens, response tokens) a row.
        max_columns: Length of the longest row, for the axis.
    """
    figure, axes = new_figure(1, len(cuts), height=3.4, sharey=True)
    parts = {
        "prompt": {"facecolor": "#d7dce2"},
        "response": {"facecolor": COLORS["sft"]},
        "padding": {"facecolor": "white", "hatch": "////", "edgecolor": "#9aa3ad"},
    }
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
    handles = [Rectangle((0, 0), 1, 1, label=name, **kw) for name, kw in parts.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return figure


def plot_training(
    losses: Mapping[str, Sequence[float]], rates: Sequence[float]
) -> Figure:
    """Show the loss of each update of each run, and the learning rate they share."""
    figure, (top, bottom) = new_figure(
        2, height=4.2, sharex=True, gridspec_kw={"height_ratios": [3, 1]}
    )
    styles = ("-", "--", "-.", ":")
    for i, (name, values) in enumerate(losses.items()):
        updates = range(1, len(values) + 1)
        top.plot(updates, values, styles[i % 4], label=name, linewidth=1.3)
    top.set_ylabel("loss (nats a token)")
    top.legend()
    bottom.plot(range(1, len(rates) + 1), rates, color=MUTED)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("update")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return figure


def plot_bars(
    series: Mapping[str, Mapping[str, float]],
    *,
    y: str,
    x: str = "",
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Draw one bar a category for each series, told apart by hatching too.

    All series have the categories of the first.
    """
    figure, axes = new_figure()
    categories = list(next(iter(series.values())))
    width = 0.8 / len(series)
    hatches = ("", "///", "...", "xxx", "\\\\\\")
    for i, (name, values) in enumerate(series.items()):
        places = [j - 0.4 + width * (i + 0.5) for j in range(len(categories))]
        axes.bar(
            places,
            [values[category] for category in categories],
            width * 0.92,
            label=name,
            color=(colors or {}).get(name, PALETTE[i % len(PALETTE)]),
            hatch=hatches[i % len(hatches)],
            edgecolor="white",
            linewidth=0,
        )
    axes.set_xticks(range(len(categories)), categories)
    axes.set_ylabel(y)
    axes.set_xlabel(x)
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper right", ncols=len(series))
    return figure


def plot_intervals(
    series: Mapping[str, Mapping[float, Interval]],
    *,
    x: str,
    y: str,
    logarithmic: bool = False,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Draw a mean with its interval at each x, one line a series.

    Args:
        series: Name to x to interval. Points of one x are set side by side.
        logarithmic: Whether the x axis is, with base 2.
    """
    figure, axes = new_figure()
    xs = sorted({at for intervals in series.values() for at in intervals})
    gap = min((b - a for a, b in pairwise(xs)), default=1.0)
    for i, (name, intervals) in enumerate(series.items()):
        shift = (i - (len(series) - 1) / 2) * 0.08
        at = [v * 2**shift if logarithmic else v + shift * gap for v in intervals]
        means = [interval.mean for interval in intervals.values()]
        below = [interval.mean - interval.low for interval in intervals.values()]
        above = [interval.high - interval.mean for interval in intervals.values()]
        axes.errorbar(
            at,
            means,
            yerr=[below, above],
            marker="os^Dv"[i % 5],
            markersize=5,
            capsize=3,
            elinewidth=1,
            label=name,
            color=(colors or {}).get(name, PALETTE[i % len(PALETTE)]),
        )
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{at:g}" for at in xs])
    axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(loc="outside upper right", ncols=len(series))
    return figure


# Sampling and metrics


def draw_inverse_cdf(
    labels: Sequence[str], probabilities: Sequence[float], uniforms: Sequence[float]
) -> Figure:
    """Draw how uniform numbers pick tokens from a cumulative distribution.

    Args:
        labels: The tokens, in the order of their ids.
        probabilities: Of these tokens; they sum to 1.
        uniforms: Numbers in [0, 1), each drawn as an arrow to its token.
    """
    figure, axes = new_figure(height=3.6)
    edges = [0.0, *accumulate(probabilities)]
    axes.stairs(edges[1:], range(len(labels) + 1), color=INK, linewidth=1.5)
    for u in uniforms:
        i = next((j for j, top in enumerate(edges[1:]) if top > u), len(labels) - 1)
        axes.plot([0, i + 0.5], [u, u], ":", color=COLORS["expert_iteration"])
        _arrow(axes, (i + 0.5, u), (i + 0.5, 0.0), "")
        axes.plot(0, u, ">", color=COLORS["expert_iteration"], clip_on=False)
    axes.set_xticks(
        [i + 0.5 for i in range(len(labels))], labels, rotation=90, fontsize="small"
    )
    axes.set_xlim(0, len(labels))
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("cumulative probability, and u")
    axes.set_xlabel("token")
    axes.grid(axis="x", visible=False)
    return figure


def draw_rows(lengths: Sequence[int], prompt: int) -> Figure:
    """Draw the work of a plain batch beside that of a batch which rows leave.

    Args:
        lengths: Tokens of each of a question's K samples.
        prompt: Tokens of its prompt.
    """
    figure, axes = new_figure(1, 2, height=3.2, sharey=True, sharex=True)
    useful = {"facecolor": COLORS["sft"]}
    shared = {"facecolor": "#d7dce2"}
    idle = {"facecolor": "white", "hatch": "////", "edgecolor": "#9aa3ad"}
    longest, middle = max(lengths), (len(lengths) - 1) / 2
    for row, length in enumerate(lengths):
        for ax in axes:
            ax.barh(row, length, height=0.86, linewidth=0, **useful)
        axes[0].barh(row, -prompt, height=0.86, linewidth=0, **shared)
        rest = longest - length
        axes[0].barh(row, rest, left=length, height=0.86, linewidth=0, **idle)
    axes[1].barh(middle, -prompt, height=0.86, linewidth=0, **shared)
    axes[0].set_title("A plain batch")
    axes[1].set_title("One prompt, rows leave")
    for ax in axes:
        ax.set_xlabel("token")
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.axvline(0, color=INK, linewidth=0.8)
    axes[0].set_ylabel("samples")
    names = {"prompt": shared, "response": useful, "computed, thrown away": idle}
    handles = [Rectangle((0, 0), 1, 1, label=name, **kw) for name, kw in names.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3)
    return figure


def draw_coverage(intervals: Sequence[Interval], truth: float, y: str) -> Figure:
    """Draw many intervals for one number, those that miss it with a cross."""
    figure, axes = new_figure(height=2.8)
    for i, interval in enumerate(intervals):
        missed = interval.excludes(truth)
        axes.errorbar(
            i,
            interval.mean,
            yerr=[[interval.mean - interval.low], [interval.high - interval.mean]],
            marker="x" if missed else "o",
            markersize=6 if missed else 4,
            capsize=2,
            elinewidth=1.2,
            color=WRONG if missed else COLORS["sft"],
        )
    axes.axhline(truth, color=INK, linewidth=1, linestyle="--")
    axes.set_xticks([])
    axes.set_xlabel("test sets of the same size")
    axes.set_ylabel(y)
    return figure


# Expert iteration


def draw_expert_iteration() -> Figure:
    """Draw the five steps of a round, and where base and data come in."""
    figure, axes = new_figure(height=2.7)
    axes.set_axis_off()
    axes.set_xlim(0, 10.4)
    axes.set_ylim(0, 3.4)
    steps = ("sample", "filter", "de-duplicate", "grow", "distil")
    for i, name in enumerate(steps):
        _box(axes, 1.2 + 2 * i, 2.2, f"{i + 1}  {name}", color=COLORS["sft"])
    passed_on = ("rollouts", "right ones", "new ones", "$D_i$")
    for i, name in enumerate(passed_on):
        _arrow(axes, (2.0 + 2 * i, 2.2), (2.4 + 2 * i, 2.2), "")
        axes.text(2.2 + 2 * i, 1.55, name, ha="center", color=MUTED, fontsize="small")
    _box(axes, 7.2, 0.6, "$D_{i-1}$", color=MUTED)
    _arrow(axes, (7.2, 1.02), (7.2, 1.75), "")
    _box(axes, 9.2, 0.6, "base", color=MUTED)
    _arrow(axes, (9.2, 1.02), (9.2, 1.75), "")
    _arrow(axes, (9.2, 2.65), (1.2, 2.65), "", bend=0.1)
    text = r"the new policy $\pi_i$ samples in the next round"
    axes.text(5.2, 3.25, text, ha="center", color=MUTED, fontsize="small")
    return figure


def _box(axes: Axes, x: float, y: float, text: str, *, color: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - 0.72, y - 0.34),
            1.44,
            0.68,
            boxstyle="round,pad=0.05",
            facecolor="#eef3f8",
            edgecolor=color,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize="small")


def plot_rounds(rounds: Sequence[Mapping[str, float]]) -> Figure:
    """Show what each round of expert iteration logged (``Trained.rounds``)."""
    figure, axes = new_figure(2, 3, height=4.4, sharex=True)
    at = [str(row["round"]) for row in rounds]
    panels = {
        "accuracy": "rollouts that are right",
        "solved_questions": "questions solved",
        "truncated": "rollouts cut off",
        "validation_maj_1": "validation maj@1",
        "solutions_per_question": "solutions a question",
    }
    *some, data = axes.flat
    for panel, (metric, title) in zip(some, panels.items(), strict=True):
        values = [row[metric] for row in rounds]
        share = metric != "solutions_per_question"
        bars = panel.bar(at, values, 0.6, color=COLORS["expert_iteration"])
        fmt = "{:.1%}" if share else "{:.2f}"
        panel.bar_label(bars, fmt=fmt, padding=2, color=MUTED, fontsize="small")
        panel.set_ylim(0, max(0.05 if share else 0.5, 1.2 * max(values)))
        panel.set_title(title, fontsize="small")
    new = [row["new_solutions"] for row in rounds]
    old = [row["solutions"] - n for row, n in zip(rounds, new, strict=True)]
    data.bar(at, old, 0.6, color="#c9d7e6", label="before")
    bars = data.bar(
        at, new, 0.6, bottom=old, color=COLORS["sft"], hatch="///", label="new"
    )
    labels = [f"+{n}" for n in new]
    data.bar_label(bars, labels, padding=2, color=MUTED, fontsize="small")
    data.set_ylim(0, 1.25 * max(row["solutions"] for row in rounds))
    data.set_title("solutions in $D_i$", fontsize="small")
    data.legend(loc="lower right", fontsize="x-small", frameon=True)
    for panel in axes.flat:
        panel.grid(axis="x", visible=False)
    for panel in axes[1]:
        panel.set_xlabel("round")
    return figure


# First results


def plot_seeds(accuracies: Mapping[str, Sequence[float]], *, y: str) -> Figure:
    """Show the accuracy of each stage of training, one line a seed.

    Args:
        accuracies: Stage to one value a seed; one value alone is that of all seeds.
        y: What is shown.
    """
    figure, axes = new_figure()
    seeds = max(map(len, accuracies.values()))
    columns = [
        list(values) * seeds if len(values) == 1 else list(values)
        for values in accuracies.values()
    ]
    for seed, path in enumerate(zip(*columns, strict=True)):
        marker = "os^Dv"[seed % 5]
        axes.plot(path, marker=marker, color=MUTED, linewidth=1, label=f"seed {seed}")
    for i, values in enumerate(columns):
        mean = sum(values) / seeds
        axes.plot([i - 0.2, i + 0.2], [mean, mean], color=INK, linewidth=3)
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(i + 0.24, mean, f"{mean:.1%}", va="center", bbox=ground)
    axes.set_xticks(range(len(columns)), list(accuracies))
    axes.set_xlim(-0.5, len(columns) - 0.3)
    axes.set_ylim(0, 1.1 * max(map(max, columns)) or 1)
    axes.set_ylabel(y)
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper right", ncols=seeds)
    return figure


def plot_rollouts(
    paths: Mapping[str, Mapping[int, float]], *, y: str, mean: str = "mean"
) -> Figure:
    """Show accuracy against the rollouts that it took, one line a run.

    Args:
        paths: Name of a run to rollouts so far to accuracy; all with the same rollouts.
        y: What is shown.
        mean: What the mean of the runs is called.
    """
    figure, axes = new_figure()
    for i, (name, path) in enumerate(paths.items()):
        axes.plot(
            list(path),
            list(path.values()),
            marker="os^Dv"[i % 5],
            markersize=5,
            color=MUTED,
            linewidth=1,
            label=name,
        )
    at = list(next(iter(paths.values())))
    means = [sum(path[x] for path in paths.values()) / len(paths) for x in at]
    axes.plot(at, means, color=COLORS["expert_iteration"], linewidth=3, label=mean)
    axes.set_xticks(at, [f"{x:,}" for x in at])
    highest = max(max(path.values()) for path in paths.values())
    axes.set_ylim(0, 1.1 * highest or 1)
    axes.set_xlabel("rollouts used in training")
    axes.set_ylabel(y)
    figure.legend(loc="outside upper right", ncols=len(paths) + 1)
    return figure


# Proximal policy optimisation


def plot_bias_variance(
    lambdas: Sequence[float],
    bias: Mapping[str, Sequence[float]],
    variance: Mapping[str, Sequence[float]],
) -> Figure:
    """Show bias and variance of a gradient over lambda, a line a value function."""
    figure, (left, right) = new_figure(1, 2, height=3.4)
    for axes, series, y in (
        (left, bias, "bias, relative to the gradient"),
        (right, variance, "variance, relative to REINFORCE"),
    ):
        for (name, numbers), marker in zip(series.items(), "os^Dv", strict=False):
            axes.plot(lambdas, numbers, marker=marker, markersize=4, label=name)
        axes.set_xlabel(r"$\lambda$")
        axes.set_title(y)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    figure.legend(
        handles=left.lines, loc="outside lower center", ncols=3, fontsize="small"
    )
    return figure


def draw_clip(
    ratios: Sequence[float], surrogate: Mapping[float, Sequence[float]], clip: float
) -> Figure:
    """Draw the clipped surrogate over the ratio, a panel an advantage.

    Args:
        ratios: Where the surrogate was computed, ascending.
        surrogate: For an advantage of each sign, its value at each ratio.
        clip: Epsilon.
    """
    figure, panels = new_figure(1, len(surrogate), height=3.0, squeeze=False)
    for axes, (advantage, values) in zip(panels.flat, surrogate.items(), strict=True):
        plain = [ratio * advantage for ratio in ratios]
        axes.plot(ratios, plain, "--", color=MUTED, label="not clipped")
        axes.plot(ratios, values, color=COLORS["ppo"], linewidth=2.6, label="clipped")
        flat = (1 + clip, ratios[-1]) if advantage > 0 else (ratios[0], 1 - clip)
        axes.axvspan(*flat, facecolor="#e4e6e9", hatch="///", edgecolor="white")
        axes.plot(1, advantage, "o", color=INK, label="before the first update")
        axes.set_title(f"advantage {advantage:+g}")
        axes.set_xlabel(r"ratio $\rho$")
        axes.set_xticks([ratios[0], 1 - clip, 1, 1 + clip, ratios[-1]])
    panels.flat[0].set_ylabel("surrogate")
    figure.legend(handles=panels.flat[0].lines, loc="outside lower center", ncols=3)
    return figure


def plot_phases(
    phases: Sequence[Mapping[str, float]],
    titles: Mapping[str, str],
    healthy: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Show what each phase of PPO logged (``Trained.phases``), a panel a metric.

    Args:
        phases: One row a phase; a metric may be missing from some.
        titles: Metric to the title of its panel.
        healthy: Metric to the range that is drawn as a green band.
    """
    rows = -(-len(titles) // 3)
    figure, grid = new_figure(
        rows, 3, height=1.6 * rows + 0.3, sharex=True, squeeze=False
    )
    panels = list(grid.flat)
    for axes, (name, title) in zip(panels, titles.items(), strict=False):
        at = [row["phase"] for row in phases if name in row]
        values = [row[name] for row in phases if name in row]
        axes.plot(at, values, color=COLORS["ppo"], marker="o", markersize=3)
        axes.set_title(title, fontsize="small")
        low, high = axes.get_ylim()
        if healthy and name in healthy:
            axes.axhspan(*healthy[name], facecolor="#d8efe5", zorder=0)
        room = 0.05 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 0.01
        axes.set_ylim(min(low, min(values) - room), max(high, max(values) + room))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(labelsize="x-small")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[len(titles) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(titles) - 3) : len(titles)]:  # lowest of a column
        axes.set_xlabel("phase")
        axes.tick_params(labelbottom=True)
    return figure


# Rewards and exploration


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
    _label_tokens(panels.flat[-1], pieces)
    return figure


def plot_panels(
    panels: Mapping[str, Mapping[str, Mapping[float, float]]],
    *,
    x: str,
    columns: int = 2,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Draw the same few lines in several panels.

    Args:
        panels: Title of a panel to name of a line to x to y. A line keeps its colour,
            marker and dash from panel to panel.
        x: What the x axes have in common.
        columns: Panels side by side.
    """
    rows = -(-len(panels) // columns)
    figure, grid = new_figure(
        rows, columns, height=2.5 * rows + 0.6, sharex=True, squeeze=False
    )
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    drawn = {}
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, points in lines.items():
            i = names.index(name)
            (drawn[name],) = axes.plot(
                list(points),
                list(points.values()),
                ("-", "--", "-.", ":")[i % 4],
                marker="os^Dv"[i % 5],
                markersize=4,
                markevery=max(1, len(points) // 12),
                color=(colors or {}).get(name, PALETTE[i % len(PALETTE)]),
                label=name,
            )
        axes.set_title(title, fontsize="small")
        whole = all(float(at).is_integer() for line in lines.values() for at in line)
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)
        )
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel(x)
    handles = [drawn[name] for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(names)))
    return figure


def plot_draws(
    scores: Sequence[float], draws: Mapping[str, Sequence[int]], *, x: str, y: str
) -> Figure:
    """Show how often each question was drawn, over its score, a panel a sampler."""
    figure, panels = new_figure(1, len(draws), sharey=True, squeeze=False)
    for i, (axes, (name, counts)) in enumerate(
        zip(panels.flat, draws.items(), strict=True)
    ):
        axes.plot(scores, counts, "os^Dv"[i % 5], color=PALETTE[i], alpha=0.55)
        axes.set_title(name, fontsize="small")
        axes.set_xlabel(x)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    most = max(max(counts) for counts in draws.values())
    panels.flat[0].set_ylim(-0.05 * most, 1.1 * most)
    panels.flat[0].set_ylabel(y)
    return figure


# The reward model


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
        marker = "os^Dv"[i % 5]
        axes.plot(scores, marker=marker, markersize=3.5, color=COLORS["orm"])
        axes.axhline(0.5, color=MUTED, linewidth=1, linestyle="--")
        for t, piece in enumerate(pieces):
            if "\n" in piece:
                axes.axvline(t, color=MUTED, linewidth=0.8, linestyle=":")
        _label_tokens(axes, pieces)
        axes.set_ylim(0, 1)
        axes.set_title(title, fontsize="small")
        axes.set_ylabel("score")
        axes.grid(axis="x", visible=False)
    return figure


def plot_calibration(curves: Mapping[str, Sequence[Bin]]) -> Figure:
    """Show the share that is right over the score, a line a set of samples."""
    figure, axes = new_figure(height=3.8)
    axes.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1)
    axes.annotate("as promised", (0.9, 0.92), color=MUTED, fontsize="small", ha="right")
    for i, (name, curve) in enumerate(curves.items()):
        right = [b.right.mean for b in curve]
        axes.errorbar(
            [b.score for b in curve],
            right,
            yerr=[
                [b.right.mean - b.right.low for b in curve],
                [b.right.high - b.right.mean for b in curve],
            ],
            fmt=("-", ":", "-.")[i % 3],
            marker="os^Dv"[i % 5],
            markersize=5,
            capsize=3,
            elinewidth=1,
            color=PALETTE[(-1 - i) % len(PALETTE)],
            label=name,
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("mean score of the range")
    axes.set_ylabel("share that is right")
    figure.legend(loc="outside upper right", ncols=len(curves))
    return figure


# Return-conditioned RL


def draw_layout(
    prompt: Sequence[str],
    response: Sequence[str],
    labels: Mapping[int, str],
    *,
    width: int = 84,
) -> Figure:
    """Draw a labelled solution token by token: what is read, what is learned.

    Args:
        prompt: The decoded tokens of the prompt, without boxes.
        response: The decoded tokens of the response; all but labels are learned.
        labels: Place in ``response`` to the name of the label that stands there.
        width: Characters in a line.
    """
    spelled = [labels.get(i, text) for i, text in enumerate(token_labels(response))]
    shown = [*token_labels(prompt), *spelled]
    places, lines = _places([*prompt, *response], shown, width)
    figure, axes = new_figure(height=0.26 * lines + 0.6)
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(lines, 0)
    learned = {"facecolor": "#d6e6f4", "edgecolor": "#6b8299", "linewidth": 0.6}
    given = {"facecolor": "white", "edgecolor": INK, "linewidth": 1.4}
    for n, (text, (x, y)) in enumerate(zip(shown, places, strict=True)):
        is_prompt, is_label = n < len(prompt), n - len(prompt) in labels
        if not is_prompt:
            style = given if is_label else learned
            axes.add_patch(Rectangle((x, y + 0.08), len(text), 0.84, **style))
        axes.text(
            x + len(text) / 2,
            y + 0.52,
            text,
            ha="center",
            va="center",
            color=MUTED if is_prompt else INK,
            weight="bold" if is_label else "normal",
            family="monospace",
            fontsize=7.2,
        )
    keys = [
        Rectangle((0, 0), 1, 1, label=label, **style)
        for label, style in (("learned", learned), ("label: read, not learned", given))
    ]
    figure.legend(handles=keys, loc="outside lower left", ncols=2)
    return figure


def plot_accuracies(
    accuracies: Mapping[str, Interval], colors: Mapping[str, str], *, x: str
) -> Figure:
    """Show the accuracy of a few policies with its interval, a row each.

    Args:
        accuracies: Name of a policy to its accuracy, from the top down.
        colors: Name to colour.
        x: What the accuracy is.
    """
    figure, axes = new_figure(height=0.42 * len(accuracies) + 0.8)
    for row, (name, accuracy) in enumerate(accuracies.items()):
        axes.plot([accuracy.low, accuracy.high], [row, row], color=colors[name])
        axes.plot(accuracy.mean, row, "osD^v"[row % 5], color=colors[name])
        axes.annotate(
            f"{accuracy.mean:.1%}",
            (accuracy.mean, row),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize="x-small",
        )
    axes.set_yticks(range(len(accuracies)), list(accuracies))
    axes.set_ylim(len(accuracies) - 0.5, -0.6)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(x)
    return figure

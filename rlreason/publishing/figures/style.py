"""The style that all figures share, and the pieces that several are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

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
    "reinforce": "#6c0aff",
    "rloo": "#1d8aa5",
    "grpo": "#6b5f2e",
}
"""The colour of each method, the same in every figure."""

RIGHT, WRONG = "#007f5f", "#c2410c"
PALETTE = tuple(COLORS[m] for m in ("sft", "expert_iteration", "ppo", "rcrl", "orm"))
"""For series that are no methods, in this order."""

MARKERS = "os^Dv"
PROMPT = {"facecolor": "#d7dce2"}
RESPONSE = {"facecolor": COLORS["sft"]}
WASTE = {"facecolor": "white", "hatch": "////", "edgecolor": "#9aa3ad"}
"""How prompts, responses and computed padding are drawn, as boxes."""

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


def label_tokens(axes: Axes, pieces: Sequence[str]) -> None:
    """Write the tokens along the x axis, every n-th where they are too many."""
    every = -(-len(pieces) // 70)
    places = range(0, len(pieces), every)
    axes.set_xticks(places, token_labels(pieces[::every]), rotation=90)
    axes.tick_params(axis="x", labelsize="x-small")
    axes.set_xlim(-0.5, len(pieces) - 0.5)


def place_tokens(
    pieces: Sequence[str], shown: Sequence[str], width: int
) -> tuple[list[tuple[float, int]], int]:
    """Return column and line of each token, in characters, and the number of lines."""
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


def color_of(arm: str) -> str:
    """The colour of the method that an arm of the catalogue is of: PPO's by default.

    >>> color_of("expert-iteration-base") == COLORS["expert_iteration"]
    True
    """
    kind = arm.partition("-")[0]
    return COLORS.get({"expert": "expert_iteration"}.get(kind, kind), COLORS["ppo"])


def look(
    i: int, name: str = "", colors: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Marker, colour and label of the i-th of several series."""
    color = (colors or {}).get(name, PALETTE[i % len(PALETTE)])
    return {"marker": MARKERS[i % len(MARKERS)], "color": color, "label": name}


def error_bars(
    axes: Axes, at: Sequence[float], intervals: Sequence[Interval], **line: Any
) -> None:
    """Draw means with their intervals; ``line`` goes to ``Axes.errorbar``."""
    means = [interval.mean for interval in intervals]
    below = [interval.mean - interval.low for interval in intervals]
    above = [interval.high - interval.mean for interval in intervals]
    line = {"markersize": 5, "capsize": 3, "elinewidth": 1} | line
    axes.errorbar(at, means, yerr=[below, above], **line)


def key(figure: Figure, kinds: Mapping[str, Mapping[str, Any]], place: str) -> None:
    """Explain what boxes mean: name to how such a box is drawn."""
    handles = [Rectangle((0, 0), 1, 1, label=name, **kw) for name, kw in kinds.items()]
    figure.legend(handles=handles, loc=f"outside {place}", ncols=len(kinds))


def write_tokens(
    axes: Axes,
    shown: Sequence[str],
    places: Sequence[tuple[float, int]],
    boxes: Sequence[Mapping[str, Any] | None],
    *,
    bold: Sequence[bool] | None = None,
) -> None:
    """Write tokens at their places, each in a box drawn so, or without one."""
    bold = bold or [False] * len(shown)
    for text, (x, y), box, is_bold in zip(shown, places, boxes, bold, strict=True):
        if box is not None:
            axes.add_patch(Rectangle((x, y + 0.08), len(text), 0.84, **box))
        axes.text(
            x + len(text) / 2,
            y + 0.52,
            text,
            ha="center",
            va="center",
            color=MUTED if box is None else INK,
            weight="bold" if is_bold else "normal",
            family="monospace",
            fontsize=7.2,
        )


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    *,
    bend: float = 0.0,
) -> None:
    """Draw an arrow of a diagram, with a text over its middle."""
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


def box(
    axes: Axes,
    at: tuple[float, float],
    text: str,
    *,
    size: tuple[float, float] = (1.44, 0.68),
    color: str = COLORS["sft"],
) -> None:
    """Draw a box of a diagram, with its text, around a point."""
    (x, y), (width, height) = at, size
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.05",
            facecolor="#eef3f8",
            edgecolor=color,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize="small")

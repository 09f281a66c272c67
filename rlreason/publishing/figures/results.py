"""Plots of results: accuracies, losses and what else is measured, as lines and bars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlreason.evaluation.intervals import Interval
from rlreason.publishing.figures.style import (
    COLORS,
    INK,
    MUTED,
    error_bars,
    look,
    new_figure,
)

DASHES = ("-", "--", "-.", ":")


def plot_panels(
    panels: Mapping[str, Mapping[str, Mapping[float, float]]],
    *,
    x: str,
    columns: int = 2,
    colors: Mapping[str, str] | None = None,
    ticks: Mapping[float, str] | None = None,
    **axes_settings: Any,
) -> Figure:
    """Draw the same few lines in several panels.

    Args:
        panels: Title of a panel to name of a line to x to y. A line keeps its colour,
            marker and dash from panel to panel.
        x: What the x axes have in common.
        columns: Panels side by side.
        ticks: Place on the x axes to what stands there; chosen by the values if None.
        axes_settings: For ``plt.subplots``, e.g. ``sharey``.
    """
    rows = -(-len(panels) // columns)
    size = {"height": 2.5 * rows + 0.6, "sharex": True, "squeeze": False}
    figure, grid = new_figure(rows, columns, **size | axes_settings)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    drawn = {}
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, line in lines.items():
            i = names.index(name)
            (drawn[name],) = axes.plot(
                list(line),
                list(line.values()),
                DASHES[i % len(DASHES)],
                markersize=4,
                markevery=max(1, len(line) // 12),
                **look(i, name, colors),
            )
        axes.set_title(title, fontsize="small")
        whole = all(float(at).is_integer() for line in lines.values() for at in line)
        axes.xaxis.set_major_locator(
            MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)
        )
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel(x)
    handles = [drawn[name] for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(names)))
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
        error_bars(axes, at, list(intervals.values()), **look(i, name, colors))
    if logarithmic:
        axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{at:g}" for at in xs])
    axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.legend(loc="outside upper right", ncols=len(series))
    return figure


def plot_accuracies(
    accuracies: Mapping[str, Interval],
    colors: Mapping[str, str],
    *,
    x: str,
    differences: bool = False,
) -> Figure:
    """Show the accuracy of a few policies with its interval, a row each.

    Args:
        accuracies: Name of a policy to its accuracy, from the top down.
        colors: Name to colour.
        x: What the accuracy is.
        differences: Whether they are of accuracies: in points, with a line at 0.
    """
    figure, axes = new_figure(height=0.42 * len(accuracies) + 0.8)
    if differences:
        axes.axvline(0, color=INK, linewidth=0.8)
    for row, (name, accuracy) in enumerate(accuracies.items()):
        axes.plot([accuracy.low, accuracy.high], [row, row], color=colors[name])
        axes.plot(accuracy.mean, row, "osD^v"[row % 5], color=colors[name])
        axes.annotate(
            f"{100 * accuracy.mean:+.1f}" if differences else f"{accuracy.mean:.1%}",
            (accuracy.mean, row),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize="x-small",
        )
    axes.set_yticks(range(len(accuracies)), list(accuracies))
    axes.set_ylim(len(accuracies) - 0.5, -0.6)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(points if differences else PercentFormatter(1))
    axes.set_xlabel(x)
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
            color=look(i, name, colors)["color"],
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


def plot_training(
    losses: Mapping[str, Sequence[float]], rates: Sequence[float]
) -> Figure:
    """Show the loss of each update of each run, and the learning rate they share."""
    figure, (top, bottom) = new_figure(
        2, height=4.2, sharex=True, gridspec_kw={"height_ratios": [3, 1]}
    )
    for i, (name, values) in enumerate(losses.items()):
        updates = range(1, len(values) + 1)
        top.plot(updates, values, DASHES[i % len(DASHES)], label=name, linewidth=1.3)
    top.set_ylabel("loss (nats a token)")
    top.legend()
    bottom.plot(range(1, len(rates) + 1), rates, color=MUTED)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("update")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return figure


def plot_coverage(
    shares: Mapping[str, Mapping[int, Interval]],
    chance: Mapping[str, Mapping[int, Interval]],
    *,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Show what share of a policy's solutions k samples of another have, by k.

    Args:
        shares: What is covered by what, to k to share (``experiments.coverage``).
        chance: The same of a policy by itself, which are drawn as bands: what lies in
            a band is covered as well as the policy's own solutions are.
        colors: Of both.
    """
    figure, axes = new_figure(height=3.6)
    for i, (name, intervals) in enumerate(chance.items()):
        style = look(len(shares) + i, name, colors) | {"linestyle": DASHES[1 + i]}
        draw_band(axes, intervals, **style)
    gap = 0.06  # of the points of one k, in powers of two
    for i, (name, intervals) in enumerate(shares.items()):
        shift = 2 ** ((i - (len(shares) - 1) / 2) * gap)
        at = [k * shift for k in intervals]
        error_bars(axes, at, list(intervals.values()), **look(i, name, colors))
    samples_axis(axes, {k for line in shares.values() for k in line})
    axes.set_ylim(top=1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("solutions covered")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def plot_pass_curves(
    curves: Mapping[str, Mapping[int, Interval]],
    differences: Mapping[str, Mapping[int, Interval]],
    *,
    against: str,
    solutions: bool = False,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Show pass@k of some policies, and below it how far each is ahead of one of them.

    Args:
        curves: Name of a policy to k to pass@k.
        differences: The same names without ``against``, to k to the paired difference.
        against: With which of them the others are compared.
        solutions: Whether it is not pass@k but the distinct solutions among k samples.
    """
    figure, (top, bottom) = new_figure(
        2, height=4.6, sharex=True, gridspec_kw={"height_ratios": [3, 2]}
    )
    for i, (name, intervals) in enumerate(curves.items()):
        style = look(i, name, colors) | {"linestyle": DASHES[i % len(DASHES)]}
        draw_band(top, intervals, **style)
        if name in differences:
            draw_band(bottom, differences[name], **style)
    bottom.axhline(0, color=INK, linewidth=1)
    if solutions:
        top.set_yscale("log", base=2)
        top.yaxis.set_major_formatter("{x:g}")
        bottom.yaxis.set_major_formatter(lambda x, _: points(x / 100))
    else:
        top.yaxis.set_major_formatter(PercentFormatter(1))
        bottom.yaxis.set_major_formatter(points)
    top.set_ylabel("distinct right\nsolutions" if solutions else "pass@k")
    bottom.set_ylabel(f"{'more than' if solutions else 'points above'}\n{against}")
    samples_axis(bottom, next(iter(curves.values())))
    handles, names = top.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(curves))
    return figure


def plot_steps(
    panels: Mapping[str, Mapping[str, tuple[Interval, Interval]]],
    *,
    x: str,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Show how far each of some policies is from another one in two metrics at once.

    Args:
        panels: What is up the axis, to name of a policy to both differences, that along
            the axis first.
        x: What is along the axis.
    """
    figure, grid = new_figure(1, len(panels), height=3.8, sharey=True, squeeze=False)
    names = list(dict.fromkeys(name for found in panels.values() for name in found))
    drawn = {}
    for axes, (y, found) in zip(grid.flat, panels.items(), strict=True):
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axvline(0, color=INK, linewidth=0.8)
        for name, (across, up) in found.items():
            style = look(names.index(name), name, colors)
            drawn[name] = axes.errorbar(
                across.mean,
                up.mean,
                xerr=[[across.mean - across.low], [across.high - across.mean]],
                yerr=[[up.mean - up.low], [up.high - up.mean]],
                linestyle="none",
                elinewidth=0.9,
                **style,
            )
        axes.xaxis.set_major_formatter(points)
        axes.yaxis.set_major_formatter(points)
        axes.set_title(y, fontsize="small")
        axes.set_xlabel(x)
    handles = [drawn[name] for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def draw_band(axes: Axes, intervals: Mapping[int, Interval], **line: Any) -> None:
    """Draw means as a line and their intervals as a band; ``line`` goes to ``plot``."""
    at = list(intervals)
    axes.plot(at, [each.mean for each in intervals.values()], markersize=4, **line)
    low, high = zip(
        *((each.low, each.high) for each in intervals.values()), strict=True
    )
    axes.fill_between(at, low, high, color=line["color"], alpha=0.15, linewidth=0)


def points(share: float, _: int | None = None) -> str:
    """A tick's label where shares differ, in percentage points.

    >>> points(-0.05), points(0.0)
    ('-5', '0')
    """
    return f"{100 * share:+g}" if share else "0"


def samples_axis(axes: Axes, ks: Iterable[int]) -> None:
    """Let the x axis be the number of samples, in powers of two."""
    axes.set_xscale("log", base=2)
    ks = sorted(ks)
    some = ks[:-1] if len(ks) < 7 else [k for k in ks[:-1:2] if 2 * k <= ks[-1]]
    shown = [*some, ks[-1]]
    axes.set_xticks(shown, [f"{k:,}" for k in shown])
    axes.minorticks_off()
    axes.set_xlabel("samples a question, k")


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
        name = f"seed {seed}"
        axes.plot(path, linewidth=1, **look(seed, name, {name: MUTED}))
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


def plot_rollouts(paths: Mapping[str, Mapping[int, float]], *, y: str) -> Figure:
    """Show accuracy against the rollouts that it took, one line a run.

    Args:
        paths: Name of a run to rollouts so far to accuracy. The mean is taken where
            all runs have looked.
        y: What is shown.
    """
    figure, axes = new_figure()
    for i, (name, path) in enumerate(paths.items()):
        run = look(i, name, {name: MUTED})
        axes.plot(list(path), list(path.values()), markersize=5, linewidth=1, **run)
    shared = sorted(set.intersection(*map(set, paths.values())))
    means = [sum(path[x] for path in paths.values()) / len(paths) for x in shared]
    axes.plot(
        shared, means, color=COLORS["expert_iteration"], linewidth=3, label="mean"
    )
    at = sorted(set().union(*paths.values()))
    axes.set_xticks(at, [f"{x:,}" for x in at])
    highest = max(max(path.values()) for path in paths.values())
    axes.set_ylim(0, 1.1 * highest or 1)
    axes.set_xlabel("rollouts used in training")
    axes.set_ylabel(y)
    figure.legend(loc="outside upper right", ncols=len(paths) + 1)
    return figure


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

"""Drawings of ideas: what a method does, shown on a toy or without any numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlreason.evaluation.classifier import Bin
from rlreason.evaluation.intervals import Interval
from rlreason.publishing.figures.style import (
    COLORS,
    INK,
    MUTED,
    PALETTE,
    WRONG,
    arrow,
    box,
    count_bars,
    error_bars,
    look,
    new_figure,
)


def draw_loop() -> Figure:
    """Draw the loop that all methods share: question, samples, reward, update."""
    figure, axes = new_figure(width=7.0, height=2.5)
    axes.set_axis_off()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 3.4)
    boxes = (
        ((1.0, 2.5), "question"),
        ((3.6, 2.5), "policy"),
        ((6.3, 2.5), "K solutions"),
        ((9.0, 2.5), "reward"),
        ((6.3, 0.6), "update"),
    )
    for at, text in boxes:
        box(axes, at, text, size=(1.6, 0.76))
    arrow(axes, (1.9, 2.5), (2.7, 2.5), "prompt")
    arrow(axes, (4.5, 2.5), (5.4, 2.5), "sample")
    arrow(axes, (7.2, 2.5), (8.1, 2.5), "check")
    arrow(axes, (9.0, 2.05), (7.2, 0.6), bend=-0.3)
    arrow(axes, (5.4, 0.6), (3.6, 2.05), bend=-0.3)
    axes.text(8.75, 0.95, "what is\npaid", ha="left", va="center", color=MUTED)
    axes.text(3.75, 0.95, "new\nweights", ha="right", va="center", color=MUTED)
    return figure


def draw_expert_iteration() -> Figure:
    """Draw the five steps of a round, and where base and data come in."""
    figure, axes = new_figure(height=2.7)
    axes.set_axis_off()
    axes.set_xlim(0, 10.4)
    axes.set_ylim(0, 3.4)
    steps = ("sample", "filter", "de-duplicate", "grow", "distil")
    for i, name in enumerate(steps):
        box(axes, (1.2 + 2 * i, 2.2), f"{i + 1}  {name}")
    passed_on = ("rollouts", "right ones", "new ones", "$D_i$")
    for i, name in enumerate(passed_on):
        arrow(axes, (2.0 + 2 * i, 2.2), (2.4 + 2 * i, 2.2))
        axes.text(2.2 + 2 * i, 1.55, name, ha="center", color=MUTED, fontsize="small")
    box(axes, (7.2, 0.6), "$D_{i-1}$", color=MUTED)
    arrow(axes, (7.2, 1.02), (7.2, 1.75))
    box(axes, (9.2, 0.6), "base", color=MUTED)
    arrow(axes, (9.2, 1.02), (9.2, 1.75))
    arrow(axes, (9.2, 2.65), (1.2, 2.65), bend=0.1)
    text = r"the new policy $\pi_i$ samples in the next round"
    axes.text(5.2, 3.25, text, ha="center", color=MUTED, fontsize="small")
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
        arrow(axes, (i + 0.5, u), (i + 0.5, 0.0))
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


def draw_coverage(intervals: Sequence[Interval], truth: float, y: str) -> Figure:
    """Draw many intervals for one number, those that miss it with a cross."""
    figure, axes = new_figure(height=2.8)
    for i, interval in enumerate(intervals):
        missed = interval.excludes(truth)
        error_bars(
            axes,
            [i],
            [interval],
            marker="x" if missed else "o",
            markersize=6 if missed else 4,
            color=WRONG if missed else COLORS["sft"],
        )
    axes.axhline(truth, color=INK, linewidth=1, linestyle="--")
    axes.set_xticks([])
    axes.set_xlabel("test sets of the same size")
    axes.set_ylabel(y)
    return figure


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
        for i, (name, numbers) in enumerate(series.items()):
            axes.plot(lambdas, numbers, markersize=4, **look(i, name))
        axes.set_xlabel(r"$\lambda$")
        axes.set_title(y)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    figure.legend(
        handles=left.lines, loc="outside lower center", ncols=3, fontsize="small"
    )
    return figure


def plot_draws(
    scores: Sequence[float], draws: Mapping[str, Sequence[int]], *, x: str, y: str
) -> Figure:
    """Show how often each question was drawn, over its score, a panel a sampler."""
    figure, panels = new_figure(1, len(draws), sharey=True, squeeze=False)
    for i, (axes, (name, counts)) in enumerate(
        zip(panels.flat, draws.items(), strict=True)
    ):
        axes.plot(scores, counts, linestyle="", alpha=0.55, **look(i))
        axes.set_title(name, fontsize="small")
        axes.set_xlabel(x)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    most = max(max(counts) for counts in draws.values())
    panels.flat[0].set_ylim(-0.05 * most, 1.1 * most)
    panels.flat[0].set_ylabel(y)
    return figure


def plot_calibration(curves: Mapping[str, Sequence[Bin]]) -> Figure:
    """Show the share that is right over the score, a line a set of samples."""
    figure, axes = new_figure(height=3.8)
    axes.plot([0, 1], [0, 1], "--", color=MUTED, linewidth=1)
    axes.annotate("as promised", (0.9, 0.92), color=MUTED, fontsize="small", ha="right")
    for i, (name, curve) in enumerate(curves.items()):
        error_bars(
            axes,
            [b.score for b in curve],
            [b.right for b in curve],
            fmt=("-", ":", "-.")[i % 3],
            **look(i, name, {name: PALETTE[(-1 - i) % len(PALETTE)]}),
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("mean score of the range")
    axes.set_ylabel("share that is right")
    figure.legend(loc="outside upper right", ncols=len(curves))
    return figure

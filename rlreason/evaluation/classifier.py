"""Evaluate a classifier by its scores: does it rank, and do its probabilities hold?

=========================  ==========================================================
function                   the question it answers
=========================  ==========================================================
``auc``                    how often does a right sample score above a wrong one?
``auc_interval``           how sure is that, over other questions?
``auc_within``             does it, among samples of *one* question?
``calibration_curve``      of what scores 0.8, are 80% right?
``calibration_error``      by how much are they off, on average?
=========================  ==========================================================

Written for the outcome reward model; it reads numbers and labels, whoever gave
them. A good ranking with poor calibration is enough for reranking, and is not
enough for a threshold.

Left out: precision and recall at a threshold, and recalibration.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlreason.evaluation.intervals import TAILS, Interval, wilson_interval

Array = NDArray[np.float64]

_BLOCK = 4_000_000  # weights held at once, 32 MB


@dataclass(frozen=True, slots=True)
class Bin:
    """The samples whose scores fall into one range.

    Attributes:
        low: Lower end of the range, included.
        high: Upper end, excluded but for 1.
        score: Their mean score: what was promised.
        right: The share that is right, with Wilson's interval: what came true. The
            interval takes samples for independent; those of one question are not.
    """

    low: float
    high: float
    score: float
    right: Interval


def auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Chance that a right sample scores above a wrong one; a tie counts one half.

    The area under the ROC curve, as the Mann-Whitney statistic. Equal scores say
    nothing, and give 0.5 in whatever order they stand.

    Args:
        scores: (N,), higher means more likely right.
        labels: (N,), true where right.

    Raises:
        ValueError: One class is missing, or a score is NaN or infinite.

    >>> auc([0.9, 0.4, 0.4, 0.1], [True, True, False, False])
    0.875
    """
    scores, labels = _checked(scores, labels)
    return float(_weighted_auc(scores, labels, np.ones((1, len(scores))))[0])


def auc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    questions: Sequence[Hashable],
    *,
    resamples: int = 1000,
) -> Interval:
    """``auc`` with a percentile bootstrap over questions (Efron, 1979).

    Whole questions are drawn, since samples of one question are alike. Draws without
    one of the classes have no AUC and are passed over. Classes that do not overlap at
    all give an interval of no width, which says too much.

    Args:
        scores: As in ``auc``.
        labels: As in ``auc``.
        questions: (N,), which question each sample answers.
    """
    scores, labels = _checked(scores, labels)
    if len(questions) != len(scores):
        raise ValueError(f"{len(questions)} questions for {len(scores)} scores")
    numbers = {question: i for i, question in enumerate(dict.fromkeys(questions))}
    group = np.array([numbers[question] for question in questions])
    generator, n = np.random.default_rng(0), len(numbers)
    rows, drawn = max(1, _BLOCK // len(scores)), []
    for done in range(0, resamples, rows):
        times = generator.multinomial(
            n, np.full(n, 1 / n), size=min(rows, resamples - done)
        )  # (R, questions)
        drawn.append(_weighted_auc(scores, labels, times[:, group]))
    low, high = np.nanquantile(np.concatenate(drawn), TAILS)
    mean = auc(scores, labels)
    return Interval(mean, float(low), float(high), n, "bootstrap over questions")


def auc_within(
    scores: ArrayLike, labels: ArrayLike, questions: Sequence[Hashable]
) -> dict[Hashable, float]:
    """``auc`` among the samples of each question that has both kinds, by question.

    What reranking needs: it chooses among the samples of one question. A classifier
    that knows only how hard a question is has an ``auc`` well above one half, and 0.5
    here. A question solved always or never has no value. The interval of their mean is
    over questions, ``intervals.bootstrap_interval(list(values.values()))``.

    Args:
        scores: As in ``auc``.
        labels: As in ``auc``.
        questions: (N,), which question each sample answers.

    Raises:
        ValueError: No question has both right and wrong samples; or as ``auc``.

    >>> auc_within([0.9, 0.8, 0.2, 0.1], [True, True, True, False], "aabb")
    {'b': 1.0}
    """
    scores, labels = _checked(scores, labels)
    members: dict[Hashable, list[int]] = {}
    for i in range(len(scores)):
        members.setdefault(questions[i], []).append(i)
    within = {
        question: auc(scores[rows], labels[rows])
        for question, rows in members.items()
        if labels[rows].min() < labels[rows].max()
    }
    if not within:
        raise ValueError(
            f"none of the {len(members)} questions has both right and wrong samples, "
            "so there is nothing to tell apart within one; give more samples a question"
        )
    return within


def calibration_curve(
    scores: ArrayLike, labels: ArrayLike, *, bins: int = 10
) -> list[Bin]:
    """Mean score and share of right samples, in ranges of equal width that hold any.

    Args:
        scores: (N,), probabilities.
        labels: (N,), true where right.
        bins: How many ranges [0, 1] is cut into.

    Raises:
        ValueError: A score is no probability, or there are none.
    """
    scores, labels = _checked(scores, labels, both=False)
    if bins < 1:
        raise ValueError(f"bins={bins}: cut [0, 1] into at least one range")
    if scores.min() < 0 or scores.max() > 1:
        raise ValueError(
            "calibration is of probabilities; some score is outside [0, 1]"
        )
    place = np.minimum((scores * bins).astype(int), bins - 1)  # (N,), 1.0 in the last
    curve = []
    for b in np.unique(place):
        inside = place == b
        right = wilson_interval(float(labels[inside].sum()), int(inside.sum()))
        mean = float(scores[inside].mean())
        curve.append(Bin(float(b / bins), float((b + 1) / bins), mean, right))
    return curve


def calibration_error(scores: ArrayLike, labels: ArrayLike, *, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3): mean gap of the curve.

    Each range counts by the samples in it. Chance alone makes the error positive, by
    about the half-width of the ranges' intervals, so small samples look worse.

    >>> calibration_error([0.75, 0.75, 0.75, 0.75], [True, True, True, False])
    0.0
    """
    curve = calibration_curve(scores, labels, bins=bins)
    gaps = [b.right.n * abs(b.right.mean - b.score) for b in curve]
    return sum(gaps) / sum(b.right.n for b in curve)


def classification_metrics(
    scores: ArrayLike, labels: ArrayLike, questions: Sequence[Hashable]
) -> dict[str, float]:
    """AUC with its 95% interval, and the calibration error, of held-out samples."""
    interval = auc_interval(scores, labels, questions)
    return {
        "auc": interval.mean,
        "auc_low": interval.low,
        "auc_high": interval.high,
        "calibration_error": calibration_error(scores, labels),
    }


def _weighted_auc(scores: Array, labels: Array, weights: NDArray) -> Array:
    """AUC of R sets, in each of which sample i stands ``weights[r, i]`` times: (R,)"""
    order = np.argsort(scores, kind="stable")
    starts = np.unique(scores[order], return_index=True)[1]  # of runs of equal scores
    right = np.add.reduceat((weights * labels)[:, order], starts, axis=1)  # (R, U)
    wrong = np.add.reduceat((weights * (1 - labels))[:, order], starts, axis=1)
    below = wrong.cumsum(axis=1) - wrong / 2  # wrong ones below, and half of the ties
    pairs = right.sum(axis=1) * wrong.sum(axis=1)
    won = (right * below).sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _checked(
    scores: ArrayLike, labels: ArrayLike, *, both: bool = True
) -> tuple[Array, Array]:
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(labels, dtype=np.float64)
    if scores.ndim != 1 or not len(scores) or scores.shape != labels.shape:
        raise ValueError(
            f"one label a score and at least one, not shapes {scores.shape} and "
            f"{labels.shape}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("labels are true or false, or 1 and 0")
    if both and labels.min() == labels.max():
        raise ValueError(
            f"all {len(labels)} samples are {'right' if labels[0] else 'wrong'}, so "
            "there is nothing to tell apart; evaluate on more questions or samples"
        )
    return scores, labels

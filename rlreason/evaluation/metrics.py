"""What K samples of one question are worth: pass@k, maj@k, rerank@k.

From n samples of a question each metric is the *expectation over all subsets of k* of
them, computed exactly, without drawing a subset:

==========  ===================================================  =====================
metric      a subset of k samples counts as right when           cost
==========  ===================================================  =====================
pass@k      any of its answers is right                          one division
maj@k       the right answer has the most votes                  a polynomial product
rerank@k    its best-scored answer is right                      one sort
==========  ===================================================  =====================

All three are unbiased for the metric at k samples, and at k = n they are the plain
metric of the n samples. Ties (equal votes, equal scores) are broken by a fair draw,
whose expectation is taken as well. Nothing here is random.

Against the paper: it reports k = n = 96 alone; its rule for ties is not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import comb, isnan

import numpy as np
from numpy.typing import NDArray

from rlreason.tasks.answers import canonical_number

MAX_SAMPLES = 1000  # C(n, n/2) of more samples than 1029 is no 64-bit float

Array = NDArray[np.float64]


@lru_cache(maxsize=2**16)  # of thousands of samples most solutions are seen a few times
def pass_at_k(n: int, c: int, k: int) -> float:
    r"""Chance that k of n samples, c of them correct, hold a correct one.

    .. math:: 1 - \binom{n-c}{k} \Big/ \binom{n}{k}

    Chen et al. (2021), equation 1. The naive :math:`1-(1-c/n)^k` draws with replacement
    and is too low: 0.634 for 1 correct of 96 at k = 96, where the truth is 1.

    >>> pass_at_k(96, 1, 96)
    1.0
    >>> pass_at_k(4, 1, 2)
    0.5
    """
    _check_k(n, k)
    if not 0 <= c <= n:
        raise ValueError(f"{c} correct of {n} samples is not possible")
    return 1.0 - comb(n - c, k) / comb(n, k)


def known_from_question(n: int, correct: Sequence[int]) -> float:
    r"""Share of the variance of right and wrong that the question alone decides.

    An answer to a random question is right with the chance p of its question. What a
    predictor explains that knows every p, and nothing of the answer, is

    .. math:: \mathrm{Var}(p) \Big/ \big(\bar p (1 - \bar p)\big)

    the intraclass correlation. :math:`p^2` is estimated by two samples of a question,
    :math:`\bar p^2` by one each of two questions. Both are without bias; their quotient
    has one of the order of one over the number of questions.

    Args:
        n: Samples of each question, two or more.
        correct: How many of them are right, for each of two or more questions.

    Returns:
        At most 1. Below 0 by chance; NaN where all samples are right, or all wrong.

    >>> known_from_question(2, [2, 0])
    1.0
    >>> known_from_question(2, [1, 1])
    -1.0
    """
    c = np.asarray(correct, dtype=float)  # (Q,)
    if n < 2 or len(c) < 2:
        raise ValueError(f"{n} samples of {len(c)} questions: two of two are needed")
    if not ((c >= 0) & (c <= n)).all():
        raise ValueError(f"{min(c):g} to {max(c):g} correct of {n} samples is no count")
    p = c / n
    mean = p.mean()
    across = (p.sum() ** 2 - (p**2).sum()) / (len(c) * (len(c) - 1))
    within = (c * (c - 1)).mean() / (n * (n - 1))
    if not 0 < mean < 1:
        return float("nan")
    return float((within - across) / (mean - across))


def maj_at_k(answers: Sequence[str | None], gold: str, k: int) -> float:
    """Chance that the vote of k of the n answers is won by ``gold``.

    Votes go to numbers, not strings: "42", "42.0" and "$42" are one answer. None, and
    what is not a number, has no vote, so it never outvotes a number; a subset without
    any vote is wrong. Where several answers lead, each wins with the same chance.

    >>> maj_at_k(["7", "7.0", None, None, None], "7", 5)
    1.0
    >>> maj_at_k(["7", "8", None], "7", 3)
    0.5
    """
    _check_k(len(answers), k)
    return float(maj_curve(answers, gold)[k - 1])


def rerank_at_k(scores: Sequence[float], correct: Sequence[bool], k: int) -> float:
    r"""Chance that the best-scored of k of the n samples is correct.

    The sample of rank i (1 is best) is the best of
    :math:`\binom{n-i}{k-1}` of the :math:`\binom{n}{k}` subsets. Samples with equal
    scores share their chances. NaN ranks below every number, minus infinity too.

    >>> rerank_at_k([0.9, 0.1, float("nan")], [True, False, False], 1)
    0.3333333333333333
    """
    n = len(scores)
    if len(correct) != n:
        raise ValueError(f"{n} scores for {len(correct)} samples")
    _check_k(n, k)
    ranked = sorted(
        (_descending(s), bool(c)) for s, c in zip(scores, correct, strict=True)
    )
    groups: dict[tuple[bool, float], list[bool]] = {}
    for score, right in ranked:
        groups.setdefault(score, []).append(right)
    expected, below = 0.0, n
    for _, group in sorted(groups.items()):
        # Subsets whose best is in the group: those of the group and below, less those
        # of below alone
        chance = (comb(below, k) - comb(below - len(group), k)) / comb(n, k)
        expected += chance * sum(group) / len(group)
        below -= len(group)
    return min(expected, 1.0)  # rounding may leave it an ulp above


def maj_curve(answers: Sequence[str | None], gold: str) -> Array:
    """maj@k for k = 1 to n at once, shape (n,); ``maj_at_k`` reads one value of it.

    Every subset in which gold gets m votes is counted by a product over the other
    answers: an answer given c times takes v < m votes in C(c, v) ways, or ties with m
    votes in C(c, m) ways. As polynomials in x (size of the subset) and y (number of
    ties), a term with t ties is worth 1 / (t + 1), and m runs over gold's votes. All
    terms are positive, so 64-bit floats keep 12 digits.
    """
    n = len(answers)
    if n > MAX_SAMPLES:
        raise ValueError(f"maj@k counts subsets of at most {MAX_SAMPLES}, not {n}")
    gold_votes, rivals, without_vote = _count_votes(answers, gold)
    wins = np.zeros(n + 1)  # by size of the subset
    for m in range(1, gold_votes + 1):
        serious = [c for c in rivals if c >= m]
        harmless = sum(c for c in rivals if c < m) + without_vote
        ways = _ways_against(serious, m, n + 1)
        ways = np.convolve(ways, _binomials(harmless))[: n + 1 - m]
        wins[m:] += float(comb(gold_votes, m)) * ways
    # Rounding may leave a certain win an ulp above 1, which is no probability
    return np.minimum(wins[1:] / _binomials(n)[1:], 1.0)


def _ways_against(rivals: Sequence[int], m: int, width: int) -> Array:
    """Ways in which no rival exceeds m votes, by the sum of their votes: (width,)

    Each way counts 1 / (ties + 1). The table (ties, votes) is kept flat, a tie being
    ``width`` places on, so that a product of polynomials in x and y is one convolution;
    rows never run into each other, since all rivals together have less than width.
    """
    ways = np.zeros((len(rivals) + 1) * width)
    ways[0] = 1.0
    for i, c in enumerate(rivals):
        reached = ways[: (i + 1) * width]
        below = np.convolve(reached, _binomials(c)[:m])[: len(ways)]
        tied = float(comb(c, m)) * reached
        ways[: len(below)] = below
        start = width + m
        ways[start : start + len(tied)] += tied[: len(ways) - start]
    table = ways.reshape(-1, width)
    return (table / np.arange(1, len(table) + 1)[:, None]).sum(axis=0)


def _count_votes(
    answers: Sequence[str | None], gold: str
) -> tuple[int, list[int], int]:
    """Votes for gold, votes of each other answer, number of samples without a vote."""
    right = canonical_number(gold)
    if right is None:
        raise ValueError(f"the reference answer {gold!r} is not a number")
    numbers = (None if a is None else canonical_number(a) for a in answers)
    votes = Counter(numbers)
    without_vote = votes.pop(None, 0)
    return votes.pop(right, 0), sorted(votes.values()), without_vote


@lru_cache(maxsize=MAX_SAMPLES + 1)
def _binomials(n: int) -> Array:
    """C(n, 0) to C(n, n), the coefficients of (1 + x)^n. Read-only, being shared."""
    row = np.array([float(comb(n, v)) for v in range(n + 1)])
    row.flags.writeable = False
    return row


def _descending(score: float) -> tuple[bool, float]:
    """Sort key: high scores first, NaN last, and all NaN equal."""
    score = float(score)
    return (True, 0.0) if isnan(score) else (False, -score)


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(
            f"k = {k} of n = {n} samples: k must be between 1 and n; draw more samples "
            "or lower k"
        )

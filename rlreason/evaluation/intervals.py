"""How sure a number is: 95% intervals over problems, over seeds, and over both.

=========================  ==========================================================
function                   the question it answers
=========================  ==========================================================
``bootstrap_interval``     this policy, other problems of the same kind
``accuracy_interval``      the same, for scores in [0, 1], sound at 0 and 1 as well
``wilson_interval``        the same, for a count of successes
``paired_interval``        one policy against another on the same problems
``seed_interval``          the same problems, other seeds of the training
``hierarchical_interval``  other seeds and other problems
=========================  ==========================================================

A table of one trained policy carries the second, a claim about an algorithm the last.
Everything random draws from a generator of its own, made from ``seed``.

Left out: corrections for looking at many comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

TAILS = 0.025, 0.975


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the interval around it.

    Attributes:
        mean: The mean of the values themselves, not of resamples.
        low: Lower end; minus infinity where the data cannot bound it (one seed).
        high: Upper end; plus infinity likewise.
        n: Number of independent units: problems, or seeds where seeds were given.
        method: How the ends were found, in words.
        dof: Degrees of freedom of Student's t; None where the ends are not by it.
    """

    mean: float
    low: float
    high: float
    n: int
    method: str
    dof: float | None = None

    def p_value(self, value: float) -> float:
        """Two-sided p of ``value`` by the t that made the ends; 1 without one."""
        half = max(self.high - self.mean, self.mean - self.low)  # one may be cut off
        if self.dof is None or not 0 < half < math.inf:
            return 1.0
        error = half / t_quantile(TAILS[1], self.dof)
        return 2 * (1 - t_cdf(abs(self.mean - value) / error, self.dof))

    def excludes(self, value: float) -> bool:
        """True where ``value`` lies outside; on an end it is not excluded."""
        return not self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def verdict(change: Interval, more: str = "a gain", less: str = "a loss") -> str:
    """Say what a difference comes to: inconclusive where its interval holds 0."""
    if not change.excludes(0):
        return "inconclusive"
    return more if change.mean > 0 else less


def bootstrap_interval(
    values: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean of one value a problem (Efron, 1979).

    Values that are all equal give an interval of no width, which says too much: use
    ``accuracy_interval`` for scores in [0, 1].
    """
    values = _vector(values)
    mean, n = float(values.mean()), len(values)
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    low, high = np.quantile(values[drawn].mean(axis=1), TAILS)
    return Interval(mean, float(low), float(high), n, "bootstrap over problems")


def accuracy_interval(values: ArrayLike, *, seed: int = 0) -> Interval:
    """Bootstrap for scores in [0, 1]; Wilson where they are all equal.

    No resample of 20 failures holds a success, yet the policy may have some. Wilson's
    interval still has a width there, and a mean of equal scores between 0 and 1 varies
    no more than a proportion does.
    """
    values = _vector(values)
    if values.min() < 0 or values.max() > 1:
        raise ValueError("scores of an accuracy lie between 0 and 1")
    if values.min() == values.max():
        return wilson_interval(float(values.sum()), len(values))
    return bootstrap_interval(values, seed=seed)


def wilson_interval(successes: float, n: int) -> Interval:
    """Wilson's (1927) interval for a proportion: those p that a z-test does not reject.

    >>> print(wilson_interval(0, 20))
    0.000 [0.000, 0.161]
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is no proportion")
    z = NormalDist().inv_cdf(TAILS[1])
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # The ends meet 0 and 1 exactly in theory, and within rounding here
    low, high = min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p)
    return Interval(p, low, high, n, "Wilson")


def paired_interval(before: ArrayLike, after: ArrayLike, *, seed: int = 0) -> Interval:
    """Bootstrap of the mean difference ``after - before`` over the same problems.

    Pairing removes what the problems have in common, so it is narrower than the two
    intervals apart would suggest. Both are one value a problem, in one order.
    """
    before, after = _vector(before), _vector(after)
    if before.shape != after.shape:
        raise ValueError(
            f"{len(before)} values before and {len(after)} after cannot be paired"
        )
    return bootstrap_interval(after - before, seed=seed)


def seed_interval(values: Sequence[float]) -> Interval:
    """Student's t interval over seeds, one value a seed.

    It holds for these problems; that others would score otherwise is not in it. One
    seed says nothing about others: the interval is then unbounded.
    """
    seeds = _vector(values)
    mean, n, method = float(seeds.mean()), len(seeds), "t over seeds"
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n, method)
    half = t_quantile(TAILS[1], n - 1) * float(seeds.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n, method, n - 1)


def hierarchical_interval(values: ArrayLike) -> Interval:
    r"""t interval over seeds and problems at once, from a (seeds, problems) table.

    Every seed is evaluated on the same problems, so both are random and crossed. With
    mean squares of seeds, problems and what is left over, S seeds and P problems,

    .. math:: \widehat{\mathrm{Var}} = (MS_s + MS_p - MS_r) / SP,

    and the degrees of freedom are Satterthwaite's (1946), at least S - 1. A bootstrap
    over 3 seeds misses a third of their variance and knows no t: where training varies
    much it covered 91% in simulation, nominally 95%, and this interval 94 to 98%.
    One seed bounds nothing: the interval is then unbounded.

    For a difference between two algorithms give the table of differences.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise ValueError(
            f"a table (seeds, problems) of at least 2 problems, not {table.shape}"
        )
    if not np.isfinite(table).all():
        raise ValueError("values hold NaN or infinity")
    seeds, problems = table.shape
    mean, method = float(table.mean()), "t over seeds and problems"
    if seeds == 1:
        return Interval(mean, -math.inf, math.inf, seeds, method)
    by_seed, by_problem = table.mean(axis=1), table.mean(axis=0)
    rest = table - by_seed[:, None] - by_problem + mean
    freedom = np.array([seeds - 1, problems - 1, (seeds - 1) * (problems - 1)])
    squares = np.array(
        [
            problems * ((by_seed - mean) ** 2).sum(),
            seeds * ((by_problem - mean) ** 2).sum(),
            (rest**2).sum(),
        ]
    )
    ms_seed, ms_problem, ms_rest = mean_squares = squares / freedom
    # Left over variance above that of seeds or problems is chance: do not subtract it
    total = max(ms_seed + ms_problem - ms_rest, ms_seed, ms_problem)
    spread = float((mean_squares**2 / freedom).sum())
    dof = max(total**2 / spread, seeds - 1) if spread else seeds - 1
    half = t_quantile(TAILS[1], dof) * math.sqrt(total / table.size)
    return Interval(mean, mean - half, mean + half, seeds, method, float(dof))


def t_quantile(p: float, dof: float) -> float:
    """The p-quantile, 0.5 <= p < 1, of Student's t with ``dof`` >= 1, by bisection.

    >>> round(t_quantile(0.975, 2), 4)
    4.3027
    """
    if not (0.5 <= p < 1 and dof >= 1):
        raise ValueError(f"no t quantile for p = {p} and {dof} degrees of freedom")
    if dof > 1e5:
        return NormalDist().inv_cdf(p)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        theta = (low + high) / 2
        if t_cdf(math.sqrt(dof) * math.tan(theta), dof) < p:
            low = theta
        else:
            high = theta
    return math.sqrt(dof) * math.tan(low)


def t_cdf(t: float, dof: float) -> float:
    r"""Student's t distribution at ``t`` >= 0.

    With :math:`t = \sqrt\nu \tan\theta` it is an integral of
    :math:`\cos^{\nu-1}\theta`, smooth enough for Gauss-Legendre.

    >>> round(t_cdf(4.3027, 2), 4)
    0.975
    """
    if dof > 1e5:
        return NormalDist().cdf(t)
    nodes, weights = _legendre(200)
    logs = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - 0.5 * math.log(math.pi)
    theta = math.atan(t / math.sqrt(dof))
    powers = np.cos(theta * (nodes + 1) / 2) ** (dof - 1)
    return min(1.0, 0.5 + math.exp(logs) * theta / 2 * float(weights @ powers))


@lru_cache(maxsize=1)
def _legendre(degree: int) -> tuple[Array, Array]:
    """Nodes and weights of Gauss-Legendre, which take longer than all their uses."""
    return np.polynomial.legendre.leggauss(degree)


def _vector(values: ArrayLike) -> Array:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"one value a unit and at least one, not shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError("values hold NaN or infinity")
    return vector

"""Does RL find what SFT does not? The paper's own explanation, measured.

Havrilla et al. (2024) conclude that RL explores little beyond what the supervised
policy already produces. Five questions put that to the test, on the samples that
``solutions`` counts:

======================  ==============================================================
``coverage``            what share of one policy's correct solutions k samples of
                        another one have; both ways round
``own_coverage``        the same of a policy and itself: what chance leaves uncovered;
                        ``beyond_own`` is the difference of what the two leave
``pass_curve``          pass@k, ``pass_differences`` between two policies, and the
                        ``crossing`` of two curves
``distinct_curve``      distinct correct solutions a question in k samples, and
                        ``distinct_differences`` between two policies
``novelty``             solutions that another policy lacks, less what chance does
``variety``             distinct solutions among equally many *right* answers of two
======================  ==============================================================

Who is right more often has more right answers among as many samples, and for that alone
more solutions, rare ones too. ``novelty`` and ``variety`` therefore compare as many
right answers of both.

Every number comes with an interval: over problems where there is one seed of training,
over seeds and problems where there are several. Policies are given as one ``Solutions``
a seed, and pairs are of one seed.

Two samples of two policies must be independent. The sampler gives the same random
numbers to all policies, so that one seed draws from similar policies the same answers,
and one policy would cover another completely by being alike: each policy has a stream
of its own here.

Left out: whether a correct answer was reached by correct steps. Among 1,536 samples
some hit the number by luck, and each by other operations: pass@k at large k, and the
count of distinct solutions, have them in. With m = 1 they hardly weigh in ``coverage``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlreason.evaluation.diversity import (
    Counts,
    Solutions,
    count_solutions,
    distinct_at_k,
    repeated_at_k,
    shared_at_k,
)
from rlreason.evaluation.evaluate import Sampler
from rlreason.evaluation.intervals import (
    Interval,
    accuracy_interval,
    bootstrap_interval,
    hierarchical_interval,
    wilson_interval,
)
from rlreason.evaluation.metrics import pass_at_k
from rlreason.policy.labels import answer_groups
from rlreason.policy.load import Policy
from rlreason.tasks.problem import Problem

if TYPE_CHECKING:  # they know of this module
    from rlreason.experiments.measures import Context, Subject
    from rlreason.experiments.rows import Row

Array = NDArray[np.float64]
Seeds = Sequence[Solutions]
"""The solutions of one policy, one a seed of training."""

SCALE, PROBLEMS = 16, 50  # times the K of the evaluation: 1,536; of how many problems


def powers_to(samples: int) -> list[int]:
    """The k of a curve: powers of two, and the number of samples itself.

    >>> powers_to(6)
    [1, 2, 4, 6]
    """
    return [2**i for i in range(samples.bit_length()) if 2**i < samples] + [samples]


# --- Sampling -------------------------------------------------------------------------


def solutions(
    context: Context,
    subject: Subject,
    policy: Policy,
    *,
    sampler: Sampler = answer_groups,
) -> dict[str, Any]:
    """Count the correct solutions of a subject's policy: a measure of the catalogue.

    Drawn at the temperature of the evaluation. SFT gets twice the samples, which
    ``own_coverage`` divides into two.

    Args:
        sampler: As in ``evaluate``.

    Returns:
        ``Solutions.to_dict``, which ``read_solutions`` reads.
    """
    recipe = context.sampled_recipe(subject)
    chosen = recipe.evaluation
    limit = min(PROBLEMS, chosen.sampled_problems or PROBLEMS)
    found = draw_solutions(
        policy,
        recipe.task.load("test", limit),
        samples=SCALE * chosen.k * (2 if subject.arm.step == "sft" else 1),
        stream=f"{subject.arm.name} {subject.seed}",
        sampler=sampler,
        temperature=chosen.temperature,
        max_new_tokens=recipe.max_new_tokens,
        label=subject.label,
        shots=recipe.shot_problems() if subject.prompted else (),
    )
    return found.to_dict()


def read_solutions(rows: Mapping[int, Row]) -> list[Solutions]:
    """What ``solutions`` measured, one a seed; see ``Records.of``."""
    return [Solutions(**rows[seed].values) for seed in sorted(rows)]


def draw_solutions(
    policy: Policy,
    problems: Sequence[Problem],
    *,
    samples: int,
    stream: str,
    sampler: Sampler = answer_groups,
    **settings: Any,
) -> Solutions:
    """Sample a policy and count its correct solutions; no answer is kept.

    Args:
        stream: Names the random numbers; one of its own for every policy that is to be
            compared with others.
        sampler: As in ``evaluate``.
        settings: What the sampler takes beside these.
    """
    seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big")
    groups = sampler(policy, problems, k=samples, seed=seed, **settings)
    found = {problems[i].id: count_solutions(problems[i], g) for i, g in groups}
    return Solutions(samples, {problem.id: found[problem.id] for problem in problems})


# --- The questions --------------------------------------------------------------------


def pass_curve(each: Seeds, ks: Sequence[int]) -> dict[int, Interval]:
    """pass@k at each k, unbiased."""
    return {k: _interval(_pass_table(each, k), bounded=True) for k in ks}


def pass_differences(
    before: Seeds, after: Seeds, ks: Sequence[int]
) -> dict[int, Interval]:
    """pass@k of ``after`` less that of ``before``, paired by problem and seed."""
    _check_pairs(before, after)
    return {k: _interval(_pass_table(after, k) - _pass_table(before, k)) for k in ks}


def distinct_curve(each: Seeds, ks: Sequence[int]) -> dict[int, Interval]:
    """Distinct correct solutions a question among k samples."""
    return {k: _interval(_distinct_table(each, k)) for k in ks}


def distinct_differences(
    before: Seeds, after: Seeds, ks: Sequence[int], *, times: int = 1
) -> dict[int, Interval]:
    """``distinct_curve`` of ``after`` less that of ``before``, paired likewise.

    Args:
        times: How often a solution has to be seen among the k to be counted: what is
            seen once may have been lucky.
    """
    _check_pairs(before, after)
    pairs = {k: [_distinct_table(x, k, times) for x in (after, before)] for k in ks}
    return {k: _interval(a - b) for k, (a, b) in pairs.items()}


def variety(one: Seeds, other: Seeds, *, right: int) -> Interval | None:
    """Distinct solutions of ``one`` among so many right answers, less ``other``'s.

    Of the problems that both solve so often with every seed, paired by problem and
    seed; None where there are fewer than two.
    """
    _check_pairs(one, other)
    tables = []
    for a, b in zip(one, other, strict=True):
        pairs = [[[*s.counts[p].values()] for s in (a, b)] for p in a.counts]
        tables.append([_of_right(*pair, right=right) for pair in pairs])
    table = np.array(tables)
    often = table[:, ~np.isnan(table).any(axis=0)]
    return _interval(often) if often.shape[1] > 1 else None


def _of_right(one: Sequence[int], other: Sequence[int], *, right: int) -> float:
    """Distinct in so many right answers of one, less the other; NaN where too few."""
    if min(sum(one), sum(other)) < right:
        return math.nan
    first, second = (distinct_at_k(c, sum(c), right) for c in (one, other))
    return first - second


def coverage(
    of: Seeds, by: Seeds, ks: Sequence[int], *, m: int = 96
) -> dict[int, Interval]:
    """Share of the correct solutions in m samples of ``of`` that k of ``by`` have.

    It is a ratio of means over problems, so that a problem weighs by the solutions that
    it has. With m = 1 it is the chance that a correct answer of ``of`` is by a solution
    that ``by`` has: what ``of`` is likely to do. The larger m, the more its rare
    solutions count.
    """
    _check_pairs(of, by)
    whole = _distinct_table(of, m)
    return {k: _share(_shared_table(of, by, m, k), whole) for k in ks}


def own_coverage(each: Seeds, ks: Sequence[int], *, m: int = 96) -> dict[int, Interval]:
    """``coverage`` of a policy by k other samples of its own, of at least m + k."""
    whole = _distinct_table(each, m)
    return {k: _share(_repeated_table(each, m, k), whole) for k in ks}


def beyond_own(of: Seeds, by: Seeds, *, m: int, k: int) -> Interval:
    """What k of ``by`` leave uncovered of ``of``, less what they leave of ``by``.

    ``own_coverage`` less ``coverage``, paired by problem and seed: above 0 where ``of``
    has more of its own than chance leaves.
    """
    _check_pairs(of, by)
    itself = _ratio(_repeated_table(by, m, k), _distinct_table(by, m))
    covered = _ratio(_shared_table(of, by, m, k), _distinct_table(of, m))
    return _interval(itself - covered)


def novelty(of: Seeds, by: Seeds, *, m: int, k: int, as_right: bool = True) -> Interval:
    """Solutions a question, of m samples of ``of``, that are new to k of ``by``.

    Less those by chance, which m samples of ``by``, who has m + k, have beyond k of its
    own: paired by problem.

    Args:
        as_right: Whether to compare as many right answers: of a problem, who is right
            more often has fewer of its m samples counted, so that both are expected to
            hold as many right ones.
    """
    _check_pairs(of, by)
    options = {"m": m, "k": k, "as_right": as_right}
    pairs = list(zip(of, by, strict=True))
    return _interval(
        np.array([[_novel(a, b, p, **options) for p in a.counts] for a, b in pairs])
    )


def _novel(
    of: Solutions, by: Solutions, problem: str, *, m: int, k: int, as_right: bool
) -> float:
    """``novelty`` of a seed and a problem."""
    counts, theirs = of.counts[problem], by.counts[problem]

    def new(m: int) -> float:
        sizes = {"n_of": of.samples, "m": m, "n_by": by.samples, "k": k}
        whole = distinct_at_k([*counts.values()], of.samples, m)
        return whole - shared_at_k(counts, theirs, **sizes)

    def by_chance(m: int) -> float:
        whole = distinct_at_k([*theirs.values()], by.samples, m)
        return whole - repeated_at_k(theirs, n=by.samples, m=m, k=k)

    rates = (sum(c.values()) / s.samples for c, s in ((counts, of), (theirs, by)))
    ours, chance = _as_right(m, *rates) if as_right else (m, m)
    return _between(new, ours) - _between(by_chance, chance)


def _as_right(m: int, *rates: float) -> list[float]:
    """How many of m samples of each policy are to hold as many right ones."""
    return [m * (min(rates) / rate) if rate else 0.0 for rate in rates]


def _between(curve: Callable[[int], float], at: float) -> float:
    """A curve over whole numbers, straight between them; 0 at 0."""
    low = math.floor(at)
    ends = [curve(n) if n else 0.0 for n in ((low, low + 1) if at > low else (low,))]
    return ends[0] + (ends[-1] - ends[0]) * (at - low)


@dataclass(frozen=True)
class Crossing:
    """From how many samples on one policy stays ahead of another, up to ``up_to``.

    Attributes:
        at: Of the curves as measured; infinite where it is not ahead at ``up_to``.
        low, high: 95% of the resamples.
    """

    at: float
    low: float
    high: float
    up_to: int

    def __str__(self) -> str:
        at, low, high = (
            f"{k:.0f}" if math.isfinite(k) else f"none up to {self.up_to:,}"
            for k in (self.at, self.low, self.high)
        )
        return f"{at} [{low}, {high}]"


def crossing(before: Seeds, after: Seeds, ks: Sequence[int]) -> Crossing:
    """Where the pass@k of ``before`` overtakes that of ``after`` for good.

    Problems are drawn with replacement, and seeds of training where there are several:
    of three seeds that says too little. Between two k the difference is taken to be
    straight in log k.
    """
    _check_pairs(before, after)
    differences = np.stack(
        [_pass_table(after, k) - _pass_table(before, k) for k in ks], axis=-1
    )  # (seeds, problems, ks)
    generator = np.random.default_rng(0)
    by_seed, by_problem = (
        generator.multinomial(n, [1 / n] * n, size=2000) / n
        for n in differences.shape[:2]
    )  # (2000, seeds) and (2000, problems), weights that add to 1
    curves = np.einsum("rs,rp,spk->rk", by_seed, by_problem, differences, optimize=True)
    at = _overtaken(differences.mean((0, 1))[None], ks)[0]
    found = _overtaken(curves, ks)
    # No interpolation, which infinity cannot bear
    low, high = np.quantile(found, [0.025, 0.975], method="inverted_cdf")
    return Crossing(float(at), float(low), float(high), max(ks))


def _overtaken(curves: Array, ks: Sequence[int]) -> Array:
    """From which k on each of the curves (n, ks) is below 0: (n,), infinity for none.

    >>> _overtaken(np.array([[1.0, -1.0], [-1.0, -1.0], [1.0, 0.0]]), [1, 4]).tolist()
    [2.0, 1.0, inf]
    """
    logs = np.log(ks)
    found = np.full(len(curves), np.inf)
    for row, curve in enumerate(curves):
        ahead = np.flatnonzero(curve >= 0)
        last = ahead[-1] if len(ahead) else -1
        if last == -1:
            found[row] = ks[0]
        elif last < len(ks) - 1:
            part = curve[last] / (curve[last] - curve[last + 1])
            found[row] = math.exp(logs[last] + part * (logs[last + 1] - logs[last]))
    return found


# --- Tables and intervals -------------------------------------------------------------


def _table(each: Seeds, value: Callable[[Solutions, Counts], float]) -> Array:
    """A number for each seed and problem: (seeds, problems)"""
    return np.array([[value(s, counts) for counts in s.counts.values()] for s in each])


def _pass_table(each: Seeds, k: int) -> Array:
    return _table(each, lambda s, c: pass_at_k(s.samples, sum(c.values()), k))


def _distinct_table(each: Seeds, k: int, times: int = 1) -> Array:
    options = {"k": k, "times": times}
    return _table(each, lambda s, c: distinct_at_k([*c.values()], s.samples, **options))


def _repeated_table(each: Seeds, m: int, k: int) -> Array:
    return _table(each, lambda s, c: repeated_at_k(c, n=s.samples, m=m, k=k))


def _shared_table(of: Seeds, by: Seeds, m: int, k: int) -> Array:
    return np.array(
        [
            [
                shared_at_k(
                    counts, b.counts[p], n_of=a.samples, m=m, n_by=b.samples, k=k
                )
                for p, counts in a.counts.items()
            ]
            for a, b in zip(of, by, strict=True)
        ]
    )


def _check_pairs(first: Seeds, second: Seeds) -> None:
    problems = {tuple(solutions.counts) for solutions in (*first, *second)}
    if len(first) != len(second) or len(problems) != 1:
        raise ValueError(
            f"{len(first)} seeds and {len(second)}, on {len(problems)} lists of "
            "problems, cannot be paired: give as many seeds of each, on the same ones"
        )


def _interval(table: Array, *, bounded: bool = False) -> Interval:
    """Of the mean of (seeds, problems); over problems alone where there is one seed.

    Args:
        bounded: Whether it is of shares, which lie between 0 and 1.
    """
    if len(table) > 1:
        found = hierarchical_interval(table)
        if not bounded:
            return found
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
    return (accuracy_interval if bounded else bootstrap_interval)(table[0])


def _share(part: Array, whole: Array) -> Interval:
    r"""The ratio of two means over (seeds, problems), and its interval.

    By the delta method: :math:`R + (x - R y) / \bar y` has the ratio R as its mean, and
    varies as R does. Where all problems have one ratio, which is most often 1, Wilson.

    Raises:
        ValueError: The whole is nothing.
    """
    around = _ratio(part, whole)
    ratio = float(around.mean())
    if np.abs(around - ratio).max() < 1e-12:
        n = int(whole.any(axis=0).sum())
        return wilson_interval(min(ratio, 1.0) * n, n)
    found = _interval(around)
    low, high = max(found.low, 0.0), min(found.high, 1.0)
    return replace(
        found, mean=ratio, low=low, high=high, method=f"ratio, {found.method}"
    )


def _ratio(part: Array, whole: Array) -> Array:
    """A table (seeds, problems) whose mean is the ratio, and which varies as that does.

    Raises:
        ValueError: The whole is nothing.
    """
    if not whole.any():
        raise ValueError("no correct solution in any problem: there is no share of it")
    ratio = part.mean() / whole.mean()
    return ratio + (part - ratio * whole) / whole.mean()

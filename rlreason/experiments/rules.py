"""Rules of claims: small functions of the records that give effects with intervals.

An ``Effect`` is a number with its interval and the range in which a claim expects it;
without a range it is told beside, and not judged. "No better" is a range too: an effect
of less than ``MARGIN`` counts as none, since no interval shows that an effect is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, log10
from typing import Literal

import numpy as np

from rlreason.evaluation.diversity import Solutions
from rlreason.evaluation.intervals import Interval, seed_interval
from rlreason.experiments.coverage import (
    SCALE,
    beyond_own,
    coverage,
    pass_differences,
    read_solutions,
    variety,
)
from rlreason.experiments.records import (
    Cell,
    Records,
    ends,
    in_points,
    interval_of,
    looks_of,
)
from rlreason.experiments.rows import Row

Verdict = Literal["supported", "contradicted", "inconclusive"]
Range = tuple[float, float]
MARGIN = 0.02  # two points
NEAR = 0.95  # of the best accuracy
RIGHT = 16  # answers of each policy, among which solutions are counted
ABOVE_0, BELOW_0 = (0.0, inf), (-inf, 0.0)
NO_HIGHER, NO_LOWER = (-inf, MARGIN), (-MARGIN, inf)
DISTINCT = "distinct"
NO_OTHER = "another"


@dataclass(frozen=True)
class Effect:
    """What a claim is about, as measured.

    Attributes:
        name: What it is of, in words.
        interval: None where it is not recorded.
        expected: The range, ends excluded, in which the claim expects it; None: told
            beside, and not judged.
        unit: What it is: a difference of shares, a share, or another number.
    """

    name: str
    interval: Interval | None
    expected: Range | None
    unit: Literal["points", "share", "number"] = "points"

    @property
    def verdict(self) -> Verdict | None:
        """By the whole interval; an end on the range's end decides nothing."""
        if self.expected is None:
            return None
        low, high = self.expected
        if self.interval is None:
            return "inconclusive"
        if low < self.interval.low and self.interval.high < high:
            return "supported"
        if self.interval.high < low or high < self.interval.low:
            return "contradicted"
        return "inconclusive"

    @property
    def p_value(self) -> float:
        """Of its verdict, by the range's end that is nearest; 1 where it is open."""
        if self.interval is None or self.verdict not in ("supported", "contradicted"):
            return 1.0
        low, high = self.expected
        if self.verdict == "contradicted":
            return self.interval.p_value(low if self.interval.high < low else high)
        return max(self.interval.p_value(end) for end in (low, high) if isfinite(end))

    @property
    def measured(self) -> str:
        """What is ``told``, and of how many seeds it is."""
        i = self.interval
        if i is None or "seeds" not in i.method or i.n == 1:
            return self.told
        return f"{self.told}, {i.n} seeds"

    @property
    def told(self) -> str:
        """The mean with its interval, in the effect's unit."""
        i = self.interval
        if i is None:
            return "not recorded"
        said = {
            "points": in_points(i),
            "share": f"{i.mean:.1%} {ends(i, '.1%')}",
            "number": f"{i.mean:+.2f} {ends(i, '+.2f')}",
        }
        return said[self.unit]

    @property
    def wanted(self) -> str:
        """The expected range in words.

        >>> Effect("a less b", None, (-0.02, inf)).wanted
        'above -2'
        """
        if self.expected is None:
            return "not judged"
        scale, after = {"points": (100, ""), "share": (100, "%"), "number": (1, "")}[
            self.unit
        ]
        low, high = (f"{scale * end:g}{after}" for end in self.expected)
        if self.expected[1] == inf:
            return f"above {low}"
        return f"below {high}" if self.expected[0] == -inf else f"{low} to {high}"

    def __str__(self) -> str:
        expected = f"expected {self.wanted}" if self.expected else self.wanted
        return f"{self.name}: {self.measured} ({expected})"


Rule = Callable[[Records], Iterator[Effect]]
"""From the records to effects, those too that are not recorded."""


# --- Rules ----------------------------------------------------------------------------


def differ(one: Cell, other: Cell, expected: Range = ABOVE_0) -> Rule:
    """One cell less another, in pairs of seed and problem, lies in a range."""

    def rule(records: Records) -> Iterator[Effect]:
        name = records.named(f"{_called(one)} less {_called(other, one)}")
        interval = records.difference(one, other)
        unit = "number" if one.metric == DISTINCT else "points"
        yield Effect(name, interval, expected, unit)

    return rule


def _called(cell: Cell, beside: Cell | None = None) -> str:
    """A cell in words, without what it has in common with the one beside it."""
    same = beside is not None and beside.metric == cell.metric
    metric = "" if same else f" {cell.metric}"
    return f"{cell.arm}{f' of {cell.size}' if cell.size else ''}{metric}"


def arms(
    one: str, other: str, metric: str = "maj@1", expected: Range = ABOVE_0
) -> Rule:
    """One arm less another, in one metric."""
    return differ(Cell(one, metric), Cell(other, metric), expected)


def over(one: str, others: Sequence[str], metric: str, expected: Range) -> Rule:
    """One arm less each of some others."""
    return every(*(arms(one, other, metric, expected) for other in others))


def beside(rule: Rule) -> Rule:
    """The effects of a rule, told and not judged."""
    return lambda records: (replace(e, expected=None) for e in rule(records))


def by_size(
    values_of: Callable[[Records, str], dict[int, np.ndarray]],
    name: str,
    unit: Literal["points", "number"] = "number",
) -> Rule:
    """What the largest base has less what the smallest has, expected above 0.

    Args:
        values_of: Gives, of a base, one value a problem, by seed.
        name: Of the effect, with ``{large}`` and ``{small}`` for the bases. ``lost`` is
            minus a gap, so that of gaps the label is the other way round.
    """

    def rule(records: Records) -> Iterator[Effect]:
        sizes = records.size, smaller_base(records)
        large, small = (values_of(records, size) for size in sizes)
        tables = [large[s] - small[s] for s in sorted(large.keys() & small.keys())]
        label = name.format(large=sizes[0], small=sizes[1])
        interval = interval_of(np.stack(tables)) if tables else None
        yield Effect(label, interval, ABOVE_0, unit)

    return rule


def smaller_base(records: Records) -> str:
    """The base beside the largest; ``NO_OTHER``, which has no rows, if none is."""
    others = {row.size for row in records.rows} - {records.size}
    return min(others, default=NO_OTHER)


def in_small(one: str, other: str, metric: str = "maj@1") -> Rule:
    """One arm less another, both of the smaller base: told and not judged."""

    def rule(records: Records) -> Iterator[Effect]:
        if (small := smaller_base(records)) != NO_OTHER:
            pair = (Cell(arm, metric, small) for arm in (one, other))
            yield from differ(*pair)(records)

    return beside(rule)


def lost(arm: str, against: str) -> Callable[[Records, str], dict[int, np.ndarray]]:
    """How little an arm that begins without SFT is below another: minus the gap."""
    return lambda records, size: records.pairs(
        Cell(f"{arm}-base", size=size), Cell(against, size=size)
    )


def fewer_lost(arm: str, against: str) -> Rule:
    """What the smaller base is below another arm without SFT, less the larger one."""
    name = f"{arm} without SFT, points below {against}: {{small}} less {{large}}"
    return by_size(lost(arm, against), name, "points")


def best_of(row: Row) -> float:
    """The highest accuracy on validation that a run was seen at; 0 without a look."""
    return max((accuracy for _, accuracy in looks_of(row)), default=0.0)


def rollouts_to(row: Row, accuracy: float) -> int | None:
    """Rollouts until a run was first seen at such an accuracy; None: it never was."""
    return next((n for n, seen in looks_of(row) if seen >= accuracy), None)


def sooner(one: str, other: str, expected: Range) -> Rule:
    """log10 of the rollouts that one arm takes to a level, over those of another.

    The level is that near the best of the run that got less far, seed by seed: both
    were there. Near its *own* best a run that learns nothing is at once. Told no finer
    than a run looks, so the name counts the seeds that were there at their first look:
    expert iteration looks once a round, and a first round has as many rollouts with
    every seed. What a reward model learned from is not counted.
    """

    def rule(records: Records) -> Iterator[Effect]:
        a, b = records.of(one, "curve"), records.of(other, "curve")
        ratios, at_once = [], 0
        for pair in ((a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())):
            level = NEAR * min(map(best_of, pair))
            if level > 0:  # else one of them was never right
                ours, theirs = (rollouts_to(row, level) for row in pair)
                ratios.append(log10(ours / theirs))
                at_once += ours == looks_of(pair[0])[0][0]
        name = f"log10 of its rollouts to a level that both reach, {one} over {other}"
        if at_once:
            name += f" ({one} at its first look in {at_once} of {len(ratios)} seeds)"
        interval = seed_interval(ratios) if ratios else None
        yield Effect(name, interval, expected, "number")

    return rule


def covered(arm: str, by: str, expected: Range) -> Rule:
    """How likely a right answer is by a solution that another arm's samples have too.

    Of one sample, by as many of the other as were recorded of both, seed by seed.
    Beside it: what is left, less what is left of the other arm's own answers; and the
    same share where each distinct solution among 96 samples counts once.
    """

    def rule(records: Records) -> Iterator[Effect]:
        share = rest = each_once = None
        if pair := drawn(records, Cell(arm), Cell(by)):
            one, two = pair
            k = one[0].samples
            ms = 1, max(1, k // 16)
            share, each_once = (coverage(one, two, [k], m=m)[k] for m in ms)
            if two[0].samples > k:
                rest = beyond_own(one, two, m=1, k=k)
        name = f"share of {arm}'s right answers by solutions that {by} samples too"
        yield Effect(name, share, expected, "share")
        name = f"share of {arm}'s right answers that {by} lacks, less of {by}'s own"
        yield Effect(name, rest, None)
        name = f"share of {arm}'s distinct solutions that {by} has, each counted once"
        yield Effect(name, each_once, None, "share")

    return rule


def passed(arm: str, by: str) -> Rule:
    """pass@K of one arm less another, from the many samples; told and not judged.

    Of fewer problems than the tables', by ``SCALE`` times as many samples of each.
    """

    def rule(records: Records) -> Iterator[Effect]:
        k, interval = records.samples(), None
        if k and (pair := drawn(records, Cell(by), Cell(arm))):
            interval = pass_differences(*pair, [k])[k]
        name = f"{arm} less {by} pass@K, from {SCALE} times as many samples"
        yield Effect(records.named(name), interval, None)

    return rule


def as_right(arm: str, right: int = RIGHT) -> Rule:
    """``variety`` of the largest base less that of the smallest, told and not judged.

    Who is right more often has more right answers among as many samples, and more
    solutions for that alone.
    """

    def rule(records: Records) -> Iterator[Effect]:
        small = smaller_base(records)
        pair = drawn(records, Cell(arm), Cell(arm, size=small))
        name = f"{arm}, among {right} right answers, {records.size} less {small}"
        interval = variety(*pair, right=right) if pair else None
        yield Effect(name, interval, None, "number")

    return rule


def drawn(records: Records, *cells: Cell) -> list[list[Solutions]]:
    """The ``solutions`` of arms, of the seeds that all have; empty without one."""
    rows = [records.of(cell.arm, "solutions", cell.size) for cell in cells]
    seeds = set.intersection(*map(set, rows)) if rows else ()
    if not seeds:
        return []
    return [read_solutions({seed: each[seed] for seed in seeds}) for each in rows]


def every(*rules: Rule) -> Rule:
    """All of several rules."""
    return lambda records: (effect for rule in rules for effect in rule(records))

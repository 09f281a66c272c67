"""The paper's claims, and what the records say about them.

A ``Claim`` has a rule: a small function of the records that gives effects with their
intervals, each with the range in which the claim expects it. The verdict is computed:

============  ========================================================================
supported     every interval lies wholly within its range
contradicted  some interval lies wholly outside its range
inconclusive  neither, or some of it is not recorded
============  ========================================================================

Rules were written before anything was recorded. Three (sample-complexity, guidance,
reset) were changed afterwards, and one claim was divided into two; book/corrections.md
says why. "No better" is a range too: an effect of less than ``MARGIN`` counts as none,
since no interval shows that an effect is zero.

Beside what a verdict rests on a claim may tell more, by which a reader can see what it
does not say: an effect without an expected range. Those were chosen with all rows seen.

Of pass@96 on 100 problems intervals reach 2 to 4 points to each side, so that by these
rules "no higher" can hardly be supported.

A small model on another task can speak for or against a claim's direction, no more.
Left out: corrections for looking at many claims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, log10
from typing import Literal

import numpy as np

from rlreason.evaluation.diversity import Solutions
from rlreason.evaluation.intervals import Interval, seed_interval
from rlreason.experiments.coverage import (
    beyond_own,
    coverage,
    read_solutions,
    variety,
)
from rlreason.experiments.records import (
    ACCURACY,
    BEFORE,
    SCORE,
    UNKNOWN,
    Cell,
    Records,
    ends,
    in_points,
    interval_of,
    looks_of,
)
from rlreason.experiments.reported import Provenance
from rlreason.experiments.rows import Row

Verdict = Literal["supported", "contradicted", "inconclusive"]
Range = tuple[float, float]
MARGIN = 0.02  # two points
NEAR = 0.95  # of the best accuracy
RIGHT = 16  # answers of each policy, among which solutions are counted
ABOVE_0, BELOW_0 = (0.0, inf), (-inf, 0.0)
NO_HIGHER, NO_LOWER = (-inf, MARGIN), (-MARGIN, inf)


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
    def measured(self) -> str:
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


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and how it is judged.

    Attributes:
        id: Short, as in ``rlreason claims``.
        text: What the paper says.
        provenance: How sure it is that the paper says so.
        rule: How it is judged.
        shown: The table or figure of the book that shows what it rests on.
    """

    id: str
    text: str
    provenance: Provenance
    rule: Rule
    shown: str


@dataclass(frozen=True)
class Judged:
    """A claim with what the records say."""

    claim: Claim
    effects: tuple[Effect, ...]

    @property
    def verdict(self) -> Verdict:
        """Of all effects together that are judged."""
        verdicts = {effect.verdict for effect in self.effects} - {None}
        if "contradicted" in verdicts:
            return "contradicted"
        return "supported" if verdicts == {"supported"} else "inconclusive"

    @property
    def said(self) -> str:
        """The verdict; that nothing is recorded where nothing is."""
        known = any(effect.interval is not None for effect in self.effects)
        return self.verdict if known else UNKNOWN

    def lines(self) -> Iterator[dict[str, str]]:
        """An effect each, for a table; of the claim itself only the first tells."""
        claim = {
            "claim": self.claim.text,
            "known": self.claim.provenance,
            "verdict": self.said,
            "shown in": self.claim.shown,
        }
        for effect in self.effects:
            told = {"measured": effect.measured, "expected": effect.wanted}
            yield claim | {"effect": effect.name} | told
            claim = {}

    def __str__(self) -> str:
        """The claim on one line, below it its effects, and what it rests on."""
        claim = self.claim
        effects = [f"  {effect}" for effect in self.effects]
        head = f"{claim.id}: {claim.text} ({claim.provenance})"
        return "\n".join([head, *effects, f"  {self.said}; see {claim.shown}"])


def judge_claims(
    records: Records, claims: Sequence[Claim] | None = None
) -> list[Judged]:
    """Judge claims by what is recorded, in the order of the claims."""
    chosen = CLAIMS if claims is None else claims
    return [Judged(claim, tuple(claim.rule(records))) for claim in chosen]


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
    rule_of: Callable[[Records, str], dict[int, np.ndarray]],
    name: str,
    unit: Literal["points", "number"] = "number",
) -> Rule:
    """What the largest base has less what the smallest has, expected above 0.

    Args:
        rule_of: Gives, of a base, one value a problem, by seed.
        name: Of the effect, with ``{large}`` and ``{small}`` for the bases.
    """

    def rule(records: Records) -> Iterator[Effect]:
        sizes = records.size, smaller_base(records)
        large, small = (rule_of(records, size) for size in sizes)
        tables = [large[s] - small[s] for s in sorted(large.keys() & small.keys())]
        label = name.format(large=sizes[0], small=sizes[1])
        interval = interval_of(np.stack(tables)) if tables else None
        yield Effect(label, interval, ABOVE_0, unit)

    return rule


def smaller_base(records: Records) -> str:
    """The base beside the largest; "another", of which there are no rows, if none."""
    others = {row.size for row in records.rows} - {records.size}
    return min(others, default="another")


def gap_to_sft(arm: str) -> Callable[[Records, str], dict[int, np.ndarray]]:
    """How little an arm loses where it begins without SFT: minus the gap."""
    return lambda records, size: records.pairs(
        Cell(f"{arm}-base", size=size), Cell(arm, size=size)
    )


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


# --- The claims -----------------------------------------------------------------------

DISTINCT = "distinct"
EI, PPO, PASS, RERANK = "expert-iteration", "ppo", "pass@K", "rerank@K"
GUIDED = ("ppo-dense", "ppo-sparse-orm", "ppo-dense-orm")
# Not expert-iteration-orm, which is expert iteration too, nor rcrl-orm
OTHERS = ("ppo", "rcrl", *GUIDED)

CLAIMS = (
    Claim(
        "ei-best",
        "Expert iteration is best in most cases.",
        "verified",
        over(EI, OTHERS, "maj@1", ABOVE_0),
        "Table 1",
    ),
    Claim(
        "close-ends",
        "All algorithms perform alike (here: within 10 points of expert iteration).",
        "verified",
        over(EI, OTHERS, "maj@1", (-0.1, 0.1)),
        "Table 1",
    ),
    Claim(
        "ei-over-sft",
        "Expert iteration beats SFT in maj@1.",
        "second hand",
        arms(EI, "sft"),
        "Table 1",
    ),
    Claim(
        "ppo-without-sft",
        "Without SFT, PPO ends no lower than expert iteration.",
        "second hand",
        arms("ppo-base", f"{EI}-base", expected=NO_LOWER),
        "Table 2",
    ),
    Claim(
        "ei-shifted",
        "Without SFT on SVAMP, expert iteration ends above PPO.",
        "digitised",
        arms(f"{EI}-shifted", "ppo-shifted"),
        "Table 3",
    ),
    Claim(
        "sample-complexity",
        "Expert iteration and PPO take rollouts of the same order.",
        "verified",
        every(
            sooner(EI, PPO, (-1.0, 1.0)),
            sooner(f"{EI}-base", "ppo-base", (-1.0, 1.0)),
        ),
        "Figure 15.3",
    ),
    Claim(
        "both-improve",
        "RL improves maj@1 and pass@96 together; more SFT trades one for the other.",
        "verified",
        every(
            *(
                arms(arm, "sft", metric)
                for arm in (EI, PPO)
                for metric in ("maj@1", PASS)
            ),
            arms("sft", "sft-light"),
            arms("sft", "sft-light", PASS, BELOW_0),
            *(beside(arms(arm, "sft", PASS)) for arm in ("rcrl", *GUIDED)),
        ),
        "Figure 17.1",
    ),
    Claim(
        "no-new-solutions",
        "RL's pass@96 is no higher than that of light SFT.",
        "second hand",
        every(
            arms(EI, "sft-light", PASS, NO_HIGHER),
            arms(PPO, "sft-light", PASS, NO_HIGHER),
        ),
        "Table 4",
    ),
    Claim(
        "little-beyond-sft",
        "RL explores little beyond the solutions that SFT produces.",
        "verified",
        every(*(covered(arm, "sft", (0.9, inf)) for arm in (EI, PPO))),
        "Figure 17.4",
    ),
    Claim(
        "sft-gap",
        "Without SFT, RL ends less than 10 points lower; larger models lose less.",
        "verified",
        every(
            arms(EI, f"{EI}-base", expected=(-inf, 0.1)),
            arms(PPO, "ppo-base", expected=(-inf, 0.1)),
            *(
                by_size(
                    gap_to_sft(arm),
                    f"{arm}: points lost without SFT, {{small}} less {{large}}",
                    "points",
                )
                for arm in (EI, PPO)
            ),
        ),
        "Table 2",
    ),
    Claim(
        "saturation",
        "pass@96 saturates early in training.",
        "verified",
        every(
            arms(EI, f"{EI}-early", PASS, NO_HIGHER),
            arms(PPO, "ppo-early", PASS, NO_HIGHER),
            *(beside(arms(f"{arm}-early", "sft", PASS)) for arm in (EI, PPO)),
        ),
        "Figure 17.1",
    ),
    Claim(
        "guidance",
        "Dense and learned rewards are faster and end no higher than the sparse one.",
        "second hand",
        every(
            *(arms(arm, PPO, expected=NO_HIGHER) for arm in GUIDED),
            *(sooner(arm, PPO, BELOW_0) for arm in GUIDED),
        ),
        "Figure 15.5",
    ),
    Claim(
        "size-explores",
        "Larger models find more distinct solutions.",
        "second hand",
        every(
            *(
                by_size(
                    lambda records, size, arm=arm: records.values(
                        Cell(arm, DISTINCT, size)
                    ),
                    f"{arm}, distinct solutions a question, {{large}} less {{small}}",
                )
                for arm in ("sft", EI)
            ),
            *(as_right(arm) for arm in ("sft", EI)),
        ),
        "chapter 17",
    ),
    Claim(
        "light-sft-diverse",
        "Less SFT yields more distinct right solutions.",
        "second hand",
        arms("sft-light", "sft", DISTINCT),
        "chapter 17",
    ),
    Claim(
        "reset",
        "Expert iteration has to begin each round from the base.",
        "unverified transcription",
        # About as many updates of its last policy: 12 to 15% more, SFT's counted
        arms(f"{EI}-longer", f"{EI}-current"),
        "chapter 5",
    ),
    Claim(
        "kl",
        "Without a KL penalty PPO collapses.",
        "unverified transcription",
        arms(PPO, "ppo-no-kl"),
        "chapter 8",
    ),
    Claim(
        "ei-reranks",
        "Expert iteration leads in rerank@96 in most cases.",
        "verified",
        over(EI, OTHERS, RERANK, ABOVE_0),
        "Table 1",
    ),
    Claim(
        "over-optimisation",
        "A reward model can be over-optimised: its score rises, accuracy falls.",
        "unverified transcription",
        every(
            differ(Cell("ppo-weak-orm", SCORE), Cell("ppo-weak-orm", SCORE + BEFORE)),
            differ(
                Cell("ppo-weak-orm", ACCURACY),
                Cell("ppo-weak-orm", ACCURACY + BEFORE),
                BELOW_0,
            ),
        ),
        "Figure 11.2",
    ),
    Claim(
        "curricula",
        "Neither backtracking nor level replay improves the end.",
        "unverified transcription",
        every(
            *(
                arms(f"ppo-{k}", PPO, expected=NO_HIGHER)
                for k in ("backtracking", "replay")
            )
        ),
        "Table 6",
    ),
    Claim(
        "rcrl-negatives",
        "More negative examples make return-conditioned RL worse.",
        "second hand",
        every(
            arms("rcrl-minimal-10", "rcrl-minimal-1"),
            arms("rcrl-minimal-100", "rcrl-minimal-10", expected=NO_LOWER),
        ),
        "Table 5",
    ),
    Claim(
        "reranking",
        "A reward model chooses better among SFT's samples than the vote.",
        "unverified transcription",
        differ(Cell("orm", "rerank@K of SFT"), Cell("orm", "maj@K of SFT")),
        "chapter 10",
    ),
)

"""The paper's claims, and what the records say about them.

A ``Claim`` has a rule: a small function of recorded rows that gives effects with their
intervals, each with the range in which the claim expects it. The verdict is computed:

============  ========================================================================
supported     every interval lies wholly within its range
contradicted  some interval lies wholly outside its range
inconclusive  neither, or nothing is recorded
============  ========================================================================

A small model on another task can speak for or against a claim's direction, no more.
Left out: corrections for looking at many claims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import hypot, inf
from typing import Literal

from rlreason.evaluation.intervals import Interval
from rlreason.experiments.measures import ACCURACY, SCORE
from rlreason.experiments.records import Record, in_points
from rlreason.experiments.reported import Provenance

Verdict = Literal["supported", "contradicted", "inconclusive"]
ABOVE_0, BELOW_0 = (0.0, inf), (-inf, 0.0)


@dataclass(frozen=True)
class Effect:
    """What a claim is about, as measured.

    Attributes:
        name: What it is of, in words.
        interval: A difference of shares.
        expected: The range, ends excluded, in which the claim expects it.
    """

    name: str
    interval: Interval
    expected: tuple[float, float]

    @property
    def verdict(self) -> Verdict:
        """By the whole interval; an end on the range's end decides nothing."""
        low, high = self.expected
        if low < self.interval.low and self.interval.high < high:
            return "supported"
        if self.interval.high < low or high < self.interval.low:
            return "contradicted"
        return "inconclusive"

    def __str__(self) -> str:
        return f"{self.name}: {in_points(self.interval)}"


Rule = Callable[[Sequence[Record]], Iterator[Effect]]
"""From recorded rows to effects; nothing where a row is not recorded."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, and how it is judged.

    Attributes:
        id: Short, as in ``rlreason claims``.
        text: What the paper says.
        provenance: How sure it is that the paper says so.
        rule: How it is judged.
        figure: The table or figure of the catalogue that shows what it rests on.
    """

    id: str
    text: str
    provenance: Provenance
    rule: Rule
    figure: str


@dataclass(frozen=True)
class Judged:
    """A claim with what the records say."""

    claim: Claim
    effects: tuple[Effect, ...]

    @property
    def verdict(self) -> Verdict:
        """Of all effects together."""
        verdicts = {effect.verdict for effect in self.effects}
        if "contradicted" in verdicts:
            return "contradicted"
        return "supported" if verdicts == {"supported"} else "inconclusive"

    def __str__(self) -> str:
        """The claim on one line, below it its effects, and what it rests on."""
        claim = self.claim
        effects = [f"  {effect}" for effect in self.effects] or ["  not recorded"]
        head = f"{claim.id}: {claim.text} ({claim.provenance})"
        return "\n".join([head, *effects, f"  {self.verdict}; see {claim.figure}"])


def judge_claims(
    rows: Sequence[Record], claims: Sequence[Claim] | None = None
) -> list[Judged]:
    """Judge claims by recorded rows, in the order of the claims."""
    chosen = CLAIMS if claims is None else claims
    return [Judged(claim, tuple(claim.rule(rows))) for claim in chosen]


# --- Rules ----------------------------------------------------------------------------


def change(
    *names: str,
    metric: str = "maj@1",
    against: str = "",
    expected: tuple[float, float] = ABOVE_0,
) -> Rule:
    """The recorded differences of some comparisons lie in the expected range.

    Args:
        metric, against: Their beginning is enough, since K stands in a metric's name.
    """

    def rule(rows: Sequence[Record]) -> Iterator[Effect]:
        for row in rows:
            held = row.metric.startswith(metric) and row.against.startswith(against)
            if row.comparison in names and held:
                name = f"{row.comparison}, {row.measured}"
                yield Effect(name, row.interval, expected)

    return rule


def above(one: str, other: str, metric: str = "maj@1") -> Rule:
    """The difference of one comparison is above that of another.

    The two are taken as independent. Both are paired with the same start, which makes
    them rise and fall together: the interval is rather too wide than too narrow.
    """

    def rule(rows: Sequence[Record]) -> Iterator[Effect]:
        found = {row.comparison: row for row in rows if row.metric == metric}
        first, second = found.get(one), found.get(other)
        if first and second and first.against == second.against:
            a, b = first.interval, second.interval
            mean = a.mean - b.mean
            low = mean - hypot(a.mean - a.low, b.high - b.mean)
            high = mean + hypot(a.high - a.mean, b.mean - b.low)
            interval = replace(a, mean=mean, low=low, high=high)
            yield Effect(f"{one} above {other}, {metric}", interval, ABOVE_0)

    return rule


def every(*rules: Rule) -> Rule:
    """All of several rules."""
    return lambda rows: (effect for rule in rules for effect in rule(rows))


# --- The claims -----------------------------------------------------------------------

GUIDED = ("ppo-dense", "ppo-shaped", "ppo-sparse-orm", "ppo-dense-orm")
CLAIMS = (
    Claim(
        "ei-over-sft",
        "Expert iteration beats SFT in maj@1.",
        "second hand",
        change("expert-iteration"),
        "filtering",
    ),
    Claim(
        "ei-best",
        "Expert iteration ends above PPO.",
        "verified",
        above("expert-iteration", "ppo"),
        "credit",
    ),
    Claim(
        "guidance",
        "Dense and learned rewards end no higher than the sparse reward.",
        "second hand",
        change(*GUIDED, expected=BELOW_0),
        "rewards",
    ),
    Claim(
        "curricula",
        "Neither backtracking nor level replay improves the end.",
        "unverified transcription",
        change("ppo-backtracking", "ppo-replay", expected=BELOW_0),
        "exploration",
    ),
    Claim(
        "rcrl-negatives",
        "More negative examples make return-conditioned RL worse.",
        "second hand",
        change("rcrl-10", "rcrl-100", against="rcrl"),
        "labels",
    ),
    Claim(
        "reranking",
        "A reward model chooses better among samples than the vote.",
        "unverified transcription",
        change("orm", metric="rerank@", against="maj@"),
        "reranking",
    ),
    Claim(
        "over-optimisation",
        "A reward model can be over-optimised: its score rises, accuracy falls.",
        "unverified transcription",
        every(
            change("ppo-weak-orm", metric=SCORE),
            change("ppo-weak-orm", metric=ACCURACY, expected=BELOW_0),
        ),
        "over-optimisation",
    ),
)

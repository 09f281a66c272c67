"""The main question in a table and a few sentences: for chapter 15 and the first page.

Which method ends best, after how many rollouts, and what did RL add to SFT, and what
not? All of it follows from the records, the choice of words included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isfinite

from rlreason.experiments.catalogue import CATALOGUE
from rlreason.experiments.claims import CLAIMS, judge_claims
from rlreason.experiments.coverage import (
    distinct_differences,
    novelty,
    own_coverage,
    pass_differences,
    powers_to,
    read_solutions,
    variety,
)
from rlreason.experiments.records import (
    UNKNOWN,
    Cell,
    Records,
    ends,
    in_points,
    looks_of,
    unbroken,
    with_verdict,
)
from rlreason.experiments.rules import NEAR, RIGHT, best_of, drawn, rollouts_to
from rlreason.publishing.chapter import verdict
from rlreason.publishing.front import ENDS

FEWEST = 3  # seeds: by two an interval says little
ADDED = ("expert-iteration", "ppo", "ppo-network", "rcrl")
TAKEN = ("expert-iteration", "ppo", "rcrl")


def summary(records: Records) -> str:
    """A table of where each method ends, and below it the question's answers."""
    if not (lines := list(_lines(records))):
        return "Not recorded yet."
    from_sft = dict.fromkeys([*ENDS, *CATALOGUE.table("table-1").arms])
    without = [name for name in CATALOGUE.arms if name.endswith("-base")]
    with_sft = [name for name in from_sft if name not in (*without, "base")]
    filtered = CATALOGUE.arms["expert-iteration-orm"].changes
    threshold = filtered["expert_iteration.orm_threshold"]
    return "\n".join(
        [
            "| method | run | seeds | maj@1 | rollouts | near its best after |",
            "|---|---|--:|---|--:|---|",
            *lines,
            "",
            "*Filtered*: a right solution is kept only if an outcome reward model "
            f"(ORM) scores it at {threshold:g} or more; the model began as the SFT "
            "policy, and without SFT as the last policy of a whole expert iteration "
            "without a filter. PPO with a value network also has two epochs a phase, "
            "twice the questions, a narrower clip, a higher last rate and another "
            "lambda ([chapter 8](08_ppo_in_practice.ipynb)).",
            "",
            f"- **Which method ends best?** With SFT {_ranked(records, with_sft)}. "
            f"Without SFT {_ranked(records, without)}. Only methods with {FEWEST} "
            "seeds or more are ranked.",
            "- **After how many rollouts?** The table counts those of a run and of all "
            f"that it builds on. *Near its best* is {NEAR:.0%} of a run's best "
            "accuracy on validation, by seed. A run that gains little is there at "
            "once, and expert iteration is looked at once a round only.",
            f"- **What did RL add to SFT?** {_added(records)}",
            f"- **Did it add solutions of its own?** {of_its_own(records)}",
            f"- **What did it take away?** {taken(records)}",
        ]
    )


def _lines(records: Records) -> Iterator[str]:
    for arm, called in ENDS.items():
        value = records.value(Cell(arm))
        if value is not None:
            seeds = len(records.of(arm, "greedy"))
            maj_1 = unbroken(f"{value.mean:.1%} {ends(value, '.1f', scale=100)}")
            rollouts = records.rollouts(arm) or 0
            cells = called, f"`{arm}`", seeds, maj_1, f"{rollouts:,}"
            yield f"| {' | '.join(map(str, cells))} | {near_its_best(records, arm)} |"


def near_its_best(records: Records, arm: str) -> str:
    """After how many rollouts an arm was near its best on validation, by seed.

    What it builds on is counted as in ``Records.rollouts``. Where most seeds are near
    their best at the last look only, that is said: a longer run may end higher.
    """
    rows = [row for row in records.of(arm, "curve").values() if best_of(row)]
    if not rows:
        return ""
    own = [rollouts_to(row, NEAR * best_of(row)) for row in rows]
    last = [looks_of(row)[-1][0] for row in rows]
    at_its_end = sum(map(int.__eq__, own, last))
    if 2 * at_its_end > len(rows):
        return f"its end only, in {at_its_end} of {len(rows)} seeds"
    near = [n + row.needed.rollouts for n, row in zip(own, rows, strict=True)]
    return " to ".join(f"{n:,}" for n in sorted({min(near), max(near)}))


def _ranked(records: Records, arms: Iterable[str]) -> str:
    """The best of some arms, with those not told apart from it, in words."""
    seen = {
        arm: records.value(Cell(arm)).mean
        for arm in arms
        if len(records.of(arm, "greedy")) >= FEWEST
    }
    if len(seen) < 2:
        return UNKNOWN
    names = {arm: _called(arm).removesuffix(" without SFT") for arm in seen}
    first, *others = sorted(seen, key=lambda arm: -seen[arm])
    best, behind = [first], []
    for arm in others:
        lead = records.difference(Cell(first), Cell(arm))
        if lead is not None and isfinite(lead.low) and lead.excludes(0):
            behind.append(f"{in_points(lead)} points above {names[arm]}")
        else:
            best.append(arm)
    said = " and ".join(f"{names[arm]} ({seen[arm]:.1%})" for arm in best)
    if len(best) > 1:
        said += ", which are not told apart"
    if not behind:
        return said
    return f"{said}{f'; {names[first]} is' if len(best) > 1 else ','} {behind[0]}"


def _called(arm: str) -> str:
    return ENDS.get(arm, CATALOGUE.arms[arm].called)


def _added(records: Records) -> str:
    """What arms have above SFT in maj@1: of the main base, and of the others."""
    others = sorted({row.size for row in records.rows} - {records.size})
    parts = []
    for size in (records.size, *others):
        fewest, sft = FEWEST if size in others else 1, Cell("sft", size=size)
        each = [
            f"{_called(arm)} {with_verdict(gain)}"
            for arm in ADDED
            if len(records.of(arm, "greedy", size)) >= fewest
            and (gain := records.difference(Cell(arm, size=size), sft))
        ]
        start = records.value(sft)
        if each and start is not None:
            parts.append(f"with {size}, above {start.mean:.1%}: {', '.join(each)}")
    return f"In points of greedy accuracy {'; '.join(parts) or UNKNOWN}."


def of_its_own(records: Records) -> str:
    """How much of what is right SFT samples too, with the control, in words."""
    claim = next(claim for claim in CLAIMS if claim.id == "little-beyond-sft")
    (beyond,) = judge_claims(records, [claim])
    many = read_solutions(records.of("sft", "solutions"))
    if not many or beyond.said == UNKNOWN:
        return f"Shared solutions: {UNKNOWN}."
    judged = [effect for effect in beyond.effects if effect.expected]
    shares = " and ".join(
        f"{each.told} of those of {_called(arm)}"
        for arm, each in zip(("expert-iteration", "ppo"), judged, strict=True)
    )
    half = many[0].samples // 2
    again = own_coverage(many, [half], m=1)[half]
    few = max(1, half // 16)
    new = {
        arm: novelty(*pair, m=few, k=half)
        for arm in ("expert-iteration", "ppo")
        if (pair := drawn(records, Cell(arm), Cell("sft")))
    }
    return (
        f"Of right answers, {shares} are by solutions that SFT has among {half:,} "
        f"samples too; of SFT's own, {again.mean:.1%} come up again. Solutions a "
        f"question that SFT lacks, of as many right answers as both have in {few} "
        f"samples, less those that chance leaves: {_gaps(new)}. That RL explores "
        "little beyond what SFT produces, the paper's explanation, is "
        f"**{beyond.said}** here ([chapter 17](17_what_rl_adds.ipynb))."
    )


def taken(records: Records) -> str:
    """Distinct right solutions less those of SFT, in few samples and many, in words."""
    few = {
        arm: gap
        for arm in TAKEN
        if (gap := records.difference(Cell(arm, "distinct"), Cell("sft", "distinct")))
    }
    at = records.samples()
    parts = [f"in {at} samples, {_gaps(few)}"] if few else []
    varied, many, behind = {}, {}, []
    for arm in TAKEN:
        if pair := drawn(records, Cell("sft"), Cell(arm)):
            most = pair[1][0].samples
            many[arm] = distinct_differences(*pair, [most])[most]
            if gap := variety(*reversed(pair), right=RIGHT):
                varied[arm] = gap
            ks = sorted({*powers_to(most), min(at, most)})
            gaps = pass_differences(*pair, ks)
            if below := [f"{k:,}" for k, gap in gaps.items() if gap.high < 0]:
                behind.append(f"{_called(arm)} at k = {', '.join(below)}")
    if varied:
        parts.insert(0, f"among {RIGHT} right answers of both, {_gaps(varied)}")
    if many:
        parts.append(f"in {most:,}, of fewer problems, {_gaps(many)}")
    where = "pass@k lies below SFT's with its whole interval"
    lost = f" {where}: {'; '.join(behind)}." if behind else ""
    return (
        "Distinct right solutions a question, less those of SFT: "
        f"{'; '.join(parts) or UNKNOWN}.{lost}"
    )


def _gaps(gaps: dict) -> str:
    return ", ".join(
        f"{_called(arm)} {gap.mean:+.2f} {ends(gap, '+.2f')} "
        f"({verdict(gap, 'more', 'fewer')})"
        for arm, gap in gaps.items()
    )

"""What the raw rows say: values, paired differences, and words for them.

Everything here is computed from ``experiments.rows`` when it is read. A value has an
interval over seeds and problems, a difference one over pairs of the same seed and
problem (``evaluation.intervals.hierarchical_interval``).

A metric is named as in the paper; K is the number of samples that was recorded:

==========================  ==========================================================
maj@1                       greedy; of return-conditioned policies with [GOOD]
maj@1 with [BAD]            the same policy under the other label
maj@K, rerank@K, pass@K     of K samples; pass@k for any k up to K
accuracy, distinct          of one sample; right sequences of operations among K
score, accuracy of the ...  of ``earned``, after training and before
AUC                         of the reward model
==========================  ==========================================================
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from rlreason.evaluation.intervals import (
    Interval,
    hierarchical_interval,
    seed_interval,
    verdict,
)
from rlreason.evaluation.metrics import pass_at_k
from rlreason.experiments.catalogue import CATALOGUE, Arm
from rlreason.experiments.rows import RecordError, Row, read_rows, rows_path
from rlreason.runs.profiles import PUBLISHED, load_profile, named_profile
from rlreason.tasks import DataError, is_here

SCORE = "score by its reward model"
ACCURACY = "accuracy of the same answers"
AUC = "AUC on held-out questions"
BAD = "maj@1 with [BAD]"
BEFORE = ", before"
ONE_SEED = "(one seed)"  # in place of an interval, which takes two
UNKNOWN = "not recorded yet"

# Metric to its measure and its values of a row
METRICS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "maj@1": ("greedy", lambda v: v["right"]),
    BAD: ("labels", lambda v: v["bad"]),
    "maj@K": ("samples", lambda v: v["vote"]),
    "rerank@K": ("samples", lambda v: v["rerank"]),
    "pass@K": ("samples", lambda v: [count > 0 for count in v["right"]]),
    "accuracy": ("samples", lambda v: [count / v["k"] for count in v["right"]]),
    "distinct": ("samples", lambda v: v["distinct"]),
    SCORE: ("earned", lambda v: v["score_after"]),
    SCORE + BEFORE: ("earned", lambda v: v["score_before"]),
    ACCURACY: ("earned", lambda v: v["right_after"]),
    ACCURACY + BEFORE: ("earned", lambda v: v["right_before"]),
    AUC: ("auc", lambda v: [v["auc"]]),
    "rerank@K of SFT": ("reranking", lambda v: v["rerank"]),
    "maj@K of SFT": ("reranking", lambda v: v["vote"]),
    "rerank@K by the likelihood": ("reranking", lambda v: v["likelihood"]),
}

NO_SHARES = ("distinct", SCORE, SCORE + BEFORE)  # all other values lie in [0, 1]


def metric_of(name: str) -> tuple[str, Callable[[Mapping[str, Any]], Any]]:
    """The measure of a metric, and what takes its values from a row's.

    Raises:
        RecordError: There is no such metric.
    """
    if name in METRICS:
        return METRICS[name]
    kind, _, k = name.partition("@")
    if kind != "pass" or not k.isdigit():
        raise RecordError(f"no metric {name!r}; there are {', '.join(METRICS)}")
    return "samples", lambda v: [pass_at_k(v["k"], c, int(k)) for c in v["right"]]


@dataclass(frozen=True)
class Cell:
    """A metric of an arm, from one base; the profile's main one where it is empty."""

    arm: str
    metric: str = "maj@1"
    size: str = ""


@dataclass(frozen=True)
class Records:
    """The rows of a profile, and what follows from them.

    Attributes:
        size: Name of the profile's main base.
    """

    rows: Sequence[Row]
    size: str

    def of(self, arm: str, measure: str, size: str = "") -> dict[int, Row]:
        """The rows of an arm and measure, by their seed."""
        key = arm, measure, size or self.size
        found = (r for r in self.rows if (r.arm, r.measure, r.size) == key)
        return {row.seed: row for row in found}

    def to_train(self, seeds: Sequence[int], *needed: tuple[str, str]) -> list[int]:
        """The first seed, which is to be seen, and those that are not recorded.

        Args:
            needed: Arms and measures that have to be there.
        """
        there = [self.of(arm, measure) for arm, measure in needed]
        return [s for s in seeds if s == seeds[0] or any(s not in t for t in there)]

    def values(self, cell: Cell) -> dict[int, np.ndarray]:
        """Seed to one value a problem.

        Raises:
            RecordError: A row does not hold them.
        """
        measure, take = metric_of(cell.metric)
        found = {}
        for seed, row in self.of(cell.arm, measure, cell.size).items():
            try:
                values = np.array([float(value) for value in take(row.values)])
            except (KeyError, TypeError, ValueError) as error:
                raise RecordError(
                    f"the row {' '.join(map(str, row.key))} is damaged: {error!r}; "
                    "remove it and `rlreason record` it anew"
                ) from None
            found[seed] = values
        return found

    def value(self, cell: Cell) -> Interval | None:
        """The mean with its interval; None where nothing is recorded."""
        tables = list(self.values(cell).values())
        if len({table.shape for table in tables}) > 1:
            raise RecordError(
                f"seeds of {cell.arm} are recorded on different numbers of problems; "
                f"`rlreason record {cell.arm}` anew"
            )
        if not tables:
            return None
        found = interval_of(np.stack(tables))
        return found if cell.metric in NO_SHARES else within_shares(found)

    def pairs(self, one: Cell, other: Cell) -> dict[int, np.ndarray]:
        """``one`` minus ``other`` of each problem, by seed.

        Raises:
            RecordError: They were recorded on different problems.
        """
        a, b = self.values(one), self.values(other)
        for seed in a.keys() & b.keys():
            if a[seed].shape != b[seed].shape:
                raise RecordError(
                    f"{one.arm} is recorded on {len(a[seed])} problems and {other.arm} "
                    f"on {len(b[seed])}; `rlreason record` both anew"
                )
        return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}

    def difference(self, one: Cell, other: Cell) -> Interval | None:
        """The mean of ``pairs`` with its interval; None where there is no pair."""
        tables = list(self.pairs(one, other).values())
        return interval_of(np.stack(tables)) if tables else None

    def rollouts(self, arm: str, size: str = "") -> int | None:
        """Those of a run and of all that it builds on, the mean over seeds."""
        taken = [
            row.spent.rollouts + row.needed.rollouts
            for row in self.of(arm, "greedy", size).values()
        ]
        return round(fmean(taken)) if taken else None

    def samples(self) -> int | None:
        """K, the largest that is recorded; None without samples."""
        return max((row.values.get("k", 0) for row in self.rows), default=0) or None

    def named(self, metric: str) -> str:
        """A metric with the number in place of K."""
        return metric.replace("@K", f"@{self.samples() or 'K'}")


def interval_of(table: np.ndarray) -> Interval:
    """Of (seeds, problems); over seeds alone where there is one value a seed.

    Where all values are equal, they have no spread to learn from. That no problem of n
    is otherwise leaves 3 / n for the share of those that are (the rule of three).
    """
    problems = table.shape[1]
    if problems == 1:
        return seed_interval(table[:, 0])
    found = hierarchical_interval(table)
    if found.low < found.high:
        return found
    low, high = found.mean - 3 / problems, found.mean + 3 / problems
    return replace(found, low=low, high=high, method="rule of three")


def within_shares(interval: Interval) -> Interval:
    """The part that a share can be in; one seed's interval has no ends to move."""
    if not isfinite(interval.low):
        return interval
    return replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))


def load_records(profile: str | Path) -> Records:
    """All that is recorded of a profile's recipe.

    Raises:
        RecordError: The file is damaged.
        SettingsError: There is no such profile.
    """
    main = Path(str(load_profile(profile).recipe.get("policy", ""))).name
    return Records(of_one_recipe(read_rows(rows_path(profile)), profile), main)


def of_one_recipe(rows: Sequence[Row], profile: str | Path) -> Sequence[Row]:
    """Leave out rows of an earlier recipe, once a base has any of the present one.

    Of means and pairs over both, no recipe would be said. Where none is of the present
    one they are of one before, or its base is not here: then all are kept.
    """
    if not rows or str(profile) in PUBLISHED:  # test_rows holds these to their plans
        return rows
    (content,) = named_profile(str(profile))
    present = _identities(str(profile), content, tuple(row.key for row in rows))
    begun = {row.size for row in rows if present.get(row.key) == row.identity}
    left = [
        row
        for row in rows
        if row.size in begun and present.get(row.key, row.identity) != row.identity
    ]
    if left:
        warnings.warn(_left_out(left, profile), stacklevel=3)
    gone = {row.key for row in left}
    return [row for row in rows if row.key not in gone]


def _left_out(rows: Sequence[Row], profile: str | Path) -> str:
    seeds = defaultdict(list)
    for row in rows:
        seeds[row.arm, row.size, row.measure].append(str(row.seed))
    cells = [f"{' '.join(cell)} of seed {', '.join(s)}" for cell, s in seeds.items()]
    more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
    arms = " ".join(dict.fromkeys(row.arm for row in rows))
    return (
        f"recorded of another recipe than that of profile {profile} now, and left out: "
        f"{'; '.join(cells[:3])}{more}. Anew: `rlreason record {arms} --profile "
        f"{profile}`"
    )


@lru_cache(maxsize=4)
def _identities(
    profile: str, content: bytes, keys: tuple[tuple[str, str, int, str], ...]
) -> dict[tuple, tuple[str, ...]]:
    """The identity that each row would have now; none where base or data are not here.

    Args:
        content: Of the profile and its inputs, by which the answer is remembered.
    """
    # Imported here, since they wait for torch
    from rlreason.experiments.measures import Context, identity
    from rlreason.policy.load import PolicyError
    from rlreason.runs.contents import is_at_hand
    from rlreason.runs.profiles import load_recipe

    context = Context(load_recipe(profile))
    if not is_here(context.recipe.task.name):
        return {}
    bases = (*context.recipe.sizes, context.recipe.policy)
    paths = {Path(base).name: base for base in bases if is_at_hand(base)}
    subjects: dict[tuple, Any] = {}
    found = {}
    for arm, size, seed, measure in keys:
        if size not in paths:
            continue
        try:
            if (arm, size, seed) not in subjects:
                subjects[arm, size, seed] = context.subject(arm, paths[size], seed)
            subject = subjects[arm, size, seed]
            found[arm, size, seed, measure] = identity(context, subject, measure)
        except (DataError, PolicyError):
            return {}  # without data or base no plan has a name
        except (ValueError, KeyError):  # no arm or measure of this recipe
            continue
    return found


# --- Arms and what they are compared with ---------------------------------------------


@dataclass(frozen=True)
class Record:
    """A metric of an arm beside what it is compared with.

    Attributes:
        against: What ``before`` is of; empty where nothing is compared.
        before, after: Means over seeds and problems, of the pairs.
        interval: Of the difference; of ``after`` where nothing is compared.
        problems: 0 where they are not the test problems.
        rows: Of ``after``.
    """

    comparison: str
    metric: str
    against: str
    before: float | None
    after: float
    interval: Interval
    problems: int
    rows: tuple[Row, ...]

    @property
    def measured(self) -> str:
        """What is compared with what, in words."""
        return f"{self.metric} against {self.against}" if self.against else self.metric


def contrasts(arm: Arm) -> Iterator[tuple[str, Cell | None, str]]:
    """What each measure of an arm is compared with: metric, other cell, its name."""
    other = arm.compared
    for name in arm.measures:
        if name == "greedy" and other:
            yield "maj@1", Cell(other), other
        if name == "labels":
            yield "maj@1", Cell(arm.name, BAD), "[BAD]"
        if name == "earned":
            for metric in (SCORE, ACCURACY):
                yield metric, Cell(arm.name, metric + BEFORE), arm.start
        if name == "reranking":
            for metric in ("maj@K of SFT", "rerank@K by the likelihood"):
                yield "rerank@K of SFT", Cell(arm.name, metric), metric
        if name == "auc":
            yield AUC, None, ""


def records_of(records: Records, arm: Arm) -> Iterator[Record]:
    """What is recorded of an arm, from the main base, beside what it is compared with.

    Nothing where the other side is missing.
    """
    for metric, other, against in contrasts(arm):
        cell = Cell(arm.name, metric)
        measure, _ = metric_of(metric)
        rows = records.of(arm.name, measure)
        values = records.values(cell)
        if other is not None:
            seeds = records.pairs(cell, other)
            interval = records.difference(cell, other)
            before = [records.values(other)[seed] for seed in seeds]
        else:
            seeds, interval, before = values, records.value(cell), []
        if interval is None:
            continue
        after = [values[seed] for seed in seeds]
        yield Record(
            comparison=arm.name,
            metric=records.named(metric),
            against=records.named(against),
            before=float(np.mean(before)) if before else None,
            after=float(np.mean(after)),
            interval=interval,
            problems=after[0].size if other else 0,
            rows=tuple(rows[seed] for seed in seeds),
        )


def recorded(profile: str | Path, *names: str) -> list[Record]:
    """What is recorded of some arms or tables, in their order; all if none is named.

    Raises:
        CatalogueError: There is no arm or table of such a name.
        RecordError: The file is damaged.
    """
    records = load_records(profile)
    return [r for arm in CATALOGUE.find(names) for r in records_of(records, arm)]


def told(
    found: Sequence[Record],
    names: Mapping[str, str],
    *,
    metric: str = "maj@1",
    against: str = "",
) -> str:
    """Differences as part of a sentence: those that are recorded, then the others.

    Args:
        names: Arm to what the sentence calls it.
        metric, against: Of the records that are meant, or how these begin.
    """
    known = {
        each.comparison: with_verdict(each.interval)
        for each in found
        if each.metric.startswith(metric) and each.against.startswith(against)
    }
    said = [
        f"{called} {known[name]}" for name, called in names.items() if name in known
    ]
    missing = [called for name, called in names.items() if name not in known]
    parts = [", ".join(said)] if said else []
    parts += [f"{UNKNOWN} ({', '.join(missing)})"] if missing else []
    return "; ".join(parts)


def unbroken(text: str) -> str:
    """What is to stay on one line, with spaces that do not break (U+00A0)."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def in_points(interval: Interval) -> str:
    """A difference of shares with its interval, in percentage points."""
    return f"{100 * interval.mean:+.1f} {ends(interval, '+.1f', scale=100)}"


def ends(interval: Interval, form: str, *, scale: float = 1.0) -> str:
    """Both ends of an interval in brackets, if it has any."""
    if not isfinite(interval.low):
        return ONE_SEED
    return f"[{scale * interval.low:{form}}, {scale * interval.high:{form}}]"


def with_verdict(change: Interval) -> str:
    """A difference in points, and whether it is a rise; one seed cannot tell."""
    said = in_points(change)
    if not isfinite(change.low):
        return said
    return f"{said} ({verdict(change, 'a rise', 'a fall')})"


def compared(records: Records, one: str, other: str, metric: str = "maj@1") -> str:
    """One arm less another in points, and which is higher, as part of a sentence."""
    found = records.difference(Cell(one, metric), Cell(other, metric))
    if found is None:
        return UNKNOWN
    if not isfinite(found.low):
        return in_points(found)
    return f"{in_points(found)} ({verdict(found, 'higher', 'lower')})"


def over_the_vote(records: Records, *arms: str) -> str:
    """Arms' samples chosen by the reward model, less by vote, as part of a sentence."""
    gaps = {
        arm: records.difference(Cell(arm, "rerank@K"), Cell(arm, "maj@K"))
        for arm in arms
    }
    said = (f"`{arm}` {with_verdict(gap)}" for arm, gap in gaps.items() if gap)
    return ", ".join(said) or UNKNOWN


def phases_of(records: Records, arm: str, column: str) -> dict[str, dict[int, float]]:
    """A column of an arm's phases: line (a seed), phase, value; empty without."""
    lines = {
        f"seed {seed}": {
            each["phase"]: each[column]
            for each in row.values["rows"]
            if each["kind"] == "phase" and each.get(column) is not None
        }
        for seed, row in sorted(records.of(arm, "curve").items())
    }
    return {name: line for name, line in lines.items() if line}


def looks_of(row: Row) -> list[tuple[int, float]]:
    """Rollouts so far, and accuracy on validation, at each look of a run."""
    seen = [
        (each["rollouts"], each.get("validation_maj_1")) for each in row.values["rows"]
    ]
    return [(n, accuracy) for n, accuracy in seen if accuracy is not None]


def validation_curves(
    records: Records, arms: Mapping[str, str], size: str = ""
) -> dict[str, dict[float, float]]:
    """``validation_of`` some arms by thousands of rollouts, as a figure takes it.

    Args:
        arms: What the figure calls each, to the arm; those without a look are left out.
    """
    return {
        called: {rollouts / 1000: accuracy for rollouts, accuracy in looks.items()}
        for called, arm in arms.items()
        if (looks := validation_of(records, arm, size))
    }


def validation_of(records: Records, arm: str, size: str = "") -> dict[int, float]:
    """Accuracy on validation problems by rollouts so far: the mean over seeds.

    Where an arm did not look is left out, and so are looks that not all seeds have.
    """
    looks = [dict(looks_of(row)) for row in records.of(arm, "curve", size).values()]
    shared = set.intersection(*map(set, looks)) if looks else set()
    return {x: fmean(look[x] for look in looks) for x in sorted(shared)}

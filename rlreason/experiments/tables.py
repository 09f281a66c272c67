"""Tables for the book: recorded differences, and the paper's tables beside its numbers.

What is not recorded is said below each, with the command that records it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from rlreason.evaluation.intervals import Interval, verdict
from rlreason.experiments.catalogue import CATALOGUE, Arm, Table
from rlreason.experiments.records import (
    Cell,
    Record,
    Records,
    ends,
    in_points,
    load_records,
    metric_of,
    recorded,
    unbroken,
)
from rlreason.experiments.reported import reported_table, reported_tables
from rlreason.experiments.rows import Row
from rlreason.runs.folder import RunFolder
from rlreason.settings import settings_hash

# --- Differences ----------------------------------------------------------------------


def recorded_table(
    profile: str | Path, names: str | Sequence[str], run: RunFolder | None = None
) -> str:
    """What is recorded of some arms, as Markdown for a chapter.

    Args:
        names: Arms, or tables of the catalogue.
        run: Of the first of them, made by the chapter; the text under the table says
            where the record is of other settings.
    """
    names = [names] if isinstance(names, str) else list(names)
    found, arms = recorded(profile, *names), CATALOGUE.find(names)
    if not found:
        return _absent(profile, names)
    lines = [
        "| comparison | measured | seeds | before | after | difference | verdict |",
        "|---|---|--:|--:|--:|---|---|",
        *map(_table_line, found, [None, *found]),
    ]
    rows = [row for record in found for row in record.rows]
    first = arms[0].name
    plans = {row.plan for row in rows if row.arm == first}
    note = ""
    if run is not None and plans and settings_hash(run.settings) not in plans:
        note = f" `{first}` was recorded with other settings than the run above."
    counts = {record.problems for record in found}
    shown = {record.comparison for record in found}
    missing = _absent(profile, [arm.name for arm in arms if arm.name not in shown])
    pairs = "Before and after are of the seeds that both have."
    told = f"{_provenance(profile, rows, counts)} {pairs}{note} {missing}".strip()
    return "\n".join(lines) + f"\n\n{told}"


def _table_line(record: Record, above: Record | None) -> str:
    """One record in percent and points; an AUC as it is.

    An arm is named in the first of its lines.
    """
    interval = record.interval
    if record.before is None:
        before, after = "", f"{record.after:.2f}"
        change, word = ends(interval, ".2f"), ""
    else:
        before, after = f"{record.before:.1%}", f"{record.after:.1%}"
        change, word = in_points(interval), verdict(interval)
    known = above is not None and record.comparison == above.comparison
    name = "" if known else f"`{record.comparison}`"
    words = [unbroken(change), unbroken(word)]
    cells = [name, record.measured, str(len(record.rows)), before, after, *words]
    return f"| {' | '.join(cells)} |"


# --- Pages of tables ------------------------------------------------------------------


def table_page(profile: str | Path, name: str) -> str:
    """A table of the catalogue as Markdown: measured, and beside it as reported.

    Raises:
        CatalogueError: There is no such table.
        RecordError: The file of rows is damaged.
    """
    table, records = CATALOGUE.table(name), load_records(profile)
    rows = [row for row in records.rows if row.arm in table.arms]
    if not rows:
        return "\n\n".join(
            [_missing(profile, [f"`{name}`"], name), *_as_reported(table)]
        )
    metrics = _recorded_metrics(records, table)
    absent = [
        f"`{arm}`" + f" ({size})" * (size != records.size)
        for size in _sizes(records, table)
        for arm in table.arms
        if not records.of(arm, "greedy", size)
    ]
    absent += [records.named(m) for m in table.metrics if m not in metrics]
    said = [
        _provenance(profile, rows),
        "In percent, with 95% intervals over seeds and problems; the difference is of "
        "pairs. Rollouts and tokens are those sampled in training, in brackets with "
        "those of all runs that it builds on.",
        _missing(profile, absent, name),
    ]
    measured = [measured_table(records, table), " ".join(said).strip()]
    changes = changes_table(records, table)
    return "\n\n".join([*measured, *changes, *_as_reported(table)])


def _recorded_metrics(records: Records, table: Table) -> list[str]:
    """The columns of a table in which anything is recorded."""
    known = {(row.arm, row.measure) for row in records.rows}
    return [
        metric
        for metric in table.metrics
        if any((arm, metric_of(metric)[0]) in known for arm in table.arms)
    ]


def _sizes(records: Records, table: Table) -> list[str]:
    """The bases of a table, the main one last."""
    if not table.sizes:
        return [records.size]
    known = {row.size for row in records.rows} - {records.size}
    return [*sorted(known), records.size]


def _lines(records: Records, table: Table) -> Iterator[tuple[Arm, str, list[str]]]:
    """Arm, base and the first cells of each line that is recorded."""
    for name in table.arms:
        arm = CATALOGUE.arms[name]
        for size in _sizes(records, table):
            if seeds := len(records.of(name, "greedy", size)):
                yield arm, size, [f"{arm.called} (`{name}`)", size, str(seeds)]


def _markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", "---", *["--:"] * (len(heads) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, rule, *lines))


def measured_table(records: Records, table: Table) -> str:
    """A line an arm and base that is recorded, as Markdown."""
    metrics = _recorded_metrics(records, table)
    named = [records.named(metric) for metric in metrics]
    return _markdown(
        ["", "base", "seeds", *named, "maj@1 against its start", "rollouts", "tokens"],
        [
            [*first, *_cells(records, arm, metrics, size)]
            for arm, size, first in _lines(records, table)
        ],
    )


def _cells(records: Records, arm: Arm, metrics: Sequence[str], size: str) -> list[str]:
    """What is known of an arm: each metric, the change, and what training took."""
    values = [
        "not yet" if interval is None else _percent(interval)
        for interval in (
            records.value(Cell(arm.name, metric, size)) for metric in metrics
        )
    ]
    rows = list(records.of(arm.name, "greedy", size).values())
    rollouts = f"{fmean(row.spent.rollouts for row in rows):,.0f}"
    if more := fmean(row.needed.rollouts for row in rows):
        rollouts += f" ({fmean(row.spent.rollouts for row in rows) + more:,.0f})"
    tokens = [row.spent.tokens for row in rows]
    known = f"{fmean(tokens):,.0f}" if None not in tokens else "not kept"
    return [*values, _change(records, arm, "maj@1", size), rollouts, known]


def _change(records: Records, arm: Arm, metric: str, size: str) -> str:
    """How far an arm is above its start, in points; empty without a start or a pair."""
    if not arm.start:
        return ""
    cells = (Cell(name, metric, size) for name in (arm.name, arm.start))
    change = records.difference(*cells)
    return unbroken(in_points(change)) if change else ""


def changes_table(records: Records, table: Table) -> list[str]:
    """The other metrics against the start, and a line on it; nothing without any.

    Samples of all problems would take long, so these have fewer problems, and wider
    intervals, than maj@1.
    """
    metrics = [m for m in _recorded_metrics(records, table) if m != "maj@1"]
    lines = [
        [f"{arm.called} (`{arm.name}`)", size, *cells]
        for arm, size, _ in _lines(records, table)
        if any(cells := [_change(records, arm, m, size) for m in metrics])
    ]
    if not lines:
        return []
    named = [records.named(metric) for metric in metrics]
    counts = {
        len(row.values["right"])
        for row in records.rows
        if row.arm in table.arms and row.measure == "samples"
    }
    of = " or ".join(map(str, sorted(counts)))
    told = f"The other metrics against the start of each, of {of} problems, in points:"
    return [told, _markdown(["", "base", *named], lines)]


def _percent(interval: Interval) -> str:
    """A share; Student's t knows no bounds, a share has some."""
    if isfinite(interval.low):
        low, high = max(interval.low, 0.0), min(interval.high, 1.0)
        interval = replace(interval, low=low, high=high)
    known = ends(interval, ".1f", scale=100)
    return unbroken(f"{100 * interval.mean:.1f} {known}")


def _as_reported(table: Table) -> list[str]:
    """The paper's table beside it, with its mark."""
    known = reported_tables().get(table.reported)
    if not table.reported:
        return []
    if known is None:
        return [f"The numbers of the paper's Table {table.reported} are not known."]
    metrics = [metric.replace("@K", "@96") for metric in table.metrics]
    methods = [table.methods[arm] for arm in table.arms if arm in table.methods]
    return [
        f"The paper's Table {table.reported} ({known.provenance}), in shares:",
        reported_table(table.reported, methods, metrics),
        *([known.note] if known.note else []),
    ]


# --- Below a table --------------------------------------------------------------------


def _absent(profile: str | Path, names: Sequence[str]) -> str:
    """``_missing`` of whole arms."""
    return _missing(profile, [f"`{name}`" for name in names], " ".join(names))


def _missing(profile: str | Path, what: Sequence[str], names: str) -> str:
    """One line on what is not recorded, and what records it; empty where all is.

    Args:
        what: Arms in backticks, and metrics.
        names: Arms, or the table that they are of, to be recorded as a whole.
    """
    if not what:
        return ""
    of = "" if profile == "tiny" else f" --profile {profile}"  # the default
    command = f"rlreason record {names}{of}"
    return f"Not recorded yet: {', '.join(what)} (`{command}`)."


def _provenance(
    profile: str | Path, rows: Sequence[Row], problems: set[int] = frozenset()
) -> str:
    """What was recorded when, at which commit, where, and of how much."""

    def all_of(values: Any) -> str:
        return ", ".join(str(value) for value in sorted(set(values)))

    commits = {row.commit[:7] + "+" * row.commit.endswith("+") for row in rows}
    of_arms = Counter(each[:2] for each in {(r.arm, r.size, r.seed) for r in rows})
    fewest, most = min(of_arms.values()), max(of_arms.values())
    seeds = f"{fewest} to {most}" if fewest < most else str(most)
    counts = " or ".join(f"{n:,}" for n in sorted(problems - {0}))
    return (
        f"Recorded {all_of(row.date for row in rows)} at commit "
        f"{all_of(commits - {''}) or 'unknown'} on "
        f"{all_of(row.device for row in rows)}, profile {Path(profile).stem}, "
        f"{seeds} seed{'s' * (most > 1)}"
        + (f", {counts} test problems" if counts else "")
        + ". Differences of percentages are in points."
    )

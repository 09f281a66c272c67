"""Tables for the book: recorded differences, and the paper's tables beside its numbers.

What is not recorded is said below each, with the command that records it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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

Columns = Mapping[str, Callable[[Arm, str], str]]
"""Head of a column to what it says of an arm and base."""

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
        "In percent, with 95% intervals over seeds and problems; a difference is of "
        "pairs. Rollouts and tokens are those sampled in training, in brackets with "
        "those of all runs that it builds on.",
        _missing(profile, absent, name),
    ]
    first, *others = measured_tables(records, table)
    below = [" ".join(said).strip(), *others]
    return "\n\n".join([first, *below, *_as_reported(table)])


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


def measured_tables(records: Records, table: Table) -> list[str]:
    """What is recorded, a line an arm and base, as Markdown.

    One table where there is one metric; else values, changes from the start, and what
    training took stand apart, since all of it would be wider than a page.
    """
    metrics = _recorded_metrics(records, table)
    values, changes, costs = _columns(records, metrics)
    if len(metrics) == 1:
        return [_markdown(records, table, values | changes | costs)]
    counts = {
        len(row.values["right"])
        for row in records.rows
        if row.arm in table.arms and row.measure == "samples"
    }
    of = " or ".join(map(str, sorted(counts)))
    return [
        _markdown(records, table, values),
        f"In points; what takes many samples is of {of} problems:",
        _markdown(records, table, changes),
        "What training took:",
        _markdown(records, table, costs),
    ]


def _columns(records: Records, metrics: Sequence[str]) -> tuple[Columns, ...]:
    """Values, changes from the start, and costs."""
    named = {metric: records.named(metric) for metric in metrics}
    values = {named[m]: partial(_value, records, m) for m in metrics}
    seeds = {"seeds": lambda arm, size: str(len(records.of(arm.name, "greedy", size)))}
    changes = {
        f"{named[m]} against its start": partial(_change, records, m) for m in metrics
    }
    costs = {
        "rollouts": partial(_rollouts, records),
        "tokens": partial(_tokens, records),
    }
    return seeds | values, changes, costs


def _markdown(records: Records, table: Table, columns: Columns) -> str:
    """Lines in which a column has something."""
    lines = [["run", "base", *columns], ["---", "---", *["--:"] * len(columns)]]
    for arm in (CATALOGUE.arms[name] for name in table.arms):
        for size in _sizes(records, table):
            if records.of(arm.name, "greedy", size):
                cells = [column(arm, size) for column in columns.values()]
                if any(cells):
                    lines.append([f"{arm.called} (`{arm.name}`)", size, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(records: Records, metric: str, arm: Arm, size: str) -> str:
    interval = records.value(Cell(arm.name, metric, size))
    return "not yet" if interval is None else _percent(interval)


def _change(records: Records, metric: str, arm: Arm, size: str) -> str:
    """How far an arm is above its start, in points; empty without a start or a pair."""
    if not arm.start:
        return ""
    cells = (Cell(name, metric, size) for name in (arm.name, arm.start))
    change = records.difference(*cells)
    return unbroken(in_points(change)) if change else ""


def _rollouts(records: Records, arm: Arm, size: str) -> str:
    rows = records.of(arm.name, "greedy", size).values()
    own = f"{fmean(row.spent.rollouts for row in rows):,.0f}"
    if any(row.needed.rollouts for row in rows):
        return f"{own} ({records.rollouts(arm.name, size):,})"
    return own


def _tokens(records: Records, arm: Arm, size: str) -> str:
    tokens = [row.spent.tokens for row in records.of(arm.name, "greedy", size).values()]
    return "not kept" if None in tokens else f"{fmean(tokens):,.0f}"


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

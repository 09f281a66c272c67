"""What was measured, kept in the repository, and shown from there.

``book/results/<profile>/`` holds two tables, which ``rlreason record`` writes::

    comparisons.csv   a row a comparison and metric, with its interval
    training.csv      a row a phase of PPO and seed: reward, accuracy, KL

A row is read strictly and belongs to a plan, whose hash it holds: ``is_current`` says
whether the recipe still makes that plan. What does not change the plan, such as the
machine, does not make a row stale.

Left out: what the evaluation was (K, temperature); the metric's name has K.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from rlreason.evaluation.intervals import Interval, verdict
from rlreason.experiments.catalogue import CATALOGUE, Catalogue
from rlreason.runs.environment import results_folder
from rlreason.runs.folder import RunFolder
from rlreason.runs.plans import plan_of
from rlreason.runs.recipes import Recipe
from rlreason.settings import describe, settings_hash

OPTIONAL = ("before", "difference", "kl")  # an empty cell: there is none


class RecordError(ValueError):
    """A file of records that is damaged."""


@dataclass(frozen=True)
class Row:
    """What a measure finds. Values are shares, or an AUC.

    Attributes:
        metric: What was measured, e.g. "maj@1".
        against: What ``before`` is of, e.g. "sft"; empty where nothing is compared.
        before, after: Means over seeds and problems.
        difference: ``after`` minus ``before``.
        low, high: 95% interval of ``difference``, or of ``after`` where there is none.
        problems: 0 where they are not the test problems.
    """

    comparison: str
    metric: str
    against: str
    before: float | None
    after: float
    difference: float | None
    low: float
    high: float
    seeds: int
    problems: int

    def __post_init__(self) -> None:
        value = self.interval.mean
        if not self.low - 1e-3 <= value <= self.high + 1e-3:
            raise ValueError(
                f"{value} is not within its interval, {self.low} to {self.high}"
            )
        compared = self.before is not None
        if compared != (self.difference is not None) or compared != bool(self.against):
            raise ValueError("before, difference and against stand together or not")
        if compared and abs(self.after - self.before - self.difference) > 1e-3:
            raise ValueError(
                f"difference={self.difference} is not {self.after} - {self.before}"
            )

    @property
    def interval(self) -> Interval:
        """Of the difference; of the value itself where nothing is compared."""
        mean = self.after if self.difference is None else self.difference
        return Interval(mean, self.low, self.high, 0.95, self.seeds, "as recorded")

    @property
    def measured(self) -> str:
        """What is compared with what, in words."""
        return f"{self.metric} against {self.against}" if self.against else self.metric

    def __str__(self) -> str:
        """One line for the terminal: shares in percent and points, an AUC as it is."""
        if self.difference is None:
            return f"{self.comparison}: {self.metric} {self.interval}"
        return (
            f"{self.comparison}: {self.measured} {self.before:.1%} -> "
            f"{self.after:.1%}, {in_points(self.interval)}, {self.seeds} seeds"
        )


@dataclass(frozen=True)
class Record(Row):
    """A row with where it comes from.

    Attributes:
        seconds: Of training, a seed, single-threaded, without what it starts from.
        settings: Hash of the plan of seed 0.
        commit: Of this project, ``+`` behind it where files differed; or empty.
    """

    seconds: float
    settings: str
    commit: str
    device: str
    date: str

    @property
    def key(self) -> tuple:
        """What only one row of a file may be of."""
        return self.comparison, self.metric, self.against


@dataclass(frozen=True)
class TrainingRecord:
    """A phase of PPO.

    Attributes:
        reward: Mean of a response, without the KL penalty.
        accuracy: Share of the responses that the answer key calls right.
        kl: Nats a response; None where it is not measured.
        settings: Hash of the plan of this seed.
    """

    comparison: str
    seed: int
    phase: int
    reward: float
    accuracy: float
    kl: float | None
    settings: str

    @property
    def key(self) -> tuple:
        """What only one row of a file may be of."""
        return self.comparison, self.seed, self.phase


R = TypeVar("R", Record, TrainingRecord)
T = TypeVar("T")


def comparisons_path(profile: str | Path) -> Path:
    """Where the comparisons of a profile are recorded."""
    return results_folder(profile) / "comparisons.csv"


def training_path(profile: str | Path) -> Path:
    """Where the phases of a profile's PPO runs are recorded."""
    return results_folder(profile) / "training.csv"


def recorded(profile: str | Path, *names: str) -> list[Record]:
    """The recorded rows of some comparisons, in their order; all where none is named.

    Raises:
        CatalogueError: There is no comparison or table of such a name.
        RecordError: The file is damaged.
    """
    return _of(names, read_records(Record, comparisons_path(profile)))


def recorded_training(profile: str | Path, *names: str) -> list[TrainingRecord]:
    """The recorded phases of PPO, likewise."""
    return _of(names, read_records(TrainingRecord, training_path(profile)))


def _of(names: Sequence[str], rows: list[R]) -> list[R]:
    if not names:
        return rows
    order = [comparison.name for comparison in CATALOGUE.find(names)]
    found = [row for row in rows if row.comparison in order]
    return sorted(found, key=lambda row: order.index(row.comparison))


def read_records(kind: type[R], path: Path) -> list[R]:
    """Read a file of records; none where there is no file.

    Raises:
        RecordError: The file is not what ``write_records`` writes; says where, and why.
    """
    if not path.is_file():
        return []
    remedy = "; restore the file with git, or remove it and `rlreason record` it anew"
    try:
        rows = read_rows(kind, path)
    except RecordError as error:
        raise RecordError(f"{error}{remedy}") from None
    keys = [row.key for row in rows]
    if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
        name = " ".join(map(str, twice[0]))
        raise RecordError(f"{path}: two rows of {name}{remedy}")
    return rows


def read_rows(kind: type[T], path: Path) -> list[T]:
    """Read a CSV file whose columns are the fields of a dataclass, in their order.

    Raises:
        RecordError: A column, a cell or a value is not as it should be; names the line.
    """
    names = [field.name for field in fields(kind)]
    parse = TypeAdapter(kind).validate_python
    rows, number = [], 1
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            if next(reader, None) != names:
                raise RecordError(f"{path}: the columns must be {','.join(names)}")
            for cells in reader:
                number = reader.line_num
                if len(cells) != len(names):
                    raise ValueError(f"{len(cells)} cells in {len(names)} columns")
                pairs = zip(names, cells, strict=True)
                rows.append(parse({n: _value(n, text) for n, text in pairs}))
    except RecordError:
        raise
    except ValidationError as error:
        why = describe(error, kind.__name__)
        raise RecordError(f"{path}, line {number}: {why}") from None
    except (ValueError, csv.Error) as error:  # not UTF-8, cells, quotes
        raise RecordError(f"{path}, after line {number}: {error}") from None
    return rows


def _value(name: str, text: str) -> str | None:
    return None if name in OPTIONAL and not text else text


def write_records(
    kind: type[R], rows: Iterable[R], path: Path, *, catalogue: Catalogue = CATALOGUE
) -> None:
    """Put rows into a file, in place of all that it has of the same comparisons.

    The file is written whole and then moved to its place. Its rows are in the order of
    the catalogue.
    """
    rows = list(rows)
    if not rows:
        return
    new = {row.comparison for row in rows}
    table = [row for row in read_records(kind, path) if row.comparison not in new]
    order = [*catalogue.comparisons, *(row.comparison for row in table)]
    table = sorted([*table, *rows], key=lambda row: order.index(row.comparison))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".partial")
    with draft.open("w", newline="", encoding="utf-8") as file:
        names = [field.name for field in fields(kind)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: _cell(name, value) for name, value in asdict(row).items()}
            for row in table
        )
    draft.replace(path)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}" if name == "seconds" else f"{value:.4f}"
    return "" if value is None else str(value)


def is_current(
    record: Record | TrainingRecord, recipe: Recipe, *, catalogue: Catalogue = CATALOGUE
) -> bool:
    """Whether a row is of the plan that the recipe makes now, and of as many seeds."""
    variant = catalogue.find([record.comparison])[0].after
    seed = record.seed if isinstance(record, TrainingRecord) else 0
    plan = plan_of(variant.step, variant.recipe(recipe), seed)
    seeds = record.seeds if isinstance(record, Record) else recipe.seeds
    return record.settings == settings_hash(plan) and seeds == recipe.seeds


def recorded_table(
    profile: str | Path, names: str | Sequence[str], run: RunFolder | None = None
) -> str:
    """What is recorded of some comparisons, as Markdown for a chapter.

    Args:
        names: Comparisons, or tables of the catalogue.
        run: Of the first of them, made by the chapter; the text under the table says
            where the record is of other settings.
    """
    names = [names] if isinstance(names, str) else list(names)
    rows = recorded(profile, *names)
    if not rows:
        return (
            f"Nothing is recorded for profile {profile} yet; `rlreason record "
            f"{' '.join(names)} --profile {profile}` does it. Until then one seed is "
            "an anecdote."
        )
    lines = [
        "| comparison | measured | before | after | difference, 95% | verdict |",
        "|---|---|--:|--:|---|---|",
        *map(_table_line, rows, [None, *rows]),
    ]
    first = CATALOGUE.find(names)[0].name
    settings = {row.settings for row in rows if row.comparison == first}
    note = ""
    if run is not None and settings and settings_hash(run.settings) not in settings:
        note = f" `{first}` was recorded with other settings than the run above."
    return "\n".join(lines) + f"\n\n{_provenance(profile, rows)}{note}"


def _table_line(row: Record, above: Record | None) -> str:
    """One row in percent and points; an AUC as it is.

    A comparison is named in the first of its rows. What is to stay on one line has
    spaces that do not break (U+00A0).
    """
    interval = row.interval
    if row.difference is None:
        before, after = "", f"{row.after:.2f}"
        change, word = f"[{row.low:.2f}, {row.high:.2f}]", ""
    else:
        before, after = f"{row.before:.1%}", f"{row.after:.1%}"
        change, word = in_points(interval), verdict(interval)
    known = above is not None and row.comparison == above.comparison
    name = "" if known else f"`{row.comparison}`"
    change, word = (t.replace(" ", "\N{NO-BREAK SPACE}") for t in (change, word))
    return f"| {' | '.join([name, row.measured, before, after, change, word])} |"


def _provenance(profile: str | Path, rows: Sequence[Record]) -> str:
    """What was recorded when, at which commit, where, and of how much."""

    def all_of(values: Iterable[Any]) -> str:
        return ", ".join(str(value) for value in sorted(set(values)))

    commits = {row.commit[:7] + "+" * row.commit.endswith("+") for row in rows}
    seeds = all_of(row.seeds for row in rows)
    counts = sorted({row.problems for row in rows} - {0})
    problems = " or ".join(f"{n:,}" for n in counts)
    return (
        f"Recorded {all_of(row.date for row in rows)} at commit "
        f"{all_of(commits - {''}) or 'unknown'} on "
        f"{all_of(row.device for row in rows)}, profile {Path(profile).stem}, "
        f"{seeds} seeds, {problems} test problems. Differences of percentages are in "
        "points."
    )


def in_points(interval: Interval) -> str:
    """A difference of shares with its interval, in percentage points."""
    mean, low, high = (100 * v for v in (interval.mean, interval.low, interval.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def recorded_panels(
    profile: str | Path, name: str, *, catalogue: Catalogue = CATALOGUE
) -> dict[str, dict[str, dict[int, float]]]:
    """What a figure of the catalogue shows: panel, line (a seed), phase, value.

    Empty where nothing is recorded. As ``figures.plot_panels`` takes it.
    """
    figure = catalogue.figure(name)
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for row in recorded_training(profile, *figure.lines):
        for column in figure.columns:
            panel = panels.setdefault(f"{figure.lines[row.comparison]}: {column}", {})
            line = panel.setdefault(f"seed {row.seed}", {})
            line[row.phase] = getattr(row, column)
    return panels

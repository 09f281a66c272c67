"""Raw rows: what was measured of each run, kept in the repository.

``book/results/<profile>/rows.jsonl`` holds a line for each run and measurement, with
its values problem by problem. Means, intervals and differences are computed from them
when they are read (``experiments.records``) and are never stored, so that any two arms
can be compared in pairs of one seed and problem.

A row names the plan of its run (``plan``) and how it was measured (``how``) by their
hashes. ``Row.key`` says of what only one row may be.

Left out: the problems themselves; a row says of which task and split they are, and its
values are in their order.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import Field, ValidationError

from rlreason.runs.environment import make_folder, results_folder
from rlreason.settings import Settings, describe

FILE = "rows.jsonl"


class RecordError(ValueError):
    """Records that are damaged, or that belong to other plans."""


class Spent(Settings):
    """What training took.

    Attributes:
        seconds: Single-threaded, or of one GPU.
        rollouts: Responses sampled.
        tokens: Of these; None where the run does not say.
    """

    seconds: float = Field(ge=0)
    rollouts: int = Field(ge=0)
    tokens: int | None = Field(ge=0)

    def __add__(self, other: Spent) -> Spent:
        known = self.tokens is not None and other.tokens is not None
        return Spent(
            seconds=self.seconds + other.seconds,
            rollouts=self.rollouts + other.rollouts,
            tokens=self.tokens + other.tokens if known else None,
        )


class Row(Settings):
    """One measurement of one run.

    Attributes:
        arm: Of the catalogue.
        size: Name of the base.
        measure: Of ``measures.MEASURES``; it says what is in ``values``.
        start: What training began from: sft, base, or a run.
        plan: Hash of the run's plan.
        how: Hash of what decides the measurement beside the policy.
        spent: By the run itself.
        needed: By all runs that it builds on, each counted once.
        measuring: Seconds that the measurement took.
        commit: Of this project, ``+`` behind it where files differed; or empty.
        values: JSON. One value a problem: a list, or "0110" of what is right or wrong.
    """

    arm: str
    size: str
    seed: int = Field(ge=0)
    measure: str
    step: str
    start: str
    plan: str
    how: str
    task: str
    split: str
    spent: Spent
    needed: Spent
    measuring: float = Field(ge=0)
    commit: str
    device: str
    date: str
    values: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What only one row may be of."""
        return self.arm, self.size, self.seed, self.measure

    @property
    def identity(self) -> tuple[str, ...]:
        """Key and hashes: which run it is of, and how it was measured."""
        return (*map(str, self.key), self.plan, self.how)


def rows_path(profile: str | Path) -> Path:
    """Where the rows of a profile are kept."""
    return results_folder(profile) / FILE


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows; none where there is no file.

    Raises:
        RecordError: A line is no row, or two are of the same; says where, and why.
    """
    remedy = "restore the file with git, or remove it and `rlreason record` anew"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows, number = [], 0
        for number, line in enumerate(lines, start=1):  # noqa: B007 (for the message)
            rows.append(Row.model_validate_json(line))
    except ValidationError as error:
        why = describe(error, "Row")
        if {fault["type"] for fault in error.errors()} == {"extra_forbidden"}:
            remedy = "a newer rlreason wrote it: update this one"
        raise RecordError(f"{path}, line {number}: {_short(why)}; {remedy}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise RecordError(f"{path}: {error}; {remedy}") from None
    seen: set[tuple] = set()
    for row in rows:
        if row.key in seen:
            name = " ".join(map(str, row.key))
            raise RecordError(f"{path}: two rows of {name}; {remedy}")
        seen.add(row.key)
    return rows


def _short(text: str) -> str:
    """A line of a file can be thousands of characters, and is shown in the error."""
    flat = " ".join(text.split())
    return flat if len(flat) < 300 else f"{flat[:300]} ..."


def took(rows: Sequence[Row]) -> str:
    """What the rows cost, as a sentence; a run that several are of counts once.

    A run beside other work takes longer. So it is also said what all would have taken
    at the pace of the quickest of the same arm and size, and of the same measure.
    """
    runs = {(row.plan, row.size, row.seed): row for row in rows}
    trained, measured = defaultdict(list), defaultdict(list)
    for row in runs.values():
        trained[row.arm, row.size].append(row.spent.seconds)
    for row in rows:
        measured[row.arm, row.size, row.measure].append(row.measuring)
    kinds = [*trained.values(), *measured.values()]
    training = sum(map(sum, trained.values())) / 3600
    measuring = sum(map(sum, measured.values())) / 3600
    quickest = sum(len(kind) * min(kind) for kind in kinds) / 3600
    return (
        f"{len(rows)} rows of {len(runs)} runs took {training:.1f} hours of training "
        f"and {measuring:.1f} hours of measuring, of one core or GPU; {quickest:.1f} "
        "hours in all, had each been as quick as the quickest of its kind"
    )


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Put rows into a file, each in place of the one that was of the same.

    The file is written whole and then moved to its place, by one process at a time.
    """
    with FileLock(make_folder(path.parent) / ".rows.lock"):
        table = {row.key: row for row in [*read_rows(path), *rows]}
        ordered = sorted(table.values(), key=lambda row: row.key)
        lines = [
            json.dumps(row.model_dump(), separators=(",", ":"), allow_nan=False) + "\n"
            for row in ordered
        ]
        draft = path.with_suffix(".partial")
        draft.write_bytes("".join(lines).encode())
        draft.replace(path)

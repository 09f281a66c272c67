"""The paper's numbers, each with how sure it is.

``reported.yaml`` holds its tables, ``reported-figures.csv`` the points of its Figures 5
and 6. A key, a cell or a mark that should not be is an error.

=========================  ===========================================================
verified                   the paper's own text, or its first author's
second hand                somebody else's account of the paper
unverified transcription   memory: to be checked before it is quoted
digitised                  read from a picture of the paper's Figures 5 and 6: within
                           0.002 of the accuracy drawn, 0.006 on the axis of rollouts
=========================  ===========================================================

Left out: Table 6 and the other figures, of which no number is known.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter, model_validator

from rlreason.runs.profiles import read_yaml
from rlreason.settings import Settings, SettingsError, load_settings

HERE = Path(__file__).parent

Provenance = Literal["verified", "second hand", "unverified transcription", "digitised"]
"""How sure a statement or a number of the paper is; see above."""

Size = Literal["7B", "13B"]
"""Of the Llama-2 that was trained."""


class ReportedTable(Settings):
    """A table of the paper.

    Attributes:
        note: What speaks for or against the numbers.
        rows: Method to model size to a value a column, shares unless the column says
            otherwise.
    """

    title: str
    provenance: Provenance
    note: str = ""
    columns: tuple[str, ...]
    rows: dict[str, dict[Size, tuple[float, ...]]] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_table(self) -> ReportedTable:
        for method, sizes in self.rows.items():
            for size, values in sizes.items():
                if len(values) != len(self.columns):
                    raise ValueError(
                        f"{method} {size} has {len(values)} values and the table "
                        f"{len(self.columns)} columns"
                    )
        return self

    def value(self, method: str, size: Size, metric: str) -> float:
        """One cell.

        Raises:
            SettingsError: The table has no such row or column.
        """
        if size not in self.rows.get(method, {}) or metric not in self.columns:
            raise SettingsError(
                f"{self.title}: no {metric} of {method} {size} is known; the rows are "
                f"{', '.join(self.rows)}, the columns {', '.join(self.columns)}"
            )
        return self.rows[method][size][self.columns.index(metric)]


@dataclass(frozen=True)
class ReportedPoint:
    """A point of a figure of the paper, digitised.

    Attributes:
        rollouts: Drawn in training, as the axis implies; see ``x``.
        x: As read: log10 of 1 + rollouts / 1000.
        accuracy: maj@1 on the test split.
        step: Gradient step of PPO, or "round 2" of expert iteration.
    """

    figure: int
    panel: str
    series: str
    step: str
    x: float
    rollouts: int
    accuracy: float


class _Tables(Settings):
    tables: dict[str, ReportedTable]


@cache
def reported_tables() -> dict[str, ReportedTable]:
    """The paper's tables by their number; "4b": numbers of the text beside Table 4.

    Raises:
        SettingsError: The file is damaged; names the table and the fault.
    """
    return load_settings(_Tables, read_yaml(HERE / "reported.yaml")).tables


@cache
def reported_points() -> list[ReportedPoint]:
    """The points of the paper's Figures 5 and 6, in the order of the curves."""
    with (HERE / "reported-figures.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return TypeAdapter(list[ReportedPoint]).validate_python(rows)


def reported_table(number: str, methods: Sequence[str], metrics: Sequence[str]) -> str:
    """Some rows and columns of a table of the paper, as Markdown, with its mark."""
    table = reported_tables()[number]
    head = f"| *{table.provenance}* | Llama-2 | {' | '.join(metrics)} |"
    lines = [head, f"|---|---|{'--:|' * len(metrics)}"]
    for method in methods:
        for size in table.rows[method]:
            cells = [f"*{table.value(method, size, m):.2f}*" for m in metrics]
            lines.append(f"| {method} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)

"""From every number of a page of results to its rows, by arithmetic of its own."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from statistics import fmean

import pytest

from rlreason.experiments.catalogue import CATALOGUE
from rlreason.experiments.claims import judge_claims
from rlreason.experiments.records import Records, load_records
from rlreason.experiments.rows import Row, rows_path
from rlreason.experiments.tables import measured_tables

PAPERS = [table.name for table in CATALOGUE.tables if table.reported]


@pytest.fixture(scope="module")
def raw() -> dict[tuple, dict]:
    """Arm, size, measure, seed to the row as it is in the file."""
    lines = rows_path("tiny").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "arm" in row]
    return {(r["arm"], r["size"], r["measure"], r["seed"]): r for r in rows}


def values(raw, arm: str, size: str, metric: str) -> dict[int, float]:
    """Seed to the share of problems, in percent."""
    if metric == "maj@1":
        measure, take = "greedy", lambda row: map(int, row["right"])
    elif metric.startswith("pass@"):
        measure, take = "samples", lambda row: [count > 0 for count in row["right"]]
    else:  # a vote that is even counts in part
        column = {"maj": "vote", "rerank": "rerank"}[metric.partition("@")[0]]
        measure, take = "samples", lambda row: [float(x) for x in row[column]]
    return {
        key[3]: 100 * fmean(take(row["values"]))
        for key, row in raw.items()
        if key[:3] == (arm, size, measure)
    }


def expected(raw, arm: str, size: str, head: str) -> float | str:
    """What a cell has to begin with; a string where it has to be that."""
    rows = [r for key, r in raw.items() if key[:3] == (arm, size, "greedy")]
    if head == "seeds":
        return len(rows)
    if head in ("rollouts", "tokens"):
        spent = [row["spent"][head] for row in rows]
        return "not kept" if None in spent else fmean(spent)
    metric, against, _ = head.partition(" against")
    one = values(raw, arm, size, metric)
    if not against:
        return fmean(one.values()) if one else "not yet"
    other = values(raw, CATALOGUE.arms[arm].start, size, metric)
    pairs = one.keys() & other.keys()
    return fmean(one[seed] - other[seed] for seed in pairs) if pairs else ""


def cells(markdown: str):
    """Arm, size, head and text of each cell of a table."""
    heads, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
    ]
    for line in lines:
        arm = re.search(r"`(.+)`", line[0]).group(1)
        for head, text in zip(heads[2:], line[2:], strict=True):
            yield arm, line[1], head, text


def check(raw, tables: list[str]) -> int:
    """Compare each number with its rows; how many there were."""
    count = 0
    for arm, size, head, text in (c for t in tables if t[0] == "|" for c in cells(t)):
        want = expected(raw, arm, size, head)
        if isinstance(want, str):
            assert text == want, (arm, size, head)
            continue
        number = float(re.match(r"[+-]?[\d,.]+", text).group().replace(",", ""))
        places = len(text.split()[0].partition(".")[2])
        assert number == pytest.approx(want, abs=0.51 * 10**-places), (arm, size, head)
        count += 1
    return count


@pytest.mark.parametrize("name", PAPERS)
def test_every_number_of_a_table_of_the_paper_is_of_its_rows(name, raw):
    records, table = load_records("tiny"), CATALOGUE.table(name)
    assert check(raw, measured_tables(records, table)) > 10


@pytest.mark.parametrize("measure", ["greedy", "samples"])
def test_a_number_of_another_row_does_not_pass(measure, raw):
    records, table = load_records("tiny"), CATALOGUE.table("table-1")
    key = "right" if measure == "greedy" else "vote"
    rows: list[Row] = []
    changed = False
    for row in records.rows:
        if not changed and row.measure == measure and row.arm == "sft":
            wrong = [1 - float(value) for value in row.values[key]]
            row = row.model_copy(update={"values": {**row.values, key: wrong}})
            changed = True
        rows.append(row)
    other = Records(rows, records.size)
    with pytest.raises(AssertionError, match="sft"):
        check(raw, measured_tables(other, table))


def test_the_differences_that_claims_rest_on_are_of_the_rows(raw):
    found = defaultdict(list)
    for one in judge_claims(load_records("tiny")):
        for effect in one.effects:
            said = re.fullmatch(r"(\S+) (\S+@\d+) less (\S+)", effect.name)
            if said:
                arm, metric, other = said.groups()
                a, b = (values(raw, name, "nano", metric) for name in (arm, other))
                pairs = a.keys() & b.keys()
                want = fmean(a[seed] - b[seed] for seed in pairs)
                number = float(re.match(r"[+-][\d.]+", effect.measured).group())
                assert number == pytest.approx(want, abs=0.051), effect
                found[one.claim.id].append(number)
    assert len(found) > 8

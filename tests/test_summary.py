"""The main question's summary: each word of it follows from the rows."""

import pytest

from rlreason.experiments.records import Cell, Records, load_records
from rlreason.experiments.rules import NEAR, best_of
from rlreason.publishing.front import ENDS
from rlreason.publishing.summary import near_its_best, of_its_own, summary, taken


@pytest.fixture(scope="module")
def records():
    return load_records("tiny")


def test_it_has_a_line_for_each_method_that_is_recorded(records):
    lines = [line for line in summary(records).splitlines() if line.startswith("| ")]
    for arm, called in ENDS.items():
        value = records.value(Cell(arm))
        (line,) = (line for line in lines if f"| `{arm}` |" in line)
        assert line.startswith(f"| {called} |")
        assert f"{value.mean:.1%}" in line


def curve_of(records, accuracies, needed):
    """An arm's rows with other looks, one list of accuracies a seed."""
    found = list(records.of("expert-iteration", "curve").values())[: len(accuracies)]
    rows = []
    for row, seen in zip(found, accuracies, strict=True):
        looks = [
            {**row.values["rows"][-1], "rollouts": 100 * (i + 1), "validation_maj_1": a}
            for i, a in enumerate(seen)
        ]
        spent = row.needed.model_copy(update={"rollouts": needed})
        changes = {"values": {"rows": looks}, "needed": spent}
        rows.append(row.model_copy(update=changes))
    return Records(rows, records.size)


def test_rollouts_until_near_the_best_count_what_a_run_builds_on(records):
    """The looks of a run alone stood beside the rollouts of all that it builds on."""
    some = curve_of(records, [[0.2, 0.5, 0.5], [0.5, 0.5, 0.5]], needed=1000)
    assert near_its_best(some, "expert-iteration") == "1,100 to 1,200"


def test_one_seed_that_is_early_does_not_end_the_rise_of_the_others(records):
    rising = [[0.2, 0.3, 0.5]] * 3 + [[0.5, 0.5, 0.5]]
    some = curve_of(records, rising, needed=0)
    assert near_its_best(some, "expert-iteration") == "its end only, in 3 of 4 seeds"
    assert NEAR * best_of(some.rows[0]) > 0.3


def test_what_is_not_recorded_is_not_told(records):
    assert summary(Records([], records.size)) == "Not recorded yet."
    sft = Records([row for row in records.rows if row.arm == "sft"], records.size)
    for words in (summary(sft), of_its_own(sft), taken(sft)):
        assert "not recorded yet" in words
        assert "nan" not in words


def test_both_counts_of_variety_and_the_control_are_told(records):
    """Variety was told in 96 samples alone, and shares without those of SFT itself."""
    assert "in 96 samples" in taken(records)
    assert "in 1,536" in taken(records)
    assert "of SFT's own" in of_its_own(records)

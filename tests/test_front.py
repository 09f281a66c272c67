"""The README's picture: from the records alone, and the same file for the same rows."""

import re

from rlreason.experiments.records import Cell, Records, load_records
from rlreason.publishing import front
from rlreason.runs.environment import project_root


def test_the_picture_shows_what_is_recorded_and_nothing_else():
    records = load_records("tiny")
    arms = {row.arm for row in records.rows if row.measure == "greedy"}
    shown = [name for arm, name in front.ENDS.items() if arm in arms]
    axes = front.plot_ends(records).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == shown
    some = Records([row for row in records.rows if row.arm == "sft"], records.size)
    assert len(front.plot_ends(some).axes[0].get_yticklabels()) == 1
    assert front.plot_ends(Records([], records.size)) is None


def test_the_readmes_picture_is_of_the_rows_that_are_there():
    """It was of the rows before: those that came from elsewhere were left out."""
    drawn = (project_root() / front.PICTURE).read_text()
    records = load_records("tiny")
    for arm, name in front.ENDS.items():
        if (value := records.value(Cell(arm))) is not None:
            assert f"<!-- {name} -->" in drawn  # how matplotlib notes a text
            assert f"<!-- {100 * value.mean:.1f}% -->" in drawn


def test_the_readmes_numbers_are_those_of_the_rows():
    readme, records = (project_root() / "README.md").read_text(), load_records("tiny")
    named = set(front.ENDS) - {"expert-iteration-orm", "expert-iteration-orm-base"}
    means = {f"{100 * records.value(Cell(arm)).mean:.1f}%" for arm in named}
    assert set(re.findall(r"[\d.]+%", readme)) - {"95%"} == means


def test_the_same_rows_are_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(front, "project_root", lambda: tmp_path)
    (tmp_path / front.PICTURE).parent.mkdir(parents=True)
    pictures = [front.draw_front("tiny").read_bytes() for _ in range(2)]
    assert pictures[0] == pictures[1]
    monkeypatch.setattr(front, "load_records", lambda profile: Records([], "nano"))
    assert front.draw_front("tiny") is None

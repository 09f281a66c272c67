"""The paper's numbers: whole, marked, and strictly read."""

from __future__ import annotations

import pytest

from rlreason.experiments.reported import (
    ReportedTable,
    reported_points,
    reported_table,
    reported_tables,
)
from rlreason.settings import SettingsError, load_settings


def test_no_number_of_a_table_is_called_verified():
    """Nobody here has read a cell of them."""
    for table in reported_tables().values():
        assert table.provenance in ("unverified transcription", "second hand")
        for sizes in table.rows.values():
            for values in sizes.values():
                shares = table.columns != ("distinct solutions",)
                assert all(0 < value < (1 if shares else 10) for value in values)


def test_what_is_known_second_hand_agrees_with_the_transcription():
    table = reported_tables()["1"]
    for size, points in (("7B", 7), ("13B", 5)):
        ei, sft = (table.value(m, size, "maj@1") for m in ("expert iteration", "SFT"))
        assert round(100 * (ei - sft)) == points


def test_all_points_of_the_two_figures_are_there():
    points = reported_points()
    assert len(points) == 60
    assert {point.figure for point in points} == {5, 6}
    best = max(p.accuracy for p in points if p.series == "13B PPO" and p.figure == 5)
    assert best == 0.42
    for point in points:  # the axis is log10(1 + rollouts / 1000)
        assert 10**point.x - 1 == pytest.approx(
            point.rollouts / 1000, rel=0.05, abs=0.2
        )


def test_a_table_carries_its_mark():
    head, _, *lines = reported_table("1", ["SFT"], ["maj@1", "pass@96"]).splitlines()
    assert head == "| *unverified transcription* | Llama-2 | maj@1 | pass@96 |"
    assert lines == [
        "| SFT | 7B | *0.41* | *0.72* |",
        "| SFT | 13B | *0.48* | *0.84* |",
    ]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"provenance": "sure"}, "provenance"),
        ({"rows": {"SFT": {"7B": [0.4, 0.5]}}}, "SFT 7B has 2 values"),
        ({"rows": {"SFT": {"70B": [0.4]}}}, "70B"),
        ({"rows": {"SFT": {"7B": ["0.4"]}}}, "valid number"),
        ({"rows": {}}, "rows"),
        ({"row": {}}, "did you mean 'rows'"),
    ],
)
def test_what_does_not_belong_in_a_table_is_refused(change, fault):
    good = {"title": "", "provenance": "verified", "columns": ["maj@1"]}
    good["rows"] = {"SFT": {"7B": [0.4]}}
    assert load_settings(ReportedTable, good).value("SFT", "7B", "maj@1") == 0.4
    with pytest.raises(SettingsError, match=fault):
        load_settings(ReportedTable, good | change)
    with pytest.raises(SettingsError, match="no maj@96 of SFT 7B is known"):
        load_settings(ReportedTable, good).value("SFT", "7B", "maj@96")

"""The clock of the comparison with TRL, and what is said without TRL."""

from __future__ import annotations

import sys

import pytest

from rlreason import cli
from rlreason.bench import trl
from rlreason.bench.trl import Progress, summary


@pytest.fixture
def progress(monkeypatch):
    """Each training takes 10 s and each look 100; accuracies are given."""
    now = [0.0]
    monkeypatch.setattr(trl.time, "perf_counter", lambda: now[0])

    def run(*accuracies: float) -> Progress:
        told = iter(accuracies)

        def ask(policy, problems, max_new_tokens) -> float:
            now[0] += 100
            return next(told)

        monkeypatch.setattr(trl, "accuracy_of", ask)
        found = Progress([], 8, 0.5, lambda line: None, "ours")
        found.begin()
        for _ in accuracies:
            now[0] += 10
            if found.look(None):
                break
        return found

    return run


def test_the_time_is_of_training_to_the_first_of_two_good_looks(progress):
    found = progress(0.4, 0.6, 0.4, 0.55, 0.5, 0.9)
    assert found.reached == 40  # the second look was luck, and looks take no time
    assert len(found.looks) == 5  # then it stops


def test_what_is_not_reached_has_no_time(progress):
    assert progress(0.4, 0.6, 0.4).reached is None


def test_of_several_runs_the_median_counts_and_what_is_not_reached_is_last(progress):
    runs = [progress(0.6, 0.6), progress(0.4, 0.4, 0.4), progress(0.4, 0.6, 0.6)]
    runs[0].looks[1] = (120, 0.6)  # in a mean this slow phase would show
    assert summary(runs) == {"a_phase": 10, "reached": 20}
    assert summary(runs[1:]) == {"a_phase": 10, "reached": None}


def test_without_trl_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "trl"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("rlreason: rlreason bench trl needs TRL: pip install")
    assert said.count("\n") == 1

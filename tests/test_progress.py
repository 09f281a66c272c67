"""Progress in a log: when a line is written, what it says, and when there is none."""

from __future__ import annotations

import pytest
from tiny_models import PROBLEMS, tiny_policy
from toys import TOY_PROBLEMS, toy_policy

from rlreason.algorithms.finetune import FinetuneSettings
from rlreason.algorithms.sft import sft
from rlreason.policy.progress import progress_bar
from rlreason.policy.sampler import sample


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log() -> list[str]:
    return []


def work(log: list[str], units: int, seconds: float, *, done: int = 0, **options):
    """Work at so many seconds a unit."""
    clock = Clock()
    with progress_bar(
        units,
        "training",
        unit="update",
        done=done,
        write=log.append,
        clock=clock,
        **options,
    ) as progress:
        for i in range(done, units):
            clock.now += seconds
            progress.update(loss=1 / (i + 1))


def test_a_line_at_the_start_one_a_minute_and_one_at_the_end(log):
    work(log, 450, 0.5)
    assert log == [
        "training: 0 of 450 updates",
        "training: 120 of 450 updates, loss 0.008333, 2 updates/s, 02:45 left",
        "training: 240 of 450 updates, loss 0.004167, 2 updates/s, 01:45 left",
        "training: 360 of 450 updates, loss 0.002778, 2 updates/s, 00:45 left",
        "training: 450 of 450 updates, loss 0.002222, 2 updates/s, done in 03:45",
    ]


def test_slow_work_has_a_line_a_unit_and_quick_work_two(log):
    work(log, 3, 100.0)
    assert len(log) == 4
    log.clear()
    work(log, 1000, 0.001)
    assert len(log) == 2


def test_a_run_that_is_taken_up_says_where_and_reckons_with_its_own_rate(log):
    work(log, 100, 10.0, done=90)
    assert log[0] == "training: 90 of 100 updates"
    assert "96 of 100 updates, loss 0.01042, 0.1 updates/s, 00:40 left" in log[1]


def test_work_inside_other_work_and_work_that_is_not_shown_has_no_lines(log):
    with progress_bar(2, "outer", unit="phase", write=log.append) as outer:
        work(log, 5, 100.0)
        outer.update(2)
    assert [line.split(":")[0] for line in log] == ["outer", "outer"]
    log.clear()
    work(log, 5, 100.0, show=False)
    assert log == []
    work(log, 2, 1.0)  # the outer one is over
    assert len(log) == 2


def test_work_that_fails_has_no_last_line_and_silences_nothing_after_it(log):
    with pytest.raises(TypeError):
        work(log, 3, "no seconds")
    assert log == ["training: 0 of 3 updates"]
    work(log, 1, 1.0)
    assert len(log) == 3


def test_training_and_sampling_say_where_they_are_and_papermill_stays_quiet(
    capsys, monkeypatch
):
    def run() -> list[str]:
        settings = FinetuneSettings(epochs=1, batch_size=2)
        sft(toy_policy(), TOY_PROBLEMS, settings)
        sample(tiny_policy(), PROBLEMS[:2], k=3, max_new_tokens=3)
        return capsys.readouterr().err.splitlines()

    toy_policy()  # has been trained before what is looked at
    capsys.readouterr()
    lines = run()
    assert [line.split(",")[0] for line in lines] == [
        "training: 0 of 3 updates",
        "training: 3 of 3 updates",
        "sampling: 0 of 6 samples",
        "sampling: 6 of 6 samples",
    ]
    assert "loss" in lines[1]
    monkeypatch.setenv("RLREASON_QUIET", "1")
    assert run() == []

"""What algorithms write down alike: stages, rows in memory, and where they diverge."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
from toys import TOY_PROBLEMS, Memory, toy_policy, toy_recipe

from rlreason.algorithms import finetune as module
from rlreason.algorithms.expert_iteration import (
    ExpertIterationSettings,
    expert_iteration,
)
from rlreason.algorithms.finetune import FinetuneSettings
from rlreason.algorithms.optim import DivergedError
from rlreason.algorithms.ppo import BaselineSettings, PpoSettings, ppo
from rlreason.algorithms.rcrl import RcrlSettings, rcrl
from rlreason.algorithms.recorder import MemoryRecorder, NestedRecorder
from rlreason.algorithms.reward_modelling import OrmSettings, train_orm
from rlreason.algorithms.sft import sft
from rlreason.runs.plans import folder_of, obtain, plan_of

UPDATE = {"epochs": 2, "batch_size": 4, "lr": 1e-3, "lr_floor": 1e-5}


def run_sft(recorder, **update):
    return sft(
        toy_policy(), TOY_PROBLEMS, FinetuneSettings(**UPDATE | update), recorder
    )


def run_expert_iteration(recorder, **update):
    settings = ExpertIterationSettings(
        k=4,
        max_new_tokens=24,
        orm_threshold=0.0,
        finetune=FinetuneSettings(**UPDATE | update),
    )
    return expert_iteration(
        toy_policy(),
        toy_policy(),
        TOY_PROBLEMS,
        settings,
        orm=lambda rollouts: [1.0] * len(rollouts),
        recorder=recorder,
    )


def run_rcrl(recorder, **update):
    settings = RcrlSettings(
        samples=4,
        k=2,
        max_new_tokens=24,
        finetune=FinetuneSettings(**UPDATE | update),
    )
    return rcrl(toy_policy(), toy_policy(), TOY_PROBLEMS, settings, recorder=recorder)


def run_orm(recorder, **update):
    settings = OrmSettings(k=8, max_new_tokens=24, held_out=0.4, **UPDATE | update)
    return train_orm(toy_policy(), TOY_PROBLEMS, settings, recorder)


def run_ppo(recorder):
    settings = PpoSettings(
        phases=1,
        rollouts=8,
        n=2,
        max_new_tokens=24,
        batch_size=4,
        lora=None,
        credit=BaselineSettings(kind="reinforce"),
    )
    return ppo(toy_policy(), TOY_PROBLEMS, settings, recorder=recorder)


SUPERVISED = [run_sft, run_expert_iteration, run_rcrl, run_orm]


# Divergence


@pytest.mark.parametrize("run", SUPERVISED)
def test_a_learning_rate_without_measure_stops_and_keeps_what_was_good(run):
    recorder = Memory()
    with pytest.raises(DivergedError) as stopped:
        run(recorder, lr=1e30)
    message = str(stopped.value)
    assert "not a finite number" in message or "not finite" in message
    assert "update" in message
    assert "Lower lr (now 1e+30)" in message
    assert "\n" not in message
    tensors, _, _ = recorder.saved or ({}, "", 0)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    for row in recorder.rows:
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))


def test_the_last_good_checkpoint_is_named(monkeypatch):
    # The gradient of update 4 is none
    recorder, updates, whole = Memory(), iter(range(10)), module.nll

    def breaks(policy, batch):
        return whole(policy, batch) * (math.nan if next(updates) == 3 else 1.0)

    toy_policy()  # is trained once, and by the same function
    monkeypatch.setattr(module, "nll", breaks)
    with pytest.raises(
        DivergedError,
        match=r"update 4: loss, grad_norm are not finite.*checkpoint, after update 3",
    ):
        run_sft(recorder, batch_size=2, micro_tokens=9999)  # no look at memory
    assert json.loads(recorder.saved[1]) == {"updates": 3}


def test_expert_iteration_says_in_which_round_and_what_is_left_of_it():
    recorder, base = Memory(), toy_policy()
    settings = ExpertIterationSettings(
        k=4, max_new_tokens=24, finetune=FinetuneSettings(**UPDATE)
    )

    def spoil(round_, policy):
        base.model.get_input_embeddings().weight.data.fill_(math.nan)
        return {}

    with pytest.raises(
        DivergedError, match=r"round 2, update 1: loss.*The policy of round 1 is in"
    ):
        expert_iteration(
            toy_policy(),
            base,
            TOY_PROBLEMS,
            settings,
            recorder=recorder,
            on_round=spoil,
        )
    assert json.loads(recorder.saved[1])["round"] == 1


def test_a_run_that_diverged_is_not_done_and_has_no_weights(tmp_path):
    recipe = toy_recipe(tmp_path, sft={**UPDATE, "lr": 1e30})
    plan = plan_of("sft", recipe)
    with pytest.raises(DivergedError, match="no checkpoint of this training"):
        obtain(plan)
    run = folder_of(plan)
    assert run.status["status"] == "failed"
    assert run.status["error"].startswith("DivergedError: update")
    assert run.restore() is None
    assert None not in [value for row in run.metrics for value in row.values()]


# Stages


class Stages(MemoryRecorder):
    """Notes the stages between rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = {}
        self.running: list[str] = []
        self.passed: set[str] = set()

    @contextmanager
    def clock(self, stage):
        assert not self.running, f"{stage} inside {self.running}"
        self.running.append(stage)
        yield
        self.passed.add(self.running.pop())

    def log(self, kind, **metrics):
        super().log(kind, **metrics)
        self.seen.setdefault(kind, set()).update(self.passed)
        self.passed.clear()


@pytest.mark.parametrize(
    ("run", "stages"),
    [
        (run_sft, {"update": {"learning"}}),
        (run_ppo, {"phase": {"sampling", "scoring", "learning"}}),
        (
            run_expert_iteration,
            {"update": {"sampling", "scoring", "learning"}, "round": set()},
        ),
        (
            run_rcrl,
            {"sample": {"sampling"}, "label": {"scoring"}, "update": {"learning"}},
        ),
        (
            run_orm,
            {"sample": {"sampling"}, "update": {"learning"}, "held_out": {"scoring"}},
        ),
    ],
)
def test_the_stages_have_one_set_of_names_in_all_algorithms(run, stages):
    recorder = Stages()
    run(recorder)
    assert recorder.seen == stages


# Recorders


def test_a_part_writes_into_the_recorder_of_the_whole():
    outer = Memory()
    inner = NestedRecorder(
        outer, tensors={"data": torch.ones(2)}, state={"round": 1}, round=2
    )
    assert inner.restore() is None
    inner.log("update", loss=1.0)
    assert outer.rows == [{"kind": "update", "round": 2, "loss": 1.0}]
    assert inner.due()
    inner.save({"model": torch.zeros(1)}, {"updates": 3})
    assert not inner.due()
    saved = outer.restore()
    assert set(saved.tensors) == {"data", "model"}
    assert saved.state == {"round": 1, "updates": 3}
    assert NestedRecorder(outer, saved=saved).restore() is saved


def test_memory_restores_as_a_run_folder_does():
    recorder, weight = Memory(save_every=2), torch.ones(2)
    recorder.log("update", loss=1.0)
    assert not recorder.due()
    assert recorder.restore() is None
    assert recorder.rows == []  # what was logged before the first save is taken back
    recorder.log("update", loss=1.0)
    recorder.save({"w": weight}, {"pair": (1, 2)})
    recorder.log("update", loss=0.5)
    weight.zero_()
    saved = recorder.restore()
    assert saved.tensors["w"].tolist() == [1.0, 1.0]
    assert saved.state == {"pair": [1, 2]}  # as JSON holds it
    assert [row["loss"] for row in recorder.rows] == [1.0]
    saved.tensors["w"].zero_()
    assert recorder.restore().tensors["w"].tolist() == [1.0, 1.0]

"""Memory that ends: on a CPU, too, the work goes on in pieces of half the size."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PROBLEMS, tiny_policy

from rlreason.algorithms.batching import Example, tokens_that_fit
from rlreason.policy import passes, sampler
from rlreason.policy.cohort import Cohort
from rlreason.policy.cohort_engine import CohortEngine
from rlreason.policy.logprobs import trunk_of
from rlreason.policy.memory import checkpointing, out_of_memory, within_memory
from rlreason.policy.packing import packs
from rlreason.policy.sampler import sample
from rlreason.policy.slot_engine import SlotEngine


def too_much(*_, **__) -> None:
    """As torch says it on a CPU: in a class that many other faults have."""
    torch.empty(2**50, dtype=torch.uint8)


def test_whoever_says_that_memory_ended_is_understood_and_other_faults_are_not():
    with pytest.raises(RuntimeError) as caught:
        too_much()
    assert not isinstance(caught.value, torch.OutOfMemoryError)
    assert out_of_memory(caught.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(torch.AcceleratorError("CUDA error: out of memory\nSearch"))
    refused = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"
    assert out_of_memory(RuntimeError(refused))
    assert not out_of_memory(torch.AcceleratorError("CUDA error: device-side assert"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not out_of_memory(ValueError("DefaultCPUAllocator"))


def test_work_goes_on_with_half_and_other_faults_go_through():
    tried = []

    def work(max_tokens: int) -> str:
        tried.append(max_tokens)
        if max_tokens > 3:
            too_much()
        return "done"

    assert within_memory(work, 8, undo=lambda: None) == ("done", 2)
    assert tried == [8, 4, 2]
    with pytest.raises(ValueError, match="one example at once"):
        within_memory(too_much, 8, undo=lambda: None)
    with pytest.raises(RuntimeError, match="tensor size"):
        within_memory(lambda **_: torch.ones(2) @ torch.ones(3), 8, undo=tried.clear)
    assert tried == [8, 4, 2]  # not undone, as it was not tried again


@pytest.mark.parametrize(
    ("engine", "step"), [(CohortEngine, "decode"), (SlotEngine, "admit")]
)
def test_sampling_goes_on_in_half_of_the_memory(engine, step, monkeypatch, capsys):
    monkeypatch.setitem(sampler.ENGINES, "cpu", engine)
    policy, options = tiny_policy(), {"k": 4, "max_new_tokens": 8}
    expected = sample(policy, PROBLEMS, **options)
    whole, refused = getattr(engine, step), []

    def small(self):
        whole(self)  # what it has done is there already
        if not refused:
            refused.append(self.budget)
            too_much()

    monkeypatch.setattr(engine, step, small)
    assert sample(policy, PROBLEMS, **options) == expected
    assert len(refused) == 1
    assert capsys.readouterr().err.count("sampling goes on with") == 1


@pytest.mark.parametrize("behind", [False, True])
def test_no_answer_is_lost_where_memory_ends_behind_one_that_has_ended(
    behind, monkeypatch
):
    policy = replace(tiny_policy(), more_eos_ids=tuple(range(40, 60)))
    options = {"k": 4, "max_new_tokens": 40, "temperature": 1.5}

    def drawn():
        rollouts = sample(policy, PROBLEMS, **options)
        return [(r.problem_id, r.sample, r.tokens, r.finished) for r in rollouts]

    expected = drawn()
    regroup, refused = Cohort.regroup, []

    def small(self):
        if not refused and bool(self.answered) == behind:
            refused.append(self)
            too_much()
        regroup(self)

    monkeypatch.setattr(Cohort, "regroup", small)
    assert drawn() == expected
    assert refused


def test_a_model_is_no_stranger_because_memory_ended(monkeypatch):
    trunk = trunk_of(tiny_policy().model)
    monkeypatch.setattr("rlreason.policy.packing._hidden", too_much)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        packs(trunk, 0)
    with (
        pytest.raises(RuntimeError, match="DefaultCPUAllocator"),
        passes._named("a fault"),
    ):
        too_much()


def test_what_does_not_fit_at_all_is_left_to_whoever_learns_it():
    assert tokens_that_fit(too_much, [Example((1, 2), (3,))]) == 3


@pytest.mark.parametrize("name", ["activation", "gradient"])
def test_checkpointing_has_one_name_or_the_other(name):
    model = SimpleNamespace(**{f"{name}_checkpointing_enable": "found"})
    assert checkpointing(model, "enable") == "found"

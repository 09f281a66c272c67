"""Compiled layers: the same gradients, one graph for all layers and lengths."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from tiny_models import tiny_policy
from torch._dynamo.utils import counters
from toys import TOY_PROBLEMS, toy_policy

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import FinetuneSettings, accumulate_gradients
from rlreason.algorithms.ppo import GaeSettings, Learner, PpoSettings
from rlreason.algorithms.sft import sft
from rlreason.policy import compiling
from rlreason.policy.compiling import compiled_layers
from rlreason.policy.sampler import sample


@pytest.fixture
def backend() -> str:
    """What is captured is carried out as it stands."""
    return "eager"


@pytest.fixture(autouse=True)
def no_code_is_generated(monkeypatch, backend):
    """The compiler without its last part, which needs another compiler and time."""
    torch._dynamo.reset()
    counters.clear()
    there = partial(torch.compile, backend=backend)
    monkeypatch.setattr(compiling.torch, "compile", there)


def examples(*lengths: int) -> list[Example]:
    """No two of which begin alike."""
    return [
        Example((n, i, *range(3, 3 + n)), (40 + n, 50, 2))
        for i, n in enumerate(lengths)
    ]


BATCHES = [examples(5, 9, 2), examples(7, 6), examples(3, 3, 8, 20, 1), examples(11, 4)]


def gradients(policy, batch) -> torch.Tensor:
    accumulate_gradients(policy, batch, 10_000)
    found = torch.cat([w.grad.flatten() for w in policy.model.parameters()])
    policy.model.zero_grad(set_to_none=True)
    return found


def test_gradients_are_the_same_and_one_graph_serves_all_and_outlives_none():
    policy = tiny_policy("qwen2")
    expected = [gradients(policy, batch) for batch in BATCHES]
    counters.clear()
    for batch, right in zip(BATCHES, expected, strict=True):
        with compiled_layers(policy.model, compiled=True):
            found = gradients(policy, batch)
        assert (found - right).abs().max() < 1e-5 * right.abs().max()
    # Of one layer for any length: neither of each layer nor of each batch
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # And what was compiled keeps no model alive
    layer = weakref.ref(policy.model.model.layers[0])
    del policy
    gc.collect()
    assert layer() is None


def test_outside_nothing_is_compiled():
    policy = tiny_policy()
    with compiled_layers(policy.model, compiled=True):
        gradients(policy, BATCHES[0])
    counters.clear()
    torch._dynamo.reset()
    gradients(policy, BATCHES[1])
    sample(policy, TOY_PROBLEMS[:2], max_new_tokens=4)
    with compiled_layers(policy.model, compiled=False):
        gradients(policy, BATCHES[2])
    assert not counters["stats"]
    assert not any(
        "_compiled" in name for name in policy.model.state_dict()
    )  # names of weights stay


@pytest.mark.parametrize("backend", ["aot_eager"])  # its graphs of gradients too
def test_fine_tuning_learns_the_same():
    settings = FinetuneSettings(epochs=1, batch_size=2, lr=1e-3)
    plain = sft(toy_policy(), TOY_PROBLEMS[:4], settings)
    counters.clear()
    compiled = settings.model_copy(update={"compile": True})
    found = sft(toy_policy(), TOY_PROBLEMS[:4], compiled)
    assert counters["stats"]["unique_graphs"] >= 1
    for right, weight in zip(
        plain.model.parameters(), found.model.parameters(), strict=True
    ):
        assert torch.allclose(weight, right, atol=1e-4)


def test_ppo_scores_and_learns_through_them():
    rollouts = sample(toy_policy(), TOY_PROBLEMS[:4], k=2, max_new_tokens=8)
    value = {"kind": "branch", "layers": 1}
    scored = []
    for compiled in (False, True):
        settings = PpoSettings(
            rollouts=8,
            n=2,
            lora=None,
            compile=compiled,
            credit=GaeSettings(value=value),
        )
        counters.clear()
        learner = Learner(toy_policy(), TOY_PROBLEMS[:4], settings)
        scored.append(learner.score(rollouts))
        assert bool(counters["stats"]["unique_graphs"]) == compiled
    plain, found = scored
    assert torch.allclose(found.logprobs, plain.logprobs, atol=1e-5)
    assert torch.allclose(found.values, plain.values, atol=1e-5)

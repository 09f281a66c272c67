"""Sequences end to end: exact, never across examples, and fewer calls of operators."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_models import KINDS, tiny_policy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from rlreason.algorithms import batching
from rlreason.algorithms.batching import Example, tokens_that_fit
from rlreason.algorithms.finetune import accumulate_gradients, nll
from rlreason.policy import packing
from rlreason.policy.logprobs import pad_batch, response_logits, trunk_of
from rlreason.policy.packing import Inputs, pack

PROMPTS = [[1, 40, 50, 60], [1, 41], [1, 90, 95], [1, 42, 43]]
RESPONSES = [[70, 71, 72, 2], [73, 2], [80, 81, 82, 83, 84, 2], [2]]
BATCH = [Example(tuple(p), tuple(r)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]


def gradients(policy) -> Tensor:
    found = torch.cat([w.grad.flatten() for w in policy.model.parameters()])
    policy.model.zero_grad(set_to_none=True)
    return found


def one_at_a_time(policy) -> tuple[float, Tensor]:
    """Loss and gradient of the batch, each example a plain pass of the model's own."""
    count, total = sum(map(len, RESPONSES)), 0.0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = policy.model(torch.tensor([prompt + response])).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        loss = -logprobs[range(len(response)), response].sum() / count
        loss.backward()
        total += loss.item()
    return total, gradients(policy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_batch_has_the_loss_and_gradient_of_its_examples_alone(kind):
    policy = tiny_policy(kind)
    loss, expected = one_at_a_time(policy)
    assert "packed" in pad_batch(PROMPTS, RESPONSES).inputs(policy.model).options
    found = accumulate_gradients(policy, BATCH, 10_000)
    assert found == pytest.approx(loss, rel=1e-5)
    scale = expected.abs().max()
    assert (gradients(policy) - expected).abs().max() < 1e-5 * scale


def test_attention_across_examples_would_be_seen():
    policy = tiny_policy()
    batch = pad_batch(PROMPTS, RESPONSES)
    right = batch.inputs(policy.model)
    # Wrong: one sequence as far as attention is concerned, positions as they are
    across = pack(batch.tokens, [len(batch.tokens)]).options["packed"]
    wrong = Inputs(right.input_ids, right.options | {"packed": across}, right.starts)
    logits = [response_logits(policy.model, batch, each) for each in (right, wrong)]
    apart = (logits[0] - logits[1]).abs().amax(-1)
    assert apart[batch.rows == 0].max() < 1e-5  # the first has nothing before it
    assert apart[batch.rows == 1].max() > 1e-3


@pytest.mark.parametrize("why", ["eager", "window", "leak"])
def test_a_model_that_does_not_pack_gets_padded_rows(why, monkeypatch):
    policy = tiny_policy()
    model = policy.model
    loss, expected = one_at_a_time(policy)
    if why == "eager":
        model.set_attn_implementation("eager")
    elif why == "window":
        model.config.sliding_window = 6  # some sequences are longer
    else:  # a family that looks across sequences is found out

        def leaky(ids: Tensor, _) -> Inputs:
            return pack(ids, [len(ids)])

        monkeypatch.setattr(packing, "pack", leaky)
    own = model.config._attn_implementation
    inputs = pad_batch(PROMPTS, RESPONSES).inputs(model)
    assert inputs.input_ids.shape == (4, 9)
    if why != "window":
        assert trunk_of(model).config._attn_implementation == own
    assert accumulate_gradients(policy, BATCH, 10_000) == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(gradients(policy), expected, atol=1e-5)


class Calls(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


def test_an_update_of_64_examples_at_30_layers_takes_a_third_of_the_calls(monkeypatch):
    """53,265 were counted with padded micro-batches of 1,024 tokens, 8,803 now."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        num_hidden_layers=30,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
    )
    policy = replace(tiny_policy(), model=LlamaForCausalLM(config))
    sizes = torch.randint(54, 167, (64,), generator=torch.Generator().manual_seed(0))
    batch = [
        Example(tuple(range(3, 3 + n // 2)), tuple(range(3, 3 + n - n // 2)))
        for n in sizes.tolist()
    ]
    monkeypatch.setattr(batching, "CPU_ROOM", 2**30)  # a GPU has more
    max_tokens = tokens_that_fit(partial(nll, policy), batch)
    with Calls() as calls:
        accumulate_gradients(policy, batch, max_tokens)
    assert calls.count < 53_265 / 3


def test_what_fits_grows_with_the_room_and_adds_no_gradient(monkeypatch):
    policy = tiny_policy()
    loss = partial(nll, policy)
    some = tokens_that_fit(loss, BATCH)
    monkeypatch.setattr(batching, "CPU_ROOM", 2 * batching.CPU_ROOM)
    assert tokens_that_fit(loss, BATCH) == pytest.approx(2 * some, abs=1)
    assert all(weight.grad is None for weight in policy.model.parameters())

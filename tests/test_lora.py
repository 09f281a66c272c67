"""LoRA: the policy acts as before it is trained, and stays its own reference."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import KINDS, PROBLEMS, tiny_policy
from torch import Tensor
from toys import weights

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import FinetuneSettings, finetune
from rlreason.algorithms.optim import adamw
from rlreason.algorithms.recorder import MemoryRecorder
from rlreason.policy.load import Policy, PolicyError
from rlreason.policy.logprobs import pad_batch, response_logits
from rlreason.policy.lora import (
    LoraSettings,
    adapters_off,
    merge_adapters,
    trainable_weights,
    with_lora,
)
from rlreason.policy.sampler import sample
from rlreason.policy.value import score
from rlreason.policy.weights import load_tensors, trainable_tensors

# peft asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")

PROMPTS = [[1, 20, 30], [1, 7, 8, 9, 10, 11], [1], [1, 50, 60, 70]]
RESPONSES = [[40, 41, 42, 43, 2], [44, 2], [45, 0, 2, 46, 47], [2]]


def train(policy: Policy, *, by: float = 0.1, seed: int = 0) -> Policy:
    """Stand-in for training: move all trainable weights."""
    generator = torch.Generator().manual_seed(seed)
    for weight in trainable_tensors(policy.model).values():
        noise = torch.randn(weight.shape, generator=generator)
        weight.add_(by * noise)
    return policy


def sft_adapter(kind: str = "llama") -> Policy:
    """A policy as peft loads it after SFT: the base with a trained adapter on it."""
    policy = tiny_policy(kind)
    target = "c_attn" if kind == "gpt2" else "q_proj"
    config = LoraConfig(
        r=4,
        target_modules=[target],
        modules_to_save=["lm_head"],
        lora_dropout=0.5,
        fan_in_fan_out=kind == "gpt2",
    )
    with torch.random.fork_rng():
        adapted = get_peft_model(policy.model, config).eval()
    return train(replace(policy, model=adapted), seed=1)


@torch.no_grad()
def log_distributions(policy: Policy) -> Tensor:
    """(N, V), float64."""
    logits = response_logits(policy.model, pad_batch(PROMPTS, RESPONSES))
    return logits.double().log_softmax(-1)


def kl(one: Tensor, other: Tensor) -> float:
    """The largest KL divergence of the N distributions (N, V), in nats."""
    return (one.exp() * (one - other)).sum(-1).max().item()


def full_fine_tuning(policy: Policy) -> Policy:
    return merge_adapters(policy)


def new_adapter_on_merged_weights(policy: Policy) -> Policy:
    return with_lora(merge_adapters(policy), rank=4, alpha=8)


def continued_adapter(policy: Policy) -> Policy:
    return with_lora(policy, rank=4, alpha=8, targets="all-linear")


@pytest.mark.parametrize(
    "start",
    [full_fine_tuning, new_adapter_on_merged_weights, continued_adapter],
)
@pytest.mark.parametrize("kind", KINDS)
def test_p34_policy_and_reference_are_the_sft_policy_at_step_0(kind, start):
    sft = log_distributions(sft_adapter(kind))
    policy = start(sft_adapter(kind))
    frozen = policy.clone() if start is full_fine_tuning else policy
    off = nullcontext if frozen is not policy else lambda: adapters_off(policy.model)

    def of_reference() -> Tensor:
        with off():
            return log_distributions(frozen)

    assert abs(kl(log_distributions(policy), of_reference())) < 1e-6
    assert abs(kl(of_reference(), sft)) < 1e-6
    train(policy)
    assert kl(log_distributions(policy), of_reference()) > 1e-2
    assert abs(kl(of_reference(), sft)) < 1e-6


def test_p34_wrong_an_sft_adapter_that_is_not_merged_makes_the_base_the_reference():
    policy = sft_adapter()
    sft = log_distributions(policy)
    with adapters_off(policy.model):
        assert kl(log_distributions(policy), sft) > 1e-2


def test_p35_adapters_are_on_again_after_an_error():
    policy = with_lora(tiny_policy(), rank=4, alpha=8)
    train(policy)
    acting, names = log_distributions(policy), [*trainable_tensors(policy.model)]

    def fail() -> None:
        assert not torch.equal(log_distributions(policy), acting)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), adapters_off(policy.model):
        fail()
    assert torch.equal(log_distributions(policy), acting)
    assert [*trainable_tensors(policy.model)] == names
    # Wrong: off and on in two calls, with what may fail between them
    policy.model.base_model.disable_adapter_layers()
    with pytest.raises(ZeroDivisionError):
        fail()
    assert not torch.equal(log_distributions(policy), acting)


def test_adapters_stay_off_until_the_outermost_use_is_over():
    policy = train(with_lora(tiny_policy(), rank=4, alpha=8))
    acting = log_distributions(policy)
    with adapters_off(policy.model):
        reference = log_distributions(policy)
        with adapters_off(policy.model):
            pass
        assert torch.equal(log_distributions(policy), reference)
    assert torch.equal(log_distributions(policy), acting)


def test_p35_the_reference_gets_no_gradient():
    policy = train(with_lora(tiny_policy(), rank=4, alpha=8, targets="all-linear"))
    with adapters_off(policy.model):
        ref_logprobs = score(policy, PROMPTS, RESPONSES).logprobs
    assert not ref_logprobs.requires_grad
    scores = score(policy, PROMPTS, RESPONSES)
    (scores.logprobs - ref_logprobs).square().sum().backward()
    for name, weight in policy.model.named_parameters():
        assert (weight.grad is not None) == ("lora_" in name), name


@pytest.mark.parametrize("kind", KINDS)
def test_p6_training_mode_gives_the_probabilities_of_sampling(kind):
    """Also for a policy that came with dropout in its adapter."""
    policy = train(with_lora(sft_adapter(kind), rank=4, alpha=8))
    in_eval = log_distributions(policy)
    policy.model.train()
    assert torch.equal(log_distributions(policy), in_eval)
    came_with_dropout = sft_adapter(kind)
    in_eval = log_distributions(came_with_dropout)
    came_with_dropout.model.train()
    with torch.random.fork_rng():
        assert kl(log_distributions(came_with_dropout), in_eval) > 1e-3


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_p50_gradients_do_not_change_with_gradient_checkpointing(kind, adapted):
    found = []
    for checkpointing in (False, True):
        policy = tiny_policy(kind)
        if adapted:
            policy = train(with_lora(policy, rank=4, alpha=8, targets="all-linear"))
        if checkpointing:
            policy.model.activation_checkpointing_enable({"use_reentrant": False})
        policy.model.train()
        scores = score(policy, PROMPTS, RESPONSES)
        (scores.logprobs + scores.entropy).square().sum().backward()
        weights = [w for w in policy.model.parameters() if w.requires_grad]
        assert all(w.grad is not None and w.grad.abs().max() > 0 for w in weights)
        found.append([w.grad for w in weights])
    for plain, again in zip(*found, strict=True):
        assert torch.allclose(plain, again, atol=1e-4, rtol=1e-4)


def test_p50_wrong_reentrant_checkpointing_stops_at_a_frozen_embedding():
    policy = train(with_lora(tiny_policy(), rank=4, alpha=8))
    policy.model.activation_checkpointing_enable({"use_reentrant": True})
    policy.model.disable_input_require_grads()  # which transformers 5 sees to itself
    policy.model.train()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        logprobs = score(policy, PROMPTS, RESPONSES).logprobs
    assert not logprobs.requires_grad


def test_p7_the_sampler_draws_from_the_adapters_as_they_are_now():
    policy = with_lora(tiny_policy(), rank=4, alpha=8, targets="all-linear")
    options = {"temperature": 0.7, "max_new_tokens": 12, "seed": 3}

    def drawn(policy: Policy) -> list[tuple[int, ...]]:
        return [rollout.tokens for rollout in sample(policy, PROBLEMS, **options)]

    at_start = drawn(policy)
    assert at_start == drawn(tiny_policy())
    for seed in range(2):
        train(policy, seed=seed)
        moved = sample(policy, PROBLEMS, **options)
        scores = score(
            policy,
            [rollout.prompt_tokens for rollout in moved],
            [rollout.tokens for rollout in moved],
            temperature=0.7,
        )
        sampled = torch.tensor([x for rollout in moved for x in rollout.logprobs])
        found = scores.logprobs[scores.response_mask]
        assert torch.allclose(found, sampled, atol=1e-4)
    with adapters_off(policy.model):
        assert drawn(policy) == at_start


def test_only_adapters_are_trained_and_kept():
    policy = with_lora(tiny_policy(), rank=2, alpha=4, new_tokens=[40])
    before = copy.deepcopy(policy.model.state_dict())
    kept = trainable_tensors(policy.model)
    assert all("lora_" in name or "trainable_tokens" in name for name in kept)
    assert any("trainable_tokens" in name for name in kept)
    train(policy)
    for name, weight in policy.model.state_dict().items():
        assert torch.equal(weight, before[name]) == (name not in kept), name

    other = with_lora(tiny_policy(), rank=2, alpha=4, new_tokens=[40], seed=1)
    assert kl(log_distributions(policy), log_distributions(other)) > 1e-3
    load_tensors(trainable_tensors(other.model), kept, of=other.model)
    assert torch.equal(log_distributions(policy), log_distributions(other))


def test_adapters_come_from_their_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (
        trainable_tensors(with_lora(tiny_policy(), rank=2, alpha=4, seed=seed).model)
        for seed in (5, 5, 6)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_p33_small_updates_of_adapters_in_half_precision_are_not_lost():
    policy = tiny_policy()
    policy.model.bfloat16()
    policy = with_lora(policy, rank=2, alpha=4)
    learning = trainable_weights(policy.model)
    assert {weight.dtype for weight in learning} == {torch.bfloat16}
    assert score(policy, PROMPTS, RESPONSES).logprobs.isfinite().all()
    ones = learning[0]
    with torch.no_grad():
        ones.fill_(1.0)

    def after(optimizer) -> float:
        """The weight after 100 updates, each by a tenth of what it can resolve."""
        for _ in range(100):
            ones.grad = torch.ones_like(ones)
            optimizer.step()
        moved = 1.0 - float(ones.detach().mean())
        with torch.no_grad():
            ones.fill_(1.0)
        return moved

    settings = {"lr": 4e-4, "weight_decay": 0.0}
    assert after(adamw([ones], **settings)) == pytest.approx(0.04, rel=0.05)
    assert after(torch.optim.AdamW([ones], **settings)) == 0.0  # without masters


def test_merged_weights_act_as_the_adapters_did():
    policy = train(with_lora(tiny_policy(), rank=4, alpha=8, new_tokens=[40]))
    acting = log_distributions(policy)
    merged = merge_adapters(policy)
    assert abs(kl(log_distributions(merged), acting)) < 1e-6
    assert not any("lora" in name for name in merged.model.state_dict())
    assert all(weight.requires_grad for weight in merged.model.parameters())
    assert merge_adapters(merged) is merged


def test_modules_that_are_not_there_are_named():
    with pytest.raises(PolicyError, match="all-linear"):
        with_lora(tiny_policy(), rank=2, alpha=4, targets=["c_attn"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_add_alpha_over_rank_times_b_a(kind):
    before = weights(tiny_policy(kind))
    policy = with_lora(tiny_policy(kind), rank=4, alpha=10.0, targets="all-linear")
    generator = torch.Generator().manual_seed(0)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, weight in trainable_tensors(policy.model).items():
        weight.copy_(torch.randn(weight.shape, generator=generator))
        place, factor = name.removeprefix("base_model.model.").split(".lora_")
        pairs.setdefault(f"{place}.weight", {})[factor[0]] = weight.clone()
    merged = weights(merge_adapters(policy))
    assert merged.keys() == before.keys()
    assert pairs.keys() == {
        name for name in merged if not merged[name].equal(before[name])
    }
    for name, pair in pairs.items():
        a, b = pair["A"], pair["B"]  # (rank, in), (out, rank)
        assert a.shape[0] == b.shape[1] == 4
        product = b @ a  # (out, in)
        # GPT-2 stores its matrices the other way round
        product = product.T if kind == "gpt2" else product
        delta = merged[name] - before[name]
        assert torch.allclose(delta, 10.0 / 4 * product, atol=1e-4), name
        for wrong in (10.0, 4 / 10.0, 10.0 / 4**0.5, 1.0):
            assert not torch.allclose(delta, wrong * product, atol=1e-4)


# Fine-tuning

EXAMPLES = [
    Example(tuple(prompt), tuple(response))
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
]
LEARN = FinetuneSettings(
    epochs=20,
    batch_size=4,
    lr=1e-2,
    lr_floor=1e-3,
    lora=LoraSettings(rank=4, alpha=8.0),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fine_tuned_adapters_end_in_the_weights(dtype):
    policy, recorder = tiny_policy(), MemoryRecorder()
    policy.model.to(dtype)
    before = weights(policy)
    tuned = finetune(policy, EXAMPLES, LEARN, recorder)
    losses = [row["loss"] for row in recorder.rows]
    assert losses[-1] < 0.5 * losses[0]
    assert tuned.model is policy.model
    after = weights(tuned)
    assert after.keys() == before.keys()
    moved = {name for name in after if not after[name].equal(before[name])}
    assert {name.split(".")[-2] for name in moved} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert {tensor.dtype for tensor in after.values()} == {dtype}


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_learn_beside_adapters(tied):
    new = [40, 41]

    def rows(new_tokens: list[int]) -> tuple[Tensor, Tensor]:
        policy = tiny_policy()
        if tied:
            policy.model.config.tie_word_embeddings = True
            policy.model.tie_weights()
        table = policy.model.get_input_embeddings().weight
        before = table.detach().clone()
        examples = [Example((1, *new, 30), (50, 2))]
        tuned = finetune(policy, examples, LEARN, new_tokens=new_tokens)
        after = tuned.model.get_input_embeddings().weight.detach()
        assert tuned.model.get_output_embeddings().weight.equal(after) == tied
        return before, after

    before, after = rows(new)
    moved = (before != after).any(1).nonzero().flatten().tolist()
    assert moved == new
    before, after = rows([])  # wrong for words that the model has never seen
    assert before.equal(after)

"""The optimiser: masters of weights in half precision, rates, and exact loading.

Each test holds the neighbour that it could be taken for: rounded weights in place of
exact ones, a part of the state that is not saved.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import pytest
import torch
from margins import effect
from tiny_models import tiny_policy
from torch import Tensor, nn
from toys import (
    TOY_PROBLEMS,
    InterruptedRunError,
    Memory,
    examples_of,
    same_bits,
    toy_policy,
    toy_solutions,
    weights,
)

from rlreason import sample
from rlreason.algorithms import ppo as ppo_module
from rlreason.algorithms.finetune import FinetuneSettings, finetune
from rlreason.algorithms.optim import (
    MasterAdamW,
    adamw,
    largest_weight,
    load_optimizer_tensors,
    optimizer_tensors,
    set_lr,
)
from rlreason.algorithms.ppo import GaeSettings, PpoSettings, ppo
from rlreason.policy.load import Policy
from rlreason.policy.value import ValueSettings
from rlreason.policy.weights import load_model_tensors
from rlreason.rewards.sparse import sparse_token_rewards

# Masters of weights in half precision

OPTIONS = {"lr": 1e-6, "betas": (0.9, 0.95), "weight_decay": 0.1}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that bfloat16 holds exactly, as float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().float()


def step(optimizer, pairs: list[tuple[nn.Parameter, Tensor]], times: int = 1) -> None:
    """Updates from a constant gradient."""
    for _ in range(times):
        for weight, gradient in pairs:
            weight.grad = gradient.to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert all(weight.grad is None for weight, _ in pairs)


def test_p33_masters_move_as_float32_weights_do_and_the_model_follows():
    start, beside = random(2000), random(50, seed=1)
    gradients = random(2000, seed=2), random(50, seed=3)

    def trained(dtype: torch.dtype, make) -> tuple[Any, nn.Parameter, nn.Parameter]:
        pair = nn.Parameter(start.clone().to(dtype)), nn.Parameter(beside.clone())
        optimizer = make(list(pair), **OPTIONS)
        places = [weight.data_ptr() for weight in pair]
        step(optimizer, list(zip(pair, gradients, strict=True)), times=100)
        assert [weight.data_ptr() for weight in pair] == places
        return optimizer, *pair

    plain = partial(torch.optim.AdamW, fused=True)
    _, full, full_beside = trained(torch.float32, plain)
    assert 0.9e-4 < (full - start).abs().mean() < 1.1e-4
    optimizer, rounded, same = trained(torch.bfloat16, adamw)
    assert isinstance(optimizer, MasterAdamW)
    assert list(optimizer.masters) == [0]  # what is float32 has none
    assert optimizer.masters[0].dtype == torch.float32
    assert optimizer.masters[0].equal(full)
    assert rounded.dtype == torch.bfloat16
    assert rounded.equal(full.bfloat16())
    assert same.equal(full_beside)
    # Wrong: the update is made to the rounded weights, and rounded away
    _, stuck, _ = trained(torch.bfloat16, plain)
    assert (stuck == start).float().mean() > 0.99
    assert (rounded != start).float().mean() > 2 * (stuck != start).float().mean()
    # Where all weights are float32 there is nothing to keep
    optimizer, *_ = trained(torch.float32, adamw)
    assert type(optimizer) is torch.optim.AdamW


def test_masters_learn_at_the_rate_of_their_group():
    weights_ = [nn.Parameter(random(50).bfloat16()) for _ in range(2)]
    groups = [{"params": [weights_[0]]}, {"params": [weights_[1]], "lr_scale": 10.0}]
    optimizer = adamw(groups, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    set_lr(optimizer, 1e-4)
    step(optimizer, [(weight, torch.ones(50)) for weight in weights_])
    by = [(random(50) - optimizer.masters[i]).mean().item() for i in (0, 1)]
    assert by == pytest.approx([1e-4, 1e-3], rel=1e-2)


@pytest.mark.parametrize("lost", [None, "master", "exp_avg_sq"])
def test_an_optimiser_that_comes_back_goes_on_to_the_bit(lost):
    def fresh(start: list[Tensor]) -> tuple[list[nn.Parameter], torch.optim.AdamW]:
        pair = [nn.Parameter(tensor.clone()) for tensor in start]
        groups = [{"params": [weight]} for weight in pair]
        return pair, adamw(groups, **OPTIONS | {"lr": 1e-4})

    gradients = random(200, seed=2), random(50, seed=3)
    pair, optimizer = fresh([random(200).bfloat16(), random(50, seed=1)])
    step(optimizer, list(zip(pair, gradients, strict=True)), times=5)
    kept = {k: t.clone() for k, t in optimizer_tensors(optimizer, "adamw").items()}
    assert "adamw.0.master" in kept
    assert "adamw.1.master" not in kept
    again, resumed = fresh([weight.detach() for weight in pair])
    if lost:  # the wrong version: a part of the state is not saved
        fresh_state = {"master": resumed.masters[0].clone(), "exp_avg_sq": None}[lost]
        name = f"adamw.0.{lost}"
        kept[name] = torch.zeros(200) if fresh_state is None else fresh_state
    load_optimizer_tensors(resumed, "adamw", kept)
    for weights_, each in ((pair, optimizer), (again, resumed)):
        step(each, list(zip(weights_, gradients, strict=True)), times=5)
    one, other = (optimizer_tensors(each, "adamw") for each in (optimizer, resumed))
    assert same_bits(one, other) is (lost is None)
    assert again[1].equal(pair[1])
    if not lost:
        assert again[0].equal(pair[0])


def coarse(policy: Policy, dtype: torch.dtype = torch.bfloat16) -> Policy:
    """A clone whose weights bfloat16 holds, in that type or another one."""
    clone = policy.clone()
    clone.model.bfloat16().to(dtype)
    return clone


SLOW = FinetuneSettings(
    epochs=40, batch_size=4, lr=1e-4, lr_floor=1e-4, warmup=0.0, micro_tokens=2000
)


def lesson(policy: Policy) -> list:
    """Four examples of one of the two answers."""
    return [
        example
        for problem in TOY_PROBLEMS[:4]
        for example in examples_of(policy, problem, toy_solutions(2)[:1])
    ]


@cache
def learned(dtype: torch.dtype, seed: int) -> float:
    """By how much the loss falls."""
    recorder = Memory(save_every=10**9)
    policy = coarse(toy_policy(), dtype)
    settings = SLOW.model_copy(update={"seed": seed})
    finetune(policy, lesson(policy), settings, recorder)
    assert {weight.dtype for weight in policy.model.parameters()} == {dtype}
    return recorder.rows[0]["loss"] - recorder.rows[-1]["loss"]


@effect(above=0.8)
def half_precision_learns_as_single(seed: int) -> float:
    """The smaller of the two falls of the loss, as a share of the larger."""
    falls = [learned(dtype, seed) for dtype in (torch.float32, torch.bfloat16)]
    return min(falls) / max(falls)


@effect(above=0.1)
def without_masters_half_precision_learns_less(seed: int) -> float:
    """The share of the fall of the loss that is rounded away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlreason.algorithms.optim.MasterAdamW", torch.optim.AdamW)
        stuck = learned.__wrapped__(torch.bfloat16, seed)
    return 1 - stuck / learned(torch.float32, seed)


@pytest.mark.learning
@pytest.mark.parametrize(
    "found",
    [half_precision_learns_as_single, without_masters_half_precision_learns_less],
    ids=lambda found: found.name,
)
def test_p33_fine_tuning_in_half_precision_learns_as_in_single(found):
    found.check()


def test_fine_tuning_in_half_precision_goes_on_to_the_bit(monkeypatch):
    settings = SLOW.model_copy(update={"epochs": 6})

    def run(recorder: Memory) -> dict[str, Tensor]:
        policy = coarse(toy_policy())
        return weights(finetune(policy, lesson(policy), settings, recorder))

    def stopped_and_gone_on() -> dict[str, Tensor]:
        recorder = Memory(save_every=2, die_at=5)
        with pytest.raises(InterruptedRunError):
            run(recorder)
        assert recorder.saved[2] == 4
        return run(recorder)

    undisturbed = run(Memory(save_every=2))
    assert same_bits(stopped_and_gone_on(), undisturbed)
    # Wrong: the masters begin again from the rounded weights
    keep = optimizer_tensors
    monkeypatch.setattr(
        "rlreason.algorithms.finetune.optimizer_tensors",
        lambda *given: {k: t for k, t in keep(*given).items() if "master" not in k},
    )
    assert not same_bits(stopped_and_gone_on(), undisturbed)


HEAD = GaeSettings(lam=1.0, value=ValueSettings(kind="head", detach=False))
PPO = PpoSettings(
    phases=1,
    rollouts=12,
    n=2,
    temperature=1.0,
    max_new_tokens=24,
    epochs=1,
    batch_size=12,
    lr=1e-6,
    lr_floor=1e-6,
    weight_decay=0.0,
    max_grad_norm=1e-3,
    lora=None,
    credit=HEAD,
    micro_tokens=2000,
)


def learner_of(dtype: torch.dtype) -> ppo_module.Learner:
    """A learner after one update, by rollouts that are the same for every type."""
    policy = coarse(toy_policy(), dtype)
    learner = ppo_module.Learner(policy, TOY_PROBLEMS, PPO)
    rollouts = sample(toy_policy(), TOY_PROBLEMS, k=2, max_new_tokens=24, seed=1)
    paid = sparse_token_rewards(rollouts, TOY_PROBLEMS)
    experience = learner.credit(learner.pay(learner.score(rollouts), paid))
    learner.learn(experience, 0)
    return learner


def test_ppo_in_half_precision_moves_masters_by_clipped_gradients():
    half, single = learner_of(torch.bfloat16), learner_of(torch.float32)
    start = [w.detach() for w in coarse(toy_policy(), torch.float32).model.parameters()]
    masters = [half.optimizer.masters[i] for i in range(len(start))]
    assert len(half.optimizer.masters) == len(start)  # the new layer of V has none
    model = list(half.policy.model.parameters())
    assert all(w.equal(m.bfloat16()) for w, m in zip(model, masters, strict=True))
    # Those that it clips are the model's own, which hold the gradients
    assert [id(w) for w in half.trained[0]] == [id(w) for w in model]

    def by(ends) -> Tensor:
        moves = [(e.detach() - s).flatten() for e, s in zip(ends, start, strict=True)]
        return torch.cat(moves)

    one, other = by(masters), by(single.policy.model.parameters())
    assert torch.cosine_similarity(one, other, dim=0) > 0.9
    assert one.norm() == pytest.approx(other.norm().item(), rel=0.05)
    # The first moment is a tenth of the clipped gradient, and so small as the limit
    state = half.optimizer.state_dict()["state"]
    moment = torch.cat([state[i]["exp_avg"].flatten() for i in range(len(start))])
    assert moment.norm() == pytest.approx(0.1 * PPO.max_grad_norm, rel=0.02)
    # Wrong: plain AdamW moves nearly none of the rounded weights
    stuck = coarse(toy_policy())
    optimizer = torch.optim.AdamW(stuck.model.parameters(), lr=1e-6, weight_decay=0.0)
    for weight, single_ in zip(
        stuck.model.parameters(), single.policy.model.parameters(), strict=True
    ):
        weight.grad = (single_.detach() - weight.detach().float()).bfloat16()
    optimizer.step()
    unmoved = by([w.detach().float() for w in stuck.model.parameters()]) == 0
    assert unmoved.float().mean() > 0.99


def test_ppo_in_half_precision_goes_on_to_the_bit():
    settings = PPO.model_copy(update={"phases": 3, "lr": 1e-4})

    def run(recorder: Memory) -> dict[str, Tensor]:
        start = coarse(toy_policy())
        return weights(ppo(start, TOY_PROBLEMS, settings, recorder=recorder))

    undisturbed, recorder = Memory(), Memory(die_at=2)
    expected = run(undisturbed)
    with pytest.raises(InterruptedRunError):
        run(recorder)
    assert any("master" in name for name in recorder.saved[0])
    assert same_bits(run(recorder), expected)
    assert recorder.rows == undisturbed.rows
    assert not same_bits(expected, weights(coarse(toy_policy())))


# Weights that do not fit, and rates below the floor


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", None])
def test_a_model_takes_exactly_its_own_tensors_or_none(fault):
    policy = tiny_policy()
    before = weights(policy)
    tensors = {f"model.{name}": tensor + 1 for name, tensor in before.items()}
    tensors["adamw.0.step"] = torch.ones(())  # what is not the model's is passed over
    last = [name for name in tensors if name.startswith("model.")][-1]
    if fault == "missing":
        del tensors[last]
    elif fault == "unknown":
        tensors["model.more"] = torch.ones(1)
    elif fault == "shape":
        tensors[last] = tensors[last][:1]  # would be broadcast
    if fault is None:
        load_model_tensors(policy.model, tensors)
        loaded = weights(policy)
        assert all(loaded[name].equal(before[name] + 1) for name in before)
        return
    named = "model.more" if fault == "unknown" else last
    with pytest.raises(ValueError, match="missing, unknown or of another") as error:
        load_model_tensors(policy.model, tensors)
    assert named in str(error.value)
    assert same_bits(weights(policy), before)


def test_a_rate_below_the_floor_does_not_rise():
    def rates(train_, settings) -> list[float]:
        recorder = Memory(save_every=10**9)
        train_(settings, recorder)
        return [row["lr"] for row in recorder.rows]

    def tune(settings, recorder) -> None:
        policy = toy_policy().clone()
        finetune(policy, lesson(policy), settings, recorder)

    def learn(settings, recorder) -> None:
        ppo(toy_policy(), TOY_PROBLEMS, settings, recorder=recorder)

    below = FinetuneSettings(lr=1e-7, epochs=10, batch_size=4, warmup=0.1)
    assert below.lr_floor > below.lr
    assert rates(tune, below) == [1e-7] * 10
    settings = PPO.model_copy(update={"lr": 1e-7, "phases": 3})
    assert settings.lr_floor > settings.lr
    assert rates(learn, settings) == [1e-7] * 3
    # Above it, it ends near the floor
    above = rates(tune, below.model_copy(update={"lr": 1e-3, "lr_floor": 1e-5}))
    assert above[0] == 1e-3
    assert above == sorted(above, reverse=True)
    assert above[-1] < 1e-4


def test_a_weight_that_is_no_number_is_seen_wherever_it_stands():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert largest_weight(model) < 10
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    assert math.isnan(largest_weight(model))
    # Wrong: Python's max passes NaN over where it does not come first
    by_hand = max(float(p.detach().abs().max()) for p in model.parameters())
    assert not math.isnan(by_hand)

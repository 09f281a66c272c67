"""Fine-tuning: the loss is the one of the equation, whatever the batch is cut into.

Run as a program, this file is the runs that get killed: it forks a process for every
point in ``KILL_POINTS`` and lets each die there by SIGKILL.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margins import effect
from pydantic import ValidationError
from tiny_models import tiny_policy
from torch import Tensor
from toys import (
    TOY_PROBLEMS,
    InterruptedRunError,
    Memory,
    die,
    die_in,
    die_in_run,
    examples_of,
    let_die,
    run_toy,
    same_bits,
    toy_recipe,
    toy_solutions,
    was_killed,
    weights,
    written,
)

from rlreason.algorithms import expert_iteration as algorithm
from rlreason.algorithms import finetune as module
from rlreason.algorithms.batching import Example, response_token_count
from rlreason.algorithms.finetune import (
    FinetuneSettings,
    accumulate_gradients,
    finetune,
    nll,
)
from rlreason.algorithms.optim import cosine_lr
from rlreason.algorithms.sft import sft, solution_examples
from rlreason.policy.layout import micro_batches
from rlreason.policy.load import Policy
from rlreason.policy.logprobs import token_logprobs
from rlreason.policy.lora import LoraSettings
from rlreason.policy.sampler import sample
from rlreason.runs import plans
from rlreason.runs import steps as train
from rlreason.runs.folder import RunFolder, read_checkpoint
from rlreason.tasks.problem import Problem

SHORT = FinetuneSettings(epochs=3, batch_size=4, lr=1e-3, lr_floor=1e-5)


def uneven_examples(policy: Policy) -> list[Example]:
    """Eleven examples with responses of 1 to about 60 tokens."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(11):
        prompt = tuple(policy.encode_prompt("Q: " + "why " * (i % 4) + "\nA:"))
        length = 1 + (i * i) // 2
        ids = torch.randint(3, 250, (length,), generator=generator).tolist()
        examples.append(Example(prompt, (*ids, policy.eos_id)))
    return examples


def gradient(policy: Policy) -> Tensor:
    """All gradients of a policy as one vector, which are then cleared."""
    parts = [p.grad.flatten() for p in policy.model.parameters()]
    policy.model.zero_grad(set_to_none=True)
    return torch.cat(parts)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """In units of the largest entry, since fp32 keeps relative precision."""
    return float((one - other).abs().max() / other.abs().max())


# The loss


def naive_loss(policy: Policy, batch: list[Example]) -> float:
    """The equation of ``finetune``, token by token, one example at a time."""
    total, count = 0.0, 0
    for example in batch:
        ids = torch.tensor([[*example.prompt_tokens, *example.tokens]])
        logprobs = policy.model(input_ids=ids).logits[0].double().log_softmax(-1)
        for t, token in enumerate(example.tokens):
            total -= logprobs[len(example.prompt_tokens) - 1 + t, token].item()
            count += 1
    return total / count


def test_the_loss_is_the_mean_over_response_tokens_of_the_whole_batch():
    policy = tiny_policy()
    batch = uneven_examples(policy)
    loss = accumulate_gradients(policy, batch, max_tokens=100)
    assert loss == pytest.approx(naive_loss(policy, batch), rel=1e-5)


@pytest.mark.parametrize("micro_tokens", [1, 40, 77, 150, 300, 100_000])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(micro_tokens):
    policy = tiny_policy()
    batch = uneven_examples(policy)
    (nll(policy, batch) / response_token_count(batch)).backward()
    whole = gradient(policy)
    accumulate_gradients(policy, batch, micro_tokens)
    assert largest_difference(gradient(policy), whole) < 1e-6


def test_a_mean_of_micro_batch_means_is_another_gradient():
    # The wrong version: each micro-batch divided by its own tokens, then averaged
    policy = tiny_policy()
    batch = uneven_examples(policy)
    accumulate_gradients(policy, batch, 100_000)
    whole = gradient(policy)
    cut = list(micro_batches(batch, max_tokens=100))
    for mb in cut:
        (nll(policy, mb) / response_token_count(mb) / len(cut)).backward()
    assert len(cut) > 1
    assert largest_difference(gradient(policy), whole) > 1e-2


def test_a_weight_counts_as_so_many_copies_and_makes_no_tokens():
    policy = tiny_policy()
    light, *rest = uneven_examples(policy)
    heavy = replace(light, weight=3.0)
    assert response_token_count([heavy]) == response_token_count([light])
    found, copies = nll(policy, [heavy, *rest]), nll(policy, [light] * 3 + rest)
    assert found.item() == pytest.approx(copies.item(), rel=1e-5)
    assert found.item() > nll(policy, [light, *rest]).item() * 1.01


def forget_the_past(policy: Policy) -> Policy:
    """Make the next token depend on the last one alone, by silencing attention."""
    for name, parameter in policy.model.named_parameters():
        if "o_proj" in name:
            parameter.data.zero_()
    return policy


def test_an_example_that_the_model_cannot_read_is_refused():
    """It was learned at places that no answer can have."""
    policy = tiny_policy()
    room = policy.model.config.max_position_embeddings
    fits, longer = (Example((1,), (5,) * (n - 1)) for n in (room, room + 1))
    with pytest.raises(ValueError, match=f"has {room + 1} tokens, and .* reads {room}"):
        finetune(policy, [fits, longer], SHORT)


def test_prompt_tokens_get_no_loss():
    policy = forget_the_past(tiny_policy())
    response = (70, 71, policy.eos_id)
    one = Example((1, 40, 50, 60), response)
    other = Example((1, 90, 95, 60), response)  # same last token: same response odds
    assert nll(policy, [one]).item() == nll(policy, [other]).item()
    # The wrong version: with the prompt among what is learned, it would matter
    with_prompt = [Example(e.prompt_tokens[:1], e.prompt_tokens[1:] + e.tokens)
                   for e in (one, other)]  # fmt: skip
    first, second = (nll(policy, [e]).item() for e in with_prompt)
    assert abs(first - second) > 0.1


def test_eos_is_learned():
    policy = tiny_policy()
    (example,) = examples_of(policy, TOY_PROBLEMS[0], toy_solutions(2)[:1])
    assert example.tokens[-1] == policy.eos_id
    headless = Example(example.prompt_tokens, example.tokens[:-1])
    paid_for_eos = nll(policy, [example]) - nll(policy, [headless])
    assert paid_for_eos.item() > 1.0  # a random policy does not end here


@effect(above=0.5)
def sft_learns_when_to_stop(seed: int) -> float:
    """Probability of EOS where it was learned, less that where it was left out."""
    overfit = FinetuneSettings(epochs=40, batch_size=1, lr=1e-2, lr_floor=1e-3)

    def probability(last: int | None) -> float:
        policy = tiny_policy(seed=seed)
        (whole,) = examples_of(policy, TOY_PROBLEMS[0], toy_solutions(2)[:1])
        learned = Example(whole.prompt_tokens, whole.tokens[:last])
        finetune(policy, [learned], overfit)
        before = Example(whole.prompt_tokens, whole.tokens[:-1])
        return math.exp(nll(policy, [before]).item() - nll(policy, [whole]).item())

    return probability(None) - probability(-1)


def test_padding_that_is_eos_does_no_harm():
    policy = tiny_policy(pad=False)
    assert policy.pad_id == policy.eos_id
    batch = uneven_examples(policy)
    loss = accumulate_gradients(policy, batch, max_tokens=100_000)
    assert loss == pytest.approx(naive_loss(policy, batch), rel=1e-5)


# The batches


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    max_tokens=st.integers(1, 200),
)
def test_micro_batches_hold_each_example_once_within_the_budget(lengths, max_tokens):
    batch = [Example((1,), tuple(range(n))) for n in lengths]
    cut = list(micro_batches(batch, max_tokens=max_tokens))
    assert sorted(map(len, batch)) == sorted(len(e) for mb in cut for e in mb)
    for mb in cut:
        assert len(mb) == 1 or len(mb) * max(map(len, mb)) <= max_tokens
    assert sum(map(response_token_count, cut)) == response_token_count(batch)


def test_every_epoch_sees_each_example_once_in_an_order_of_its_own():
    examples = [Example((1,), (i,)) for i in range(10)]

    def epochs(seed: int) -> list[list[list[Example]]]:
        settings = FinetuneSettings(epochs=2, batch_size=4, seed=seed)
        batches = [batch for _, batch in module.batches_of(examples, settings, 0)]
        return [batches[:3], batches[3:]]

    orders = [
        [example for batch in epoch for example in batch]
        for epoch in (*epochs(0), *epochs(1), *epochs(0))
    ]
    assert all(sorted(o, key=lambda e: e.tokens) == examples for o in orders)
    assert orders[:2] == orders[4:]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [len(batch) for batch in epochs(0)[0]] == [4, 4, 2]


# The schedule


def test_the_schedule_rises_to_the_peak_and_falls_as_a_cosine():
    rates = [
        cosine_lr(s, total=110, warmup=10, peak=2e-5, floor=2e-7) for s in range(110)
    ]
    assert rates[0] == pytest.approx(2e-6)
    assert rates[9] == rates[10] == pytest.approx(2e-5)
    assert rates[60] == pytest.approx((2e-5 + 2e-7) / 2)  # half-way down
    assert rates[35] == pytest.approx(2e-7 + 1.98e-5 * (1 + math.sqrt(0.5)) / 2)
    assert rates[-1] == pytest.approx(2e-7, rel=0.05)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_schedule_needs_no_warm_up_and_survives_a_single_update():
    assert cosine_lr(0, total=1, warmup=0, peak=1.0, floor=0.1) == 1.0
    assert cosine_lr(0, total=1, warmup=1, peak=1.0, floor=0.1) == 1.0
    assert cosine_lr(5, total=5, warmup=0, peak=1.0, floor=0.1) == pytest.approx(0.1)


# Training


def test_a_learning_rate_of_zero_leaves_every_bit_as_it_was():
    policy = tiny_policy()
    before = weights(policy)
    still = SHORT.model_copy(update={"lr": 0.0, "lr_floor": 0.0})
    finetune(policy, uneven_examples(policy), still)
    assert same_bits(weights(policy), before)
    finetune(policy, uneven_examples(policy), SHORT)
    assert not same_bits(weights(policy), before)


def train_short(recorder: Memory, **changes) -> dict[str, Tensor]:
    policy = tiny_policy()
    chosen = SHORT.model_copy(update=changes)
    return weights(finetune(policy, uneven_examples(policy), chosen, recorder))


def test_two_runs_with_one_seed_are_equal_to_the_bit():
    one, other, third = Memory(), Memory(), Memory()
    assert same_bits(train_short(one), train_short(other))
    assert one.rows == other.rows
    assert not same_bits(train_short(third, seed=1), train_short(one))
    assert [row["epoch"] for row in one.rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["update"] for row in one.rows] == list(range(9))


@pytest.mark.parametrize("save_every", [1, 2, 4])
@pytest.mark.parametrize("die_at", [0, 1, 3, 5, 8])
def test_a_run_that_stops_anywhere_and_goes_on_equals_an_undisturbed_one(
    die_at, save_every
):
    undisturbed = Memory(save_every=save_every)
    expected = train_short(undisturbed)
    recorder = Memory(save_every=save_every, die_at=die_at)
    with pytest.raises(InterruptedRunError):
        train_short(recorder)
    assert same_bits(train_short(recorder), expected)
    assert recorder.rows == undisturbed.rows


def test_a_run_without_its_moments_would_not_be_equal():
    # The wrong version: a checkpoint that forgets what AdamW remembers
    class Forgetful(Memory):
        def save(self, tensors, state):
            super().save(tensors, state)
            kept, state, rows = self.saved
            zeroed = {
                k: torch.zeros_like(v) if ".exp_avg" in k else v
                for k, v in kept.items()
            }
            self.saved = zeroed, state, rows

    recorder = Forgetful(die_at=5)
    with pytest.raises(InterruptedRunError):
        train_short(recorder)
    assert not same_bits(train_short(recorder), train_short(Memory()))


EIGHT = [
    Problem(f"p/{i}", f"Say {i}!", f"<<{i}+{i}={2 * i}>>\n#### {2 * i}", str(2 * i))
    for i in range(8)
]


@effect(above=0.5)
def sft_learns_eight_examples_by_heart(seed: int) -> float:
    """Probability of the least likely token of all that it has learned."""
    policy = tiny_policy(seed=seed)
    memorise = FinetuneSettings(
        epochs=60, batch_size=8, lr=2e-2, lr_floor=1e-3, seed=seed
    )
    sft(policy, EIGHT, memorise)
    examples = solution_examples(policy, EIGHT)
    logprobs, _ = token_logprobs(
        policy.model, [e.prompt_tokens for e in examples], [e.tokens for e in examples]
    )
    return logprobs.min().exp().item()


@pytest.mark.learning
@pytest.mark.parametrize(
    "found",
    [sft_learns_when_to_stop, sft_learns_eight_examples_by_heart],
    ids=lambda found: found.name,
)
def test_sft_learns_its_examples_and_their_end(found):
    found.check()


def test_sft_trains_on_the_tokens_that_the_sampler_asks_with():
    policy = tiny_policy()
    example = solution_examples(policy, TOY_PROBLEMS[:1])[0]
    (rollout,) = sample(policy, TOY_PROBLEMS[:1], max_new_tokens=2)
    assert example.prompt_tokens == rollout.prompt_tokens
    assert policy.decode(example.tokens) == f" {TOY_PROBLEMS[0].solution}"


CHANGED = {
    "epochs": 2,
    "batch_size": 3,
    "lr": 2e-3,
    "lr_floor": 9e-4,
    "warmup": 0.8,
    "betas": (0.5, 0.9),
    "weight_decay": 0.5,
    "max_grad_norm": 1e-3,
    "lora": LoraSettings(rank=2, alpha=4.0),
    "seed": 1,
}


def test_every_setting_changes_the_result(monkeypatch):
    # Compiled it is the same too: see test_compiling
    elsewhere = {"micro_tokens", "compile"}
    assert {*CHANGED} | elsewhere == set(FinetuneSettings.model_fields)
    default = train_short(Memory())
    for name, value in CHANGED.items():
        assert not same_bits(train_short(Memory(), **{name: value}), default), name
    # The one that must not change it beyond rounding changes how often the model runs
    calls: list[int] = []

    def counted(policy, batch):
        calls.append(len(batch))
        return nll(policy, batch)

    monkeypatch.setattr(module, "nll", counted)
    for micro_tokens, expected in ((100_000, 9), (1, 33)):
        calls.clear()
        train_short(Memory(), micro_tokens=micro_tokens)
        assert len(calls) == expected


def test_unknown_and_impossible_settings_are_refused():
    for wrong in ({"learning_rate": 1e-3}, {"lr": 0.0}, {"epochs": 0}, {"warmup": 2}):
        with pytest.raises(ValidationError):
            FinetuneSettings(**wrong)


def test_no_examples_are_a_clear_error():
    with pytest.raises(ValueError, match="list of examples is empty"):
        finetune(tiny_policy(), [], SHORT)


# Killed runs, through everything that a reader's run goes through


def die_between_the_rounds() -> None:
    """Round 1 is logged, and its end is not saved."""
    whole = RunFolder.save

    def counted(self, tensors, state):
        ended = state.get("round") == 1 and state["updates"] == 0
        return die() if ended else whole(self, tensors, state)

    RunFolder.save = counted


SFT, EI = "sft", "expert-iteration"
KILL_POINTS = {
    # SFT has 4 examples in batches of 2 over 2 epochs, and a checkpoint after row 3
    "sft-before-a-checkpoint": partial(die_in_run, SFT, "log", call=2),
    "sft-after-a-checkpoint": partial(die_in_run, SFT, "log", call=4),
    "sft-before-the-last-save": partial(die_in_run, SFT, "save", call=2),
    "sft-after-the-last-save": partial(die_in_run, SFT, "close_logs", call=1),
    "sampling-in-round-1": partial(die_in, algorithm, "sparse_rewards", call=1),
    "sampling-in-round-2": partial(die_in, algorithm, "sparse_rewards", call=2),
    "distilling-in-round-1": partial(die_in_run, EI, "log", call=8),
    "between-the-rounds": die_between_the_rounds,
    "at-the-start-of-round-2": partial(die_in, algorithm, "sample", call=2),
    "distilling-in-round-2": partial(die_in_run, EI, "log", call=20),
    "validating-round-2": partial(die_in, train, "validate", call=2),
    "before-the-last-save": partial(die_in, plans, "trained_tensors", call=2),
    "after-the-last-save": partial(die_in_run, EI, "close_logs", call=1),
}


LEFT = ("sft-after-a-checkpoint", "distilling-in-round-2")  # copied as they were left


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The toy on disk, and for every kill point the runs that were left there."""
    folder = tmp_path_factory.mktemp("toy")
    recipe = toy_recipe(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RLREASON_QUIET": "1"}
    forked.run([__file__, folder], environment)
    run_toy(train.train_expert_iteration, recipe, folder / "undisturbed")
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_killed_training_that_goes_on_equals_an_undisturbed_one(point, folder):
    assert was_killed(folder / point)
    run_toy(train.train_expert_iteration, toy_recipe(folder), folder / point)
    assert written(folder / point) == written(folder / "undisturbed")
    assert len(list((folder / point).iterdir())) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_training_goes_on_and_does_not_start_again(folder):
    # Without this, starting over would pass the test above
    in_sft, in_round_2 = (folder / "left" / name for name in LEFT)
    (sft_run,) = in_sft.glob("sft-*")
    assert read_checkpoint(sft_run).state == {"updates": 3}
    (ei_run,) = in_round_2.glob("expert-iteration-*")
    state = read_checkpoint(ei_run).state
    assert state["round"] == 1
    assert state["updates"] > 0


if __name__ == "__main__":
    here = Path(sys.argv[1])
    recipe = toy_recipe(here)
    for name, arm in KILL_POINTS.items():
        root = here / name
        let_die(name, arm, partial(run_toy, train.train_expert_iteration, recipe, root))
        if name in LEFT:
            shutil.copytree(root, here / "left" / name)

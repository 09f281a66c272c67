"""The outcome reward model: what it scores, what it learns from, what it pays."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margins import effect
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, PROBLEMS, tiny_policy
from toys import (
    TOY_PROBLEMS,
    InterruptedRunError,
    Memory,
    same_bits,
    toy_policy,
    toy_solutions,
    weights,
)

from rlreason.algorithms import reward_modelling as module
from rlreason.algorithms.batching import response_token_count
from rlreason.algorithms.finetune import FinetuneSettings, accumulate
from rlreason.algorithms.optim import cosine_lr
from rlreason.algorithms.reward_modelling import (
    LabelledExample,
    OrmSettings,
    build_dataset,
    classification_loss,
    deduplicate,
    label_rollouts,
    train_orm,
)
from rlreason.evaluation.classifier import auc, classification_metrics
from rlreason.evaluation.evaluate import evaluate
from rlreason.mdp import discounted_returns, step_spans
from rlreason.policy.load import Policy
from rlreason.policy.logprobs import token_logprobs
from rlreason.policy.packing import pad
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import sample
from rlreason.rewards.orm import (
    OutcomeRewardModel,
    dense_orm_reward,
    score_responses,
    score_tokens,
    sparse_orm_reward,
)
from rlreason.rewards.sparse import sparse_rewards
from rlreason.tasks.problem import Problem

QUICK = OrmSettings(
    k=8,
    max_new_tokens=24,
    held_out=0.4,
    epochs=2,
    batch_size=8,
    lr=3e-3,
    lr_floor=1e-4,
)


def random_orm(policy: Policy) -> OutcomeRewardModel:
    """A model whose head is not zero, so that its scores differ."""
    orm = OutcomeRewardModel(policy)
    generator = torch.Generator().manual_seed(0)
    orm.network.weight.data.normal_(std=0.3, generator=generator)
    return orm


def rollouts_of(policy: Policy, k: int = 3) -> list[Rollout]:
    """Rollouts of prompts and responses of many lengths, repeats dropped."""
    found = [
        rollout
        for limit in (1, 7, 30)
        for rollout in sample(policy, PROBLEMS, k=k, max_new_tokens=limit, seed=limit)
    ]
    return list({(r.prompt_tokens, r.tokens): r for r in found}.values())


def farthest(one: list[tuple[float, ...]], other: list[tuple[float, ...]]) -> float:
    assert [len(row) for row in one] == [len(row) for row in other]
    pairs = zip(sum(one, ()), sum(other, ()), strict=True)
    return max(abs(a - b) for a, b in pairs)


# Scores


@pytest.mark.parametrize("kind", KINDS)
def test_p36_a_score_alone_is_the_score_in_any_batch(kind):
    policy = tiny_policy(kind)
    orm, rollouts = random_orm(policy), rollouts_of(policy)
    alone = [score_tokens(orm, [rollout])[0] for rollout in rollouts]
    assert max(map(max, alone)) - min(map(min, alone)) > 0.2
    for micro_tokens in (1, 200, 100_000):
        together = score_tokens(orm, rollouts, micro_tokens=micro_tokens)
        assert farthest(together, alone) < 1e-5
    backwards = score_tokens(orm, rollouts[::-1])[::-1]
    assert farthest(backwards, alone) < 1e-5
    assert score_responses(orm, rollouts) == [
        s[-1] for s in score_tokens(orm, rollouts)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_p13_p15_a_score_is_the_logit_at_the_token_itself(kind):
    policy = tiny_policy(kind)
    orm, rollouts = random_orm(policy), rollouts_of(policy)
    trunk = policy.model.base_model  # the model is its copy

    def by_hand(rollout: Rollout, shift: int) -> tuple[float, ...]:
        ids = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        hidden = trunk(input_ids=ids).last_hidden_state[0]
        scores = (hidden @ orm.network.weight + orm.network.bias).sigmoid()
        start = len(rollout.prompt_tokens) - shift
        return tuple(scores[start : start + len(rollout.tokens)].tolist())

    found = score_tokens(orm, rollouts)
    assert farthest(found, [by_hand(r, 0) for r in rollouts]) < 1e-5
    # The wrong version reads where the token was predicted and has not been seen
    assert farthest(found, [by_hand(r, 1) for r in rollouts]) > 0.1


def test_p36_the_score_of_the_last_column_would_be_the_score_of_padding():
    policy = tiny_policy()
    orm, rollouts = random_orm(policy), rollouts_of(policy)
    logits, batch = orm.logits(rollouts)
    assert len(logits) == sum(len(r.tokens) for r in rollouts)
    everywhere = orm.network(pad(batch.input_ids), {}).view(batch.input_ids.shape)
    last_column = everywhere[:, -1].sigmoid().tolist()
    at_the_end = score_responses(orm, rollouts)
    pairs = zip(last_column, at_the_end, strict=True)
    assert max(abs(wrong - right) for wrong, right in pairs) > 0.1


def test_p12_a_pad_token_that_is_eos_or_in_the_response_does_no_harm():
    with_pad, without = tiny_policy(), tiny_policy(pad=False)
    assert without.pad_id == without.eos_id != with_pad.pad_id
    orm, other = random_orm(with_pad), random_orm(without)
    other.load_tensors(orm.tensors())
    row = Rollout("p/1", 0, (1, 40), (50, with_pad.pad_id, 60, 2), (0.0,) * 4, "", True)
    longer = Rollout("p/1", 1, (1, 40), (50,) * 20, (0.0,) * 20, "", False)
    scores = score_tokens(orm, [row, longer])
    assert farthest(scores, score_tokens(other, [row, longer])) < 1e-6
    assert [len(s) for s in scores] == [4, 20]
    # The mean over what is not padding by its id: the wrong version loses a token
    assert sum(token != with_pad.pad_id for token in row.tokens) == 3


# In half precision eagerly: without AVX-512 there is not always another kernel
@pytest.mark.parametrize(
    ("attention", "dtype"), [("sdpa", torch.float32), ("eager", torch.bfloat16)]
)
def test_p14_scores_are_finite_whatever_the_padding(attention, dtype):
    policy = tiny_policy()
    policy.model.to(dtype).set_attn_implementation(attention)
    found = score_tokens(random_orm(policy), rollouts_of(policy))
    assert all(0 < p < 1 for row in found for p in row)


def test_p16_a_prefix_is_scored_as_if_nothing_followed():
    policy = tiny_policy()
    orm = random_orm(policy)
    (rollout,) = sample(policy, PROBLEMS[:1], max_new_tokens=30, seed=3)
    assert len(rollout.tokens) > 5
    (scores,) = score_tokens(orm, [rollout])
    for t in range(1, len(rollout.tokens)):
        prefix = LabelledExample(rollout.prompt_tokens, rollout.tokens[:t], "", False)
        assert score_responses(orm, [prefix])[0] == pytest.approx(
            scores[t - 1], abs=1e-5
        )


def test_repeats_are_scored_once(monkeypatch):
    policy = tiny_policy()
    orm, rollouts = random_orm(policy), rollouts_of(policy)
    seen = []
    whole = OutcomeRewardModel.logits

    def counted(self, responses):
        seen.extend(responses)
        return whole(self, responses)

    monkeypatch.setattr(OutcomeRewardModel, "logits", counted)
    once = score_tokens(orm, rollouts)
    assert len(seen) == len(rollouts)
    seen.clear()
    assert score_tokens(orm, [*rollouts, *rollouts[::-1]]) == once + once[::-1]
    assert len(seen) == len(rollouts)
    # The same response to another question is no repeat
    one = LabelledExample((1, 40), (50, 2), "", True)
    other = LabelledExample((1, 90), (50, 2), "", True)
    assert score_responses(orm, [one]) != score_responses(orm, [other])


def test_what_is_scored_at_once_stays_within_the_budget(monkeypatch):
    policy = tiny_policy()
    orm, rollouts = random_orm(policy), rollouts_of(policy)
    together, whole = [], OutcomeRewardModel.logits

    def counted(self, responses):
        logits, batch = whole(self, responses)
        together.append((len(responses), len(batch.layout.tokens)))
        return logits, batch

    monkeypatch.setattr(OutcomeRewardModel, "logits", counted)
    score_tokens(orm, rollouts, micro_tokens=60)
    assert sum(rows for rows, _ in together) == len(rollouts)
    assert max(rows for rows, _ in together) > 1
    assert all(rows == 1 or tokens <= 60 for rows, tokens in together)


def test_p27_every_score_is_one_half_at_first_and_no_random_number_is_drawn():
    policy = tiny_policy()
    state = torch.get_rng_state()
    orm = OutcomeRewardModel(policy)
    assert torch.get_rng_state().equal(state)
    assert {p for row in score_tokens(orm, rollouts_of(policy)) for p in row} == {0.5}


def test_the_model_is_a_copy_and_the_policy_is_left_alone():
    policy = tiny_policy()
    before = weights(policy)
    orm = OutcomeRewardModel(policy)
    assert all(p.requires_grad for p in orm.network.parameters())
    for parameter in orm.network.parameters():
        parameter.data.add_(1.0)
    assert same_bits(weights(policy), before)


def test_weights_go_through_a_safetensors_file(tmp_path):
    policy = tiny_policy()
    orm, rollouts = random_orm(policy), rollouts_of(policy)
    save_file(orm.tensors(), tmp_path / "orm.safetensors")
    other = OutcomeRewardModel(tiny_policy(seed=1))
    other.load_tensors(
        load_file(tmp_path / "orm.safetensors") | {"more": torch.ones(1)}
    )
    assert score_tokens(other, rollouts) == score_tokens(orm, rollouts)


def test_empty_responses_and_unknown_tokens_are_clear_errors():
    orm = random_orm(tiny_policy())
    with pytest.raises(ValueError, match="without tokens has no score"):
        score_responses(orm, [LabelledExample((1,), (), "", True)])
    with pytest.raises(ValueError, match="token 9999 is not among the"):
        score_responses(orm, [LabelledExample((1,), (9999,), "", True)])
    assert score_responses(orm, []) == []


def test_p44_evaluate_takes_it_as_a_scorer():
    policy = toy_policy()
    orm = random_orm(policy)
    report = evaluate(
        policy, TOY_PROBLEMS, k=4, temperature=1.0, max_new_tokens=80, orm=orm
    )
    rollouts = sample(policy, TOY_PROBLEMS, k=4, max_new_tokens=80)
    expected = score_responses(orm, rollouts)
    found = [s for result in report.results for s in result.scores]
    assert found == pytest.approx(expected, abs=1e-5)
    assert report.rerank_k is not None
    with pytest.raises(ValueError, match="not among the 1 given"):
        orm(TOY_PROBLEMS[0], rollouts)


# Rewards


def test_p19_the_sparse_reward_is_the_score_on_the_last_token():
    policy = tiny_policy()
    orm, rollouts = random_orm(policy), rollouts_of(policy)
    paid = sparse_orm_reward(orm)(rollouts, PROBLEMS[::-1])
    assert [len(row) for row in paid] == [len(r.tokens) for r in rollouts]
    assert [row[-1] for row in paid] == score_responses(orm, rollouts)
    assert not any(any(row[:-1]) for row in paid)


def steps_of(policy: Policy, *texts: str, finished: bool = True) -> list[Rollout]:
    """Rollouts of the first toy problem with these texts."""
    prompt = tuple(policy.encode_prompt("Q: a?\nA:"))
    rollouts = []
    for i, text in enumerate(texts):
        tokens = tuple(policy.encode_response("Q: a?\nA:", text))
        tokens = tokens if finished else tokens[:-1]
        logprobs = (0.0,) * len(tokens)
        rollouts.append(Rollout("toy/a", i, prompt, tokens, logprobs, text, finished))
    return rollouts


@pytest.mark.parametrize("finished", [True, False])
def test_the_dense_reward_is_the_score_at_each_step_end_over_their_number(finished):
    policy = tiny_policy()
    orm = random_orm(policy)
    texts = (" a\n b\n\n#### 2", " <<1+1=2>>", " a\n", " \n\n b\n c\n d")
    rollouts = steps_of(policy, *texts, finished=finished)
    paid = dense_orm_reward(orm)(rollouts, TOY_PROBLEMS)
    steps = []
    for row, scores, rollout in zip(
        paid, score_tokens(orm, rollouts), rollouts, strict=True
    ):
        spans = step_spans([policy.decode([t]) for t in rollout.tokens])
        ends = [end - 1 for _, end in spans]
        steps.append(len(ends))
        assert [t for t, r in enumerate(row) if r] == ends
        assert [row[t] for t in ends] == [scores[t] / len(ends) for t in ends]
        assert ends[-1] == len(rollout.tokens) - 1  # the last step ends with the last
        # The return is the mean score of the steps, whatever their number
        assert 0 <= discounted_returns(list(row), 1.0)[0] <= 1
    assert steps == [3, 1, 1, 3]


def test_a_dense_reward_without_a_bound_would_pay_for_lines(monkeypatch):
    policy = tiny_policy()
    orm = OutcomeRewardModel(policy)  # one half, whatever is written
    few, many = steps_of(policy, " a\n#### 2", " a\n" * 9 + "#### 2")
    bounded = [sum(row) for row in dense_orm_reward(orm)([few, many], TOY_PROBLEMS)]
    assert bounded == pytest.approx([0.5, 0.5])
    # The wrong version: the sum over steps
    unbounded = [
        sum(scores[end - 1] for _, end in step_spans(orm.pieces(r.tokens)))
        for r, scores in zip((few, many), score_tokens(orm, [few, many]), strict=True)
    ]
    assert unbounded == pytest.approx([1.0, 5.0])


@pytest.mark.parametrize("reward", [sparse_orm_reward, dense_orm_reward])
def test_a_rollout_of_a_problem_that_is_not_there_is_an_error(reward):
    policy = tiny_policy()
    with pytest.raises(ValueError, match="not among the 1 given"):
        reward(random_orm(policy))(rollouts_of(policy), PROBLEMS[:1])


# Data


def answer(problem: int, text: str, *, at: int = 0, finished: bool = True) -> Rollout:
    """A rollout of a toy problem; ``at`` tells its tokens from others'."""
    tokens = (100 + at, *((2,) if finished else ()))
    logprobs = (0.0,) * len(tokens)
    name = TOY_PROBLEMS[problem].id
    return Rollout(name, at, (1, 10 + problem), tokens, logprobs, text, finished)


def test_p37_labels_are_the_final_answers_and_unfinished_samples_are_kept():
    rollouts = [
        answer(1, "#### 3"),
        answer(0, "#### 2"),
        answer(0, "#### 3"),
        answer(0, "#### 2 and", finished=False),  # stated before the limit
        answer(0, "1+1 is", finished=False),
        answer(0, ""),
    ]
    labelled = label_rollouts(rollouts, TOY_PROBLEMS[::-1])
    assert [e.right for e in labelled] == [True, True, False, True, False, False]
    assert [e.right for e in labelled] == [
        paid == 1.0 for paid in sparse_rewards(rollouts, TOY_PROBLEMS)
    ]
    assert [(e.prompt_tokens, e.tokens, e.problem_id) for e in labelled] == [
        (r.prompt_tokens, r.tokens, r.problem_id) for r in rollouts
    ]


drawn = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 12)), min_size=1, max_size=80
).map(
    lambda draws: [
        # The tokens decide the label: that of a question's sample never varies
        LabelledExample((1, q), (token, 2), f"q/{q}", (q + token) % 3 == 0)
        for q, token in draws
    ]
)


@given(drawn, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_p37_data_hold_each_sample_once_in_balance_and_no_question_twice(
    examples, seed
):
    chosen = QUICK.model_copy(update={"seed": seed})
    try:
        data = build_dataset(examples, chosen)
    except ValueError:
        return  # a part of one class alone
    both = data.train + data.held_out
    assert set(both) <= set(examples)
    assert len(set(both)) == len(both)
    train = {e.problem_id for e in data.train}
    held_out = {e.problem_id for e in data.held_out}
    assert not train & held_out
    for part in (data.train, data.held_out):
        assert sum(e.right for e in part) * 2 == len(part) > 0
    assert build_dataset(examples, chosen) == data  # the seed decides
    assert build_dataset(examples + examples, chosen) == data  # repeats do not


def test_p37_the_whole_rarer_class_is_kept_and_the_seed_draws_from_the_other():
    examples = [
        LabelledExample((1, q), (token, 2), f"q/{q}", token == 0)
        for q in range(10)
        for token in range(6)
    ]
    one, other = (
        build_dataset(examples, QUICK.model_copy(update={"seed": seed}))
        for seed in (0, 1)
    )
    for data in (one, other):
        assert (len(data.train), len(data.held_out)) == (12, 8)  # 6 and 4 questions
        assert sum(e.right for e in data.train + data.held_out) == 10
    assert {e.problem_id for e in one.held_out} != {
        e.problem_id for e in other.held_out
    }


def test_p37_a_split_by_sample_would_put_questions_on_both_sides():
    examples = [
        LabelledExample((1, q), (token, 2), f"q/{q}", token < 3)
        for q in range(10)
        for token in range(6)
    ]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    out = {examples[i].problem_id for i in order[:24]}
    into = {examples[i].problem_id for i in order[24:]}
    assert out & into  # the wrong version
    data = build_dataset(examples, QUICK)
    assert not {e.problem_id for e in data.train} & {
        e.problem_id for e in data.held_out
    }


def test_p37_repeats_are_of_tokens_within_a_question_and_the_first_stays():
    one = LabelledExample((1, 5), (7, 2), "q/0", True)
    same_text = LabelledExample((1, 5), (8, 2), "q/0", True)
    elsewhere = LabelledExample((1, 6), (7, 2), "q/1", False)
    assert deduplicate([one, same_text, one, elsewhere, one]) == [
        one,
        same_text,
        elsewhere,
    ]


# The loss


def uneven(policy: Policy) -> list[LabelledExample]:
    """Nine samples of 1 to about 40 tokens, right and wrong in turn."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for i in range(9):
        prompt = tuple(policy.encode_prompt("Q: " + "why " * (i % 4) + "\nA:"))
        ids = torch.randint(3, 250, (1 + i * i // 2,), generator=generator).tolist()
        examples.append(LabelledExample(prompt, tuple(ids), f"q/{i}", i % 2 == 0))
    return examples


def naive_loss(orm: OutcomeRewardModel, batch: list[LabelledExample]) -> float:
    """The equation of ``algorithms.reward_modelling``, token by token."""
    total, count = 0.0, 0
    for example in batch:
        for p in score_tokens(orm, [example])[0]:
            total -= math.log(p if example.right else 1 - p)
            count += 1
    return total / count


def accumulate_gradients(orm: OutcomeRewardModel, batch, max_tokens: int) -> float:
    """As ``fit`` does it."""
    loss, count = partial(classification_loss, orm), response_token_count(batch)
    return accumulate(loss, batch, count, max_tokens=max_tokens)


def gradient(orm: OutcomeRewardModel) -> torch.Tensor:
    parts = [p.grad.flatten() for p in orm.network.parameters()]
    orm.network.zero_grad(set_to_none=True)
    return torch.cat(parts)


def test_the_loss_is_the_mean_over_response_tokens_of_the_whole_batch():
    policy = tiny_policy()
    orm, batch = random_orm(policy), uneven(policy)
    assert accumulate_gradients(orm, batch, 100) == pytest.approx(
        naive_loss(orm, batch), rel=1e-5
    )
    fresh = OutcomeRewardModel(policy)
    assert accumulate_gradients(fresh, batch, 100) == pytest.approx(math.log(2))


@pytest.mark.parametrize("micro_tokens", [1, 60, 150, 100_000])
def test_p25_the_gradient_does_not_depend_on_how_the_batch_is_cut(micro_tokens):
    policy = tiny_policy()
    orm, batch = random_orm(policy), uneven(policy)
    count = sum(len(e.tokens) for e in batch)
    (classification_loss(orm, batch) / count).backward()
    whole = gradient(orm)
    accumulate_gradients(orm, batch, micro_tokens)
    cut = gradient(orm)
    assert (cut - whole).abs().max() < 1e-5 * whole.abs().max()
    # The wrong version: the mean of the means of single samples
    for example in batch:
        mean = classification_loss(orm, [example]) / len(example.tokens) / len(batch)
        mean.backward()
    assert (gradient(orm) - whole).abs().max() > 1e-2 * whole.abs().max()


def test_the_prompt_has_no_loss():
    orm = random_orm(tiny_policy())
    short = LabelledExample((1, 40, 50), (60, 61), "", True)
    # With the prompt among what is learned, this would be the same loss
    shifted = LabelledExample((1, 40), (50, 60, 61), "", True)
    scores = score_tokens(orm, [shifted])[0]
    both = [classification_loss(orm, [e]).item() for e in (short, shifted)]
    assert both[1] - both[0] == pytest.approx(-math.log(scores[0]), rel=1e-4)


# Training


def train(recorder: Memory | None = None, **changes) -> OutcomeRewardModel:
    """The toy's reward model, with ``changes`` to its settings."""
    chosen = QUICK.model_copy(update=changes)
    return train_orm(
        toy_policy(), TOY_PROBLEMS, chosen, recorder, evaluator=classification_metrics
    )


def rows(recorder: Memory, kind: str) -> list[dict]:
    return [row for row in recorder.rows if row["kind"] == kind]


@pytest.fixture
def sampled(monkeypatch) -> list[list[Rollout]]:
    """What each training sampled."""
    found: list[list[Rollout]] = []
    whole = module.sample

    def watched(policy, problems, **options):
        found.append(whole(policy, problems, **options))
        return found[-1]

    monkeypatch.setattr(module, "sample", watched)
    return found


def test_what_is_logged_can_be_counted_from_what_was_sampled(sampled):
    recorder = Memory()
    before = weights(toy_policy())
    orm = train(recorder)
    assert same_bits(weights(toy_policy()), before)
    (rollouts,) = sampled
    data = build_dataset(label_rollouts(rollouts, TOY_PROBLEMS), QUICK)
    assert rows(recorder, "sample") == [
        {
            "kind": "sample",
            "rollouts": 48,
            "accuracy": sum(sparse_rewards(rollouts, TOY_PROBLEMS)) / 48,
            "truncated": sum(not r.finished for r in rollouts) / 48,
            "distinct": len({(r.problem_id, r.tokens) for r in rollouts}),
            "train": len(data.train),
            "held_out": len(data.held_out),
            "train_questions": len({e.problem_id for e in data.train}),
            "held_out_questions": len({e.problem_id for e in data.held_out}),
        }
    ]
    updates = rows(recorder, "update")
    assert [u["update"] for u in updates] == list(range(len(updates)))
    assert [u["lr"] for u in updates] == [
        cosine_lr(
            i,
            total=len(updates),
            warmup=math.ceil(0.05 * len(updates)),
            peak=3e-3,
            floor=1e-4,
        )
        for i in range(len(updates))
    ]
    assert updates[0]["loss"] == pytest.approx(math.log(2))
    for epoch in (0, 1):
        seen = sum(u["response_tokens"] for u in updates if u["epoch"] == epoch)
        assert seen == sum(len(e.tokens) for e in data.train)
    last = rows(recorder, "held_out")[-1]
    scores, labels = (
        score_responses(orm, data.held_out),
        [e.right for e in data.held_out],
    )
    assert len(rows(recorder, "held_out")) == 2
    assert last["loss"] == pytest.approx(naive_loss(orm, data.held_out), rel=1e-5)
    assert last["auc"] == auc(scores, labels)
    right_side = [(p > 0.5) is y for p, y in zip(scores, labels, strict=True)]
    assert last["accuracy"] == sum(right_side) / len(labels)


def test_its_samples_are_not_those_of_expert_iteration(sampled):
    # A reward model would know by heart the labels of what it is to filter
    train(epochs=1)
    ((first, *_),) = sampled
    taken = sample(toy_policy(), TOY_PROBLEMS, k=8, max_new_tokens=24, seed=0)
    assert first.tokens != taken[0].tokens


def test_p47_a_run_that_stops_anywhere_and_goes_on_equals_an_undisturbed_one(sampled):
    undisturbed = Memory()
    expected = train(undisturbed).tensors()
    for die_at in range(len(undisturbed.rows)):
        sampled.clear()
        # At a checkpoint, and so many rows behind one as there are between them
        recorder = Memory(save_every=(1, 3)[die_at % 2], die_at=die_at)
        with pytest.raises(InterruptedRunError):
            train(recorder)
        assert same_bits(train(recorder).tensors(), expected), die_at
        assert recorder.rows == undisturbed.rows, die_at
        assert len(sampled) == (2 if die_at == 0 else 1)  # samples are kept
    # A run that is done is not trained again
    assert same_bits(train(undisturbed).tensors(), expected)


def test_p47_a_checkpoint_without_its_data_would_not_be_equal(monkeypatch):
    undisturbed, recorder = Memory(), Memory(die_at=3)
    expected = train(undisturbed).tensors()
    with pytest.raises(InterruptedRunError):
        train(recorder)
    # The wrong version: samples are drawn anew, with another seed
    others = sample(toy_policy(), TOY_PROBLEMS, k=8, max_new_tokens=24, seed=77)
    other = build_dataset(label_rollouts(others, TOY_PROBLEMS), QUICK)
    monkeypatch.setattr(module, "_unpack", lambda saved: other)
    assert not same_bits(train(recorder).tensors(), expected)


CHANGED = {
    "k": 7,
    "temperature": 0.5,
    "max_new_tokens": 20,
    "held_out": 0.5,
    "epochs": 1,
    "batch_size": 5,
    "lr": 2e-3,
    "lr_floor": 2e-3,
    "warmup": 0.9,
    "betas": (0.5, 0.9),
    "weight_decay": 0.5,
    "max_grad_norm": 1e-3,
    "seed": 1,
    "likelihood": True,
    "head_lr_scale": 1.0,
}


def test_p49_every_setting_changes_the_result():
    assert {*CHANGED, "micro_tokens", "compile", "lora"} == set(
        OrmSettings.model_fields
    )
    default = train().tensors()
    for name, value in CHANGED.items():
        assert not same_bits(train(**{name: value}).tensors(), default), name
    assert same_bits(train().tensors(), default)


def test_unknown_and_impossible_settings_are_refused():
    for wrong in ({"K": 4}, {"k": 1}, {"held_out": 1.0}, {"lora": {}}):
        with pytest.raises(ValidationError):
            OrmSettings(**wrong)
    assert issubclass(OrmSettings, FinetuneSettings)


def test_samples_of_one_class_are_a_clear_error():
    with pytest.raises(ValueError, match="no right sample, or no wrong one"):
        train_orm(tiny_policy(seed=1), TOY_PROBLEMS, QUICK)


# Learning


# Every letter asks for 2, so what is learned from some questions holds for others
LETTERS = [
    Problem(f"letter/{letter}", f"{letter}?", toy_solutions(2)[0], "2")
    for letter in "abcdefghijklmnop"
]
SEEN, NEW = LETTERS[:10], LETTERS[10:]
LEARN = {"k": 16, "epochs": 8, "batch_size": 16, "lr": 1e-2}


@cache
def learned(seed: int) -> OutcomeRewardModel:
    chosen = QUICK.model_copy(update={**LEARN, "seed": seed})
    return train_orm(toy_policy(), SEEN, chosen)


@effect(above=0.8)
def a_reward_model_ranks_answers_to_questions_it_never_saw(seed: int) -> float:
    return auc_of_new(learned(seed))


def auc_of_new(orm: OutcomeRewardModel) -> float:
    rollouts = sample(toy_policy(), NEW, k=8, max_new_tokens=24, seed=5)
    labels = [reward == 1.0 for reward in sparse_rewards(rollouts, NEW)]
    return auc(score_responses(orm, rollouts), labels)


@effect(above=0.8)
def flipped_labels_rank_the_wrong_ones_first(seed: int) -> float:
    whole = module.sparse_rewards
    chosen = QUICK.model_copy(update={**LEARN, "seed": seed})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "sparse_rewards", lambda *given: [1 - r for r in whole(*given)]
        )
        orm = train_orm(toy_policy(), SEEN, chosen)
    return 1 - auc_of_new(orm)


@pytest.mark.learning
@pytest.mark.parametrize(
    "found",
    [
        a_reward_model_ranks_answers_to_questions_it_never_saw,
        flipped_labels_rank_the_wrong_ones_first,
    ],
    ids=lambda found: found.name,
)
def test_p52_it_learns_to_tell_right_from_wrong(found):
    found.check()


# The likelihood in the logit


def test_with_the_likelihood_the_first_logit_is_its_multiple_and_no_more():
    policy = tiny_policy()
    orm, rollouts = OutcomeRewardModel(policy, likelihood=True), rollouts_of(policy)
    for rollout, scores in zip(rollouts, score_tokens(orm, rollouts), strict=True):
        logprobs, _ = token_logprobs(
            policy.model, [rollout.prompt_tokens], [rollout.tokens]
        )
        expected = (0.3 * logprobs[0].cumsum(0)).sigmoid().tolist()
        assert scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_p36_with_the_likelihood_too_a_score_is_its_own(kind):
    policy = tiny_policy(kind)
    orm, rollouts = OutcomeRewardModel(policy, likelihood=True), rollouts_of(policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        orm.network.weight.normal_(generator=generator)
    alone = [score_tokens(orm, [rollout])[0] for rollout in rollouts]
    assert farthest(score_tokens(orm, rollouts), alone) < 1e-5
    # Nothing that comes later counts: the scores of a prefix are those of the whole
    cut = [replace(r, tokens=r.tokens[:3], logprobs=r.logprobs[:3]) for r in rollouts]
    first = [scores[:3] for scores in alone]
    assert farthest(score_tokens(orm, cut), first) < 1e-5


def test_p47_with_the_likelihood_a_run_that_stops_goes_on_to_the_bit():
    undisturbed = Memory()
    expected = train(undisturbed, likelihood=True).tensors()
    recorder = Memory(die_at=len(undisturbed.rows) // 2)
    with pytest.raises(InterruptedRunError):
        train(recorder, likelihood=True)
    assert same_bits(train(recorder, likelihood=True).tensors(), expected)
    assert "model.beta" in expected


def test_the_head_has_a_rate_of_its_own_and_holds_what_starts_from_nothing():
    for likelihood, count in ((False, 2), (True, 3)):
        orm = OutcomeRewardModel(tiny_policy(), likelihood=likelihood)
        assert len(orm.head()) == count
        rest, head = module.orm_optimizer(orm, QUICK).param_groups
        assert len(head["params"]) == count
        assert head["lr_scale"] == QUICK.head_lr_scale
        everything = {id(p) for p in orm.network.parameters()}
        assert {id(p) for p in rest["params"] + head["params"]} == everything

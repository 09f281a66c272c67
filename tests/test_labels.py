"""Sampling after labels, and what is reported of it: the label is before every step."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import pytest
import torch
from toys import TOY_PROBLEMS, toy_policy

from rlreason.algorithms.rcrl import (
    LabelledSolution,
    conditioned_example,
    cut_steps,
)
from rlreason.evaluation.evaluate import evaluate, grade_greedy, grade_samples
from rlreason.policy import cohort_engine, forced, sampler, slot_engine
from rlreason.policy.labels import BAD, GOOD, answer_groups, sample_conditioned
from rlreason.policy.load import Policy
from rlreason.policy.logprobs import token_logprobs
from rlreason.policy.vocabulary import add_tokens, token_id
from rlreason.rewards.orm import OutcomeRewardModel
from rlreason.tasks.prompts import format_prompt

pytestmark = pytest.mark.filterwarnings("ignore:.*of the solutions were cut")


@pytest.fixture(params=["cohorts", "slots"])
def engine(request, monkeypatch):
    """Decoding as on a CPU, and as on a GPU: the module."""
    if request.param == "cohorts":
        return cohort_engine
    monkeypatch.setitem(sampler.ENGINES, "cpu", slot_engine.SlotEngine)
    return slot_engine


def student() -> Policy:
    """The toy's policy with the two labels, untrained: they mean one thing to it."""
    return add_tokens(toy_policy(), [GOOD, BAD])


@lru_cache(maxsize=1)
def conditioned() -> Policy:
    """The same with labels that mean something, whatever it is."""
    policy = student()
    rows = policy.model.get_input_embeddings().weight.data[-2:]
    rows.normal_(generator=torch.Generator().manual_seed(0))
    return policy


def obvious_greedy(policy: Policy, problem, label: str, limit: int) -> list[int]:
    """Greedy decoding with a label before each line, one full forward pass a token."""
    tokens, forced, line = [token_id(policy, label)], 1, ""
    prompt = policy.encode_prompt(format_prompt(problem))
    while len(tokens) - forced < limit and tokens[-1] != policy.eos_id:
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
        tokens.append(logits.argmax().item())
        piece = policy.decode(tokens[-1:])
        line += piece
        ended = "\n" in piece and line.strip()
        if ended and len(tokens) - forced < limit:
            tokens.append(token_id(policy, label))
            forced, line = forced + 1, ""
    return tokens


@pytest.mark.parametrize("limit", [3, 13, 40])
def test_a_label_is_forced_before_every_step(limit, engine):
    policy = student()
    for label in (GOOD, BAD):
        rollouts = sample_conditioned(
            policy, TOY_PROBLEMS, label=label, temperature=0.0, max_new_tokens=limit
        )
        expected = [obvious_greedy(policy, p, label, limit) for p in TOY_PROBLEMS]
        assert [list(r.tokens) for r in rollouts] == expected


def test_forced_labels_are_given_and_the_rest_is_sampled(engine):
    policy = student()
    rollouts = sample_conditioned(policy, TOY_PROBLEMS, k=3, max_new_tokens=24)
    assert [r.problem_id for r in rollouts] == [
        p.id for p in TOY_PROBLEMS for _ in "abc"
    ]
    assert [r.sample for r in rollouts] == [0, 1, 2] * 6
    scored, _ = token_logprobs(
        policy.model, [r.prompt_tokens for r in rollouts], [r.tokens for r in rollouts]
    )
    good = token_id(policy, GOOD)
    for r, exact in zip(rollouts, scored, strict=True):
        forced = [t for t, i in enumerate(r.tokens) if i == good]
        plain = [i for i in r.tokens if i != good]
        starts = [a for a, _ in cut_steps(policy, plain)]
        # Before each step of what was sampled stands a label, and nowhere else
        assert forced == [a + n for n, a in enumerate(starts)]
        assert "[" not in r.text
        assert r.text == policy.decode(plain)
        assert len(plain) <= 24
        assert r.finished == (r.tokens[-1] == policy.eos_id)
        for t, logprob in enumerate(r.logprobs):
            if t in forced:
                assert logprob == 0.0
            else:
                assert logprob == pytest.approx(exact[t].item(), abs=1e-4)


def test_rollouts_do_not_depend_on_what_else_is_asked(engine):
    options = {"label": BAD, "max_new_tokens": 24, "seed": 5}
    whole = sample_conditioned(student(), TOY_PROBLEMS, k=4, **options)
    tokens = [r.tokens for r in whole]
    assert len(set(tokens[:4])) > 1
    alone = sample_conditioned(student(), TOY_PROBLEMS[3:4], k=4, **options)
    assert [r.tokens for r in alone] == tokens[12:16]
    fewer = sample_conditioned(student(), TOY_PROBLEMS[::-1], k=2, **options)
    assert [r.tokens for r in fewer[-2:]] == tokens[:2]
    other = sample_conditioned(student(), TOY_PROBLEMS, k=4, label=BAD, seed=6)
    assert [r.tokens for r in other] != tokens


@pytest.mark.parametrize("limit", [9, 13, 40])
def test_labels_stay_with_their_samples_where_rows_are_refilled_and_moved(
    limit, engine, monkeypatch
):
    options = {"k": 24, "max_new_tokens": limit, "temperature": 1.5, "seed": 3}
    whole = sample_conditioned(conditioned(), TOY_PROBLEMS, **options)
    monkeypatch.setattr(slot_engine, "WORTH_SHRINKING", 4)
    budget = 400_000 if limit == 40 else 200_000
    few = sample_conditioned(conditioned(), TOY_PROBLEMS, byte_budget=budget, **options)
    assert [r.tokens for r in few] == [r.tokens for r in whole]


def test_tokens_that_tokenizer_or_model_lack_are_blank_or_not_met():
    policy = student()
    known = len(policy.tokenizer)
    policy.model.resize_token_embeddings(known + 8)
    good = token_id(policy, GOOD)
    wide = forced.Forced.of(policy, good, draws=9)
    assert wide.visible.shape == (known + 8,)
    assert not wide.visible[known:].any()
    policy = student()
    policy.tokenizer.add_tokens(["\n\n\n"])
    narrow = forced.Forced.of(policy, good, draws=9)
    assert narrow.newline.shape == (known,)
    (newline,) = narrow.newline.nonzero().flatten().tolist()
    assert policy.decode([newline]) == "\n"
    # A step has two tokens at least where none ends one alone
    assert not bool((narrow.newline & narrow.visible).any())
    assert narrow.longest([[1]]) == 9 + 4


def test_a_step_can_end_with_any_token_that_holds_a_newline():
    policy = student()
    policy.tokenizer.add_tokens(["\n\n", ".\n"])
    policy.model.resize_token_embeddings(len(policy.tokenizer))
    rule = forced.Forced.of(policy, token_id(policy, GOOD), draws=9)
    found = [policy.decode([i]) for i in rule.newline.nonzero().flatten().tolist()]
    assert found == ["\n", "\n\n", ".\n"]
    # One of them is a step by itself, so that a label may follow each
    assert rule.longest([[1]]) == 9 + 8


@pytest.mark.parametrize("limit", [1, 5, 11, 12, 17])
def test_the_limit_counts_what_is_sampled_over_all_steps(limit, engine):
    good = token_id(student(), GOOD)
    options = {"k": 3, "seed": 2}
    cut = sample_conditioned(student(), TOY_PROBLEMS, max_new_tokens=limit, **options)
    free = sample_conditioned(student(), TOY_PROBLEMS, max_new_tokens=40, **options)
    for short, long in zip(cut, free, strict=True):
        assert short.tokens == long.tokens[: len(short.tokens)]
        sampled = sum(i != good for i in short.tokens)
        assert sampled == limit or (sampled < limit and short.finished)
        assert short.tokens[-1] != good  # no label without a step


def test_a_blank_line_gets_no_label_of_its_own(monkeypatch):
    policy = student()
    encode = partial(policy.tokenizer.encode, add_special_tokens=False)
    dropped = policy.eos_id  # drawn where a label is due
    script = [*encode("\n\n1\n"), dropped, *encode("#### 2"), policy.eos_id]

    def scripted(logits, uniforms, **_):
        return torch.tensor([script.pop(0)]), torch.tensor([-1.0])

    monkeypatch.setattr(cohort_engine, "draw_tokens", scripted)
    (rollout,) = sample_conditioned(policy, TOY_PROBLEMS[:1])
    assert not script
    plain = [i for i in rollout.tokens if i < token_id(policy, GOOD)]
    asked = LabelledSolution(
        0, replace(rollout, tokens=tuple(plain)), True, (True,) * 2
    )
    # The layout of training, which is what the policy knows
    assert conditioned_example(policy, asked, TOY_PROBLEMS).tokens == rollout.tokens
    assert rollout.text == "\n\n1\n#### 2"


def test_an_answer_ends_where_its_own_positions_do(monkeypatch, engine):
    policy, limit = student(), 12
    (digit,) = policy.tokenizer.encode("1", add_special_tokens=False)

    def steps_of_one_token(logits, uniforms, **_):
        drawn = torch.full((len(uniforms),), digit)
        return drawn, torch.zeros(len(drawn))

    monkeypatch.setattr(engine, "draw_tokens", steps_of_one_token)
    whole = forced.Forced.of

    def ended_by_digits(*args):
        rule = whole(*args)
        return replace(rule, newline=torch.arange(len(rule.newline)) == digit)

    monkeypatch.setattr(forced.Forced, "of", ended_by_digits)
    problems = [
        replace(p, question=p.question + "?" * 4 * i)
        for i, p in enumerate(TOY_PROBLEMS)
    ]
    lengths = [len(policy.encode_prompt(format_prompt(p))) + 1 for p in problems]
    positions = max(lengths) + limit + 3
    assert max(lengths) - min(lengths) > limit
    monkeypatch.setattr(forced, "positions_of", lambda model: positions)
    rollouts = sample_conditioned(policy, problems, max_new_tokens=limit)
    good = token_id(policy, GOOD)
    for rollout, length in zip(rollouts, lengths, strict=True):
        # A label after each draw, until one or the other is used up
        room = min(positions - length, 2 * limit - 1)
        assert rollout.tokens == tuple([good, digit] * limit)[: 1 + room]
        assert not rollout.finished


def test_impossible_requests_are_clear_errors():
    with pytest.raises(ValueError, match=r"no token '\[BEST\]'"):
        sample_conditioned(student(), TOY_PROBLEMS, label="[BEST]")
    with pytest.raises(ValueError, match="add_tokens"):
        sample_conditioned(toy_policy(), TOY_PROBLEMS)
    with pytest.raises(ValueError, match="k=0"):
        sample_conditioned(student(), TOY_PROBLEMS, k=0)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        sample_conditioned(student(), TOY_PROBLEMS, max_new_tokens=0)
    assert sample_conditioned(student(), []) == []


# Evaluation


def report_of(label: str, **options):
    options = {"max_new_tokens": 24, "temperature": 0.9, "seed": 5, **options}
    return evaluate(conditioned(), TOY_PROBLEMS, label=label, **options)


def test_the_label_reaches_the_sampler():
    good, bad = (report_of(label, k=8) for label in (GOOD, BAD))
    assert good.results != bad.results

    def deaf(*args, label, **options):
        return answer_groups(*args, label=GOOD, **options)

    assert report_of(BAD, k=8, sampler=deaf).results == good.results


@pytest.mark.parametrize("label", [GOOD, BAD])
def test_a_report_is_of_conditioned_samples(label):
    report = report_of(label, k=3)
    options = {"label": label, "max_new_tokens": 24, "seed": 5}
    draw = partial(sample_conditioned, conditioned(), TOY_PROBLEMS, **options)
    greedy, samples = draw(temperature=0.0), draw(k=3, temperature=0.9)
    for i, problem in enumerate(TOY_PROBLEMS):
        alone = grade_greedy(problem, greedy[i])
        expected = grade_samples(alone, problem, samples[3 * i : 3 * i + 3])
        assert report.results[i] == expected


def test_a_label_with_shots_or_without_its_token_is_a_clear_error():
    with pytest.raises(ValueError, match="worked examples have no labels"):
        evaluate(conditioned(), TOY_PROBLEMS, k=0, label=GOOD, shots=TOY_PROBLEMS[1:2])
    with pytest.raises(ValueError, match=r"no token '\[GOOD\]'.*add_tokens"):
        evaluate(toy_policy(), TOY_PROBLEMS, k=0, label=GOOD)
    with pytest.raises(ValueError, match=r"no token '\[BEST\]'"):
        report_of("[BEST]", k=0)


def test_a_reward_model_that_does_not_know_the_labels_says_so():
    unknown = token_id(conditioned(), GOOD)
    orm = OutcomeRewardModel(toy_policy())
    with pytest.raises(ValueError, match=f"token {unknown} is not among the 260"):
        report_of(GOOD, k=2, orm=orm)

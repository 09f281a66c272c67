"""Return-conditioned RL: what is labelled how, what is learned, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from margins import effect
from pydantic import ValidationError
from tiny_models import tiny_policy
from toys import (
    TOY_PROBLEMS,
    InterruptedRunError,
    Memory,
    same_bits,
    toy_policy,
    toy_solutions,
    weights,
)

from rlreason.algorithms import rcrl as module
from rlreason.algorithms.batching import Example, response_token_count
from rlreason.algorithms.finetune import FinetuneSettings, nll
from rlreason.algorithms.rcrl import (
    LABELLING_STREAM,
    SAMPLING_STREAM,
    LabelledSolution,
    RcrlSettings,
    balance_solutions,
    conditioned_example,
    cut_steps,
    distinct_solutions,
    label_steps,
    prefix_success,
    rcrl,
)
from rlreason.mdp import step_spans
from rlreason.policy.labels import BAD, GOOD, sample_conditioned
from rlreason.policy.layout import micro_batches
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Prompt, Rollout
from rlreason.policy.sampler import sample, sample_prompts
from rlreason.policy.vocabulary import add_tokens, token_id
from rlreason.rewards.sparse import sparse_rewards
from rlreason.tasks.answers import is_correct
from rlreason.tasks.prompts import format_prompt, format_response

QUICK = RcrlSettings(
    samples=4,
    k=4,
    max_new_tokens=24,
    finetune=FinetuneSettings(epochs=2, batch_size=8, lr=1e-2, lr_floor=1e-3),
)


def solution(text: str, problem: int = 0, *, at: int = 0) -> LabelledSolution:
    """A finished solution of a toy problem, in the tokens of the toy's policy."""
    asked, policy = TOY_PROBLEMS[problem], toy_policy()
    prompt = format_prompt(asked)
    tokens = tuple(policy.encode_response(prompt, format_response(text)))
    rollout = Rollout(
        problem_id=asked.id,
        sample=at,
        prompt_tokens=tuple(policy.encode_prompt(prompt)),
        tokens=tokens,
        logprobs=(-1.0,) * len(tokens),
        text=policy.decode(tokens),
        finished=True,
    )
    return LabelledSolution(problem, rollout, is_correct(text, asked.answer))


TOY_SOLUTIONS = [
    solution(text, i, at=n)
    for i in (0, 1)
    for n, text in enumerate(toy_solutions(2) + toy_solutions(3))
]


def student() -> Policy:
    """The toy's policy with the two labels, untrained."""
    return add_tokens(toy_policy(), [GOOD, BAD])


# Sampled data


def test_repeats_and_truncated_solutions_are_dropped_and_right_is_not_wrong():
    short, wordy, other = (solution(t).rollout for t in toy_solutions(2))
    wrong = solution("<<1+1=2>>\n#### 5").rollout  # the same operations, and wrong
    cut = replace(solution("<<2+0=2>>\n#### 2").rollout, finished=False)
    elsewhere = solution(toy_solutions(2)[0], 2).rollout
    rollouts = [short, wordy, other, wrong, cut, elsewhere, wrong]
    kept = distinct_solutions(
        rollouts, sparse_rewards(rollouts, TOY_PROBLEMS), TOY_PROBLEMS
    )
    assert [s.rollout for s in kept] == [short, other, wrong, elsewhere]
    assert [s.right for s in kept] == [True, True, False, True]
    assert [s.problem for s in kept] == [0, 0, 0, 2]
    assert all(s.good == () for s in kept)


@given(
    outcomes=st.lists(st.booleans(), min_size=2, max_size=60).filter(
        lambda each: any(each) and not all(each)
    ),
    ratio=st.sampled_from([100.0, 10.0, 2.0, 1.0, 0.5, None]),
    seed=st.integers(0, 3),
)
def test_the_balance_holds_and_keeps_as_many_as_it_can(outcomes, ratio, seed):
    one = TOY_SOLUTIONS[0]
    given_ = [replace(one, problem=i, right=r) for i, r in enumerate(outcomes)]
    kept = balance_solutions(given_, ratio, seed=seed)
    assert [s for s in given_ if s in kept] == kept  # in order, none twice
    assert balance_solutions(given_, ratio, seed=seed) == kept
    right = sum(s.right for s in kept)
    wrong = len(kept) - right
    if ratio is None:
        assert kept == given_
        return
    # One of the two is kept whole, and the other fits it up to rounding
    assert right == sum(outcomes) or wrong == outcomes.count(False)
    assert right == max(1, round(ratio * wrong)) or wrong == max(
        1, round(right / ratio)
    )


def test_one_kind_of_solutions_alone_is_a_clear_error():
    with pytest.raises(ValueError, match=r"12 right and 0 wrong.*Raise samples"):
        balance_solutions([replace(s, right=True) for s in TOY_SOLUTIONS], 1.0, seed=0)
    with pytest.raises(ValueError, match="0 right and"):
        rcrl(tiny_policy(seed=1), tiny_policy(), TOY_PROBLEMS, MANY_CUT)


MANY_CUT = QUICK.model_copy(update={"max_new_tokens": 40})


# Labels


def obvious_success(prefix: str, problem: int, n: int = 200) -> float:
    """Share of ``n`` continuations that are right, drawn one token after the other."""
    policy, asked = toy_policy(), TOY_PROBLEMS[problem]
    start = policy.encode_prompt(format_prompt(asked) + prefix)
    ids = torch.tensor([start] * n)
    generator = torch.Generator().manual_seed(0)
    for _ in range(QUICK.max_new_tokens):
        with torch.no_grad():
            probs = policy.model(ids).logits[:, -1].softmax(-1)
        drawn = torch.multinomial(probs, 1, generator=generator)
        ids = torch.cat([ids, drawn], 1)
    right = 0
    for row in ids[:, len(start) :].tolist():
        end = row.index(policy.eos_id) if policy.eos_id in row else len(row)
        right += is_correct(prefix + policy.decode(row[:end]), asked.answer)
    return right / n


@pytest.mark.parametrize("prefix", [" ", " <<1+1=2>>\n", " <<5-2=3>>\n"])
def test_success_of_a_prefix_is_what_an_obvious_loop_finds(prefix):
    policy = toy_policy()
    text = format_prompt(TOY_PROBLEMS[0])
    tokens = tuple(policy.encode_response(text, prefix)[:-1])
    many = QUICK.model_copy(update={"k": 200})
    ((_, rate),) = prefix_success(policy, [(0, tokens)], TOY_PROBLEMS, many).items()
    assert rate == pytest.approx(obvious_success(prefix, 0), abs=0.12)


def obvious_labels(one: LabelledSolution, shift: int = 0) -> tuple[bool, ...]:
    """Labels of one solution, prefix by prefix; ``shift=1``: the prefix before."""
    policy, asked = toy_policy(), TOY_PROBLEMS[one.problem]
    spans, labels = cut_steps(policy, one.rollout.tokens), []
    for start, end in spans:
        tokens = one.rollout.tokens[: start if shift else end]
        if tokens == one.rollout.tokens:
            labels.append(one.right)
            continue
        rollouts = sample_prompts(
            policy,
            [
                Prompt(
                    asked.id,
                    one.rollout.prompt_tokens + tokens,
                    " after " + " ".join(map(str, tokens)),
                )
            ],
            k=QUICK.k,
            max_new_tokens=QUICK.max_new_tokens - len(tokens),
            seed=LABELLING_STREAM,
        )
        texts = [policy.decode(tokens + r.tokens) for r in rollouts]
        right = sum(is_correct(text, asked.answer) for text in texts)
        labels.append(right / QUICK.k >= QUICK.threshold)
    return tuple(labels)


def test_labels_are_those_of_every_prefix_tried_alone():
    labelled, used = label_steps(toy_policy(), TOY_SOLUTIONS, TOY_PROBLEMS, QUICK)
    assert [s.good for s in labelled] == [obvious_labels(s) for s in TOY_SOLUTIONS]
    assert [replace(s, good=()) for s in labelled] == TOY_SOLUTIONS
    # Each of these solutions has one prefix of its own
    assert used == QUICK.k * len(TOY_SOLUTIONS)
    _, again = label_steps(toy_policy(), TOY_SOLUTIONS * 2, TOY_PROBLEMS, QUICK)
    assert again == used  # what begins alike is tried once

    # In the toy, the first line decides: it is as good as the solution
    assert all(s.good == (s.right, s.right) for s in labelled)
    # The wrong version: a step labelled by the prefix before it knows nothing of it
    wrong = [obvious_labels(s, shift=1) for s in TOY_SOLUTIONS]
    assert wrong != [s.good for s in labelled]
    assert len({labels[0] for labels in wrong[:6]}) == 1


def test_the_label_of_a_prefix_does_not_depend_on_the_others():
    policy = toy_policy()
    hard = QUICK.model_copy(update={"k": 7})
    prefixes = [
        (s.problem, s.rollout.tokens[:n]) for s in TOY_SOLUTIONS for n in (1, 3, 6)
    ]
    together = prefix_success(policy, prefixes, TOY_PROBLEMS, hard)
    for prefix in prefixes[::5]:
        alone = prefix_success(policy, [prefix], TOY_PROBLEMS, hard)
        assert alone[prefix] == together[prefix]


def test_prefixes_are_asked_apart_where_the_model_has_no_room_for_all(monkeypatch):
    """A short one's room behind a long one was refused, after all was sampled."""
    policy, one = toy_policy(), TOY_SOLUTIONS[0]
    tokens = one.rollout.tokens
    prefixes = [(0, tokens[:n]) for n in (1, 2, 5, len(tokens) - 2)]
    settings = QUICK.model_copy(update={"max_new_tokens": len(tokens) + 2})
    free = prefix_success(policy, prefixes, TOY_PROBLEMS, settings)
    longest = len(policy.encode_prompt(format_prompt(TOY_PROBLEMS[0])))
    tight = longest + settings.max_new_tokens
    monkeypatch.setattr(policy.model.config, "max_position_embeddings", tight)
    assert prefix_success(policy, prefixes, TOY_PROBLEMS, settings) == free


def test_prefix_and_continuation_together_keep_to_the_limit():
    policy, one = toy_policy(), TOY_SOLUTIONS[0]
    tokens, k = one.rollout.tokens, 8
    tight = QUICK.model_copy(update={"k": k, "max_new_tokens": len(tokens) - 2})
    # Cut before the number, and before that another prefix that has more room
    prefixes = [(0, tokens[:-3]), (0, tokens[:1])]
    rates = prefix_success(policy, prefixes, TOY_PROBLEMS, tight)
    assert rates[prefixes[0]] == 0.0
    free = QUICK.model_copy(update={"k": k, "max_new_tokens": len(tokens)})
    assert prefix_success(policy, prefixes, TOY_PROBLEMS, free)[prefixes[0]] == 1.0


def test_without_rollouts_every_step_takes_the_label_of_its_solution():
    none = QUICK.model_copy(update={"k": 0})
    labelled, used = label_steps(toy_policy(), TOY_SOLUTIONS, TOY_PROBLEMS, none)
    assert used == 0
    assert all(s.good == (s.right,) * 2 for s in labelled)


def test_a_reward_model_is_read_at_the_last_token_of_each_step():
    asked = []

    def orm(rollouts):
        asked.extend(rollouts)
        rows = []
        for r in rollouts:
            newline = toy_policy().decode_batch([[t] for t in r.tokens]).index("\n")
            rows.append([float(t == newline) for t in range(len(r.tokens))])
        return rows

    labelled, used = label_steps(
        toy_policy(), TOY_SOLUTIONS, TOY_PROBLEMS, QUICK, orm=orm
    )
    assert used == 0
    assert asked == [s.rollout for s in TOY_SOLUTIONS]
    # The last step is judged by its reward, which is known
    assert all(s.good == (True, s.right) for s in labelled)
    with pytest.raises(ValueError, match="one score a token"):
        label_steps(
            toy_policy(),
            TOY_SOLUTIONS,
            TOY_PROBLEMS,
            QUICK,
            orm=lambda rollouts: [[0.5] for _ in rollouts],
        )


# Layout


def steps_of(policy: Policy, text: str) -> list[str]:
    tokens = [*policy.tokenizer(text, add_special_tokens=False).input_ids, 2]
    return [policy.decode(tokens[a:b]) for a, b in cut_steps(policy, tokens)]


def test_steps_are_lines_and_what_is_blank_at_the_end_is_one_more():
    policy = toy_policy()
    assert steps_of(policy, " a\nb\n#### 2") == [" a\n", "b\n", "#### 2"]
    assert steps_of(policy, "a\n\n\nb") == ["a\n", "\n\nb"]
    assert steps_of(policy, "a\n") == ["a\n", ""]
    assert steps_of(policy, "a\n\n ") == ["a\n", "\n "]
    assert steps_of(policy, "") == [""]
    assert steps_of(policy, "\n") == ["\n"]


@given(text=st.text(alphabet="a2 \n", max_size=20))
def test_steps_are_those_of_the_process_up_to_the_blank_end(text):
    policy = toy_policy()
    tokens = [*policy.tokenizer(text, add_special_tokens=False).input_ids, 2]
    spans = cut_steps(policy, tokens)
    assert [t for a, b in spans for t in tokens[a:b]] == tokens
    whole = step_spans(policy.decode_batch([[t] for t in tokens]))
    assert spans[: len(whole) - 1] == whole[:-1]
    assert len(spans) - len(whole) in (0, 1)
    if len(spans) > len(whole):
        assert not policy.decode(tokens[spans[-1][0] :]).strip()


def test_each_label_stands_before_its_step():
    one = replace(TOY_SOLUTIONS[3], good=(True, False))
    example = conditioned_example(student(), one, TOY_PROBLEMS)
    good, bad = token_id(student(), GOOD), token_id(student(), BAD)
    line = one.rollout.tokens.index(toy_policy().encode_prompt("\n")[-1]) + 1
    assert example.tokens == (
        *(good, *one.rollout.tokens[:line]),
        *(bad, *one.rollout.tokens[line:]),
    )
    assert example.given == (0, line + 1)
    assert example.prompt_tokens == one.rollout.prompt_tokens
    assert student().decode(example.tokens) == one.rollout.text
    assert example.tokens[-1] == student().eos_id


def test_a_solution_that_spells_a_label_is_not_given_one():
    one = solution("[BAD] so [GOOD]\n#### 2")
    example = conditioned_example(
        student(), replace(one, good=(True, True)), TOY_PROBLEMS
    )
    ids = [token_id(student(), GOOD), token_id(student(), BAD)]
    assert [t for t, i in enumerate(example.tokens) if i in ids] == list(example.given)
    assert student().decode(example.tokens) == one.rollout.text


# Loss


def labelled_batch() -> list[Example]:
    chosen = [replace(s, good=(s.right, not s.right)) for s in TOY_SOLUTIONS]
    return [conditioned_example(student(), s, TOY_PROBLEMS) for s in chosen]


def all_learned(batch: list[Example]) -> list[Example]:
    return [replace(example, given=()) for example in batch]


def obvious_loss(policy: Policy, batch: list[Example]) -> tuple[float, int]:
    """The loss from its definition, token by token, and the tokens it counts."""
    labels = {token_id(policy, GOOD), token_id(policy, BAD)}
    total, count = 0.0, 0
    for example in batch:
        ids = torch.tensor([[*example.prompt_tokens, *example.tokens]])
        with torch.no_grad():
            logprobs = policy.model(ids).logits[0].double().log_softmax(-1)
        for t, token in enumerate(example.tokens):
            if token not in labels:
                total -= logprobs[len(example.prompt_tokens) - 1 + t, token].item()
                count += 1
    return total, count


def test_the_loss_is_on_steps_and_eos_and_never_on_labels():
    batch = labelled_batch()
    expected, count = obvious_loss(student(), batch)
    assert response_token_count(batch) == count
    loss = nll(student(), batch).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    cut = [nll(student(), mb).item() for mb in micro_batches(batch, max_tokens=90)]
    assert len(cut) > 2
    assert sum(cut) == pytest.approx(expected, rel=1e-5)
    # The wrong version: the labels are learned, too
    assert nll(student(), all_learned(batch)).item() > 1.1 * expected


def test_labels_are_no_targets_of_the_output_layer():
    policy = student()
    ids = [token_id(policy, GOOD), token_id(policy, BAD)]
    output = policy.model.get_output_embeddings().weight
    right = torch.autograd.grad(nll(policy, labelled_batch()), output)[0]
    wrong = torch.autograd.grad(nll(policy, all_learned(labelled_batch())), output)[0]
    # As wrong alternatives, labels have only their small probability as gradient
    assert right[ids].norm() < 0.2 * wrong[ids].norm()


# The whole algorithm


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "QUESTIONS_AT_ONCE", 2)


def run(recorder: Memory | None = None, *, base: Policy | None = None, **changes):
    """RCRL on the toy, with ``changes`` to its settings."""
    orm = changes.pop("orm", None)
    return rcrl(
        toy_policy(),
        base or toy_policy(),
        TOY_PROBLEMS,
        QUICK.model_copy(update=changes),
        orm=orm,
        recorder=recorder,
    )


def rows(recorder: Memory, kind: str) -> list[dict]:
    return [row for row in recorder.rows if row["kind"] == kind]


def test_what_is_logged_can_be_counted(small_chunks):
    recorder = Memory()
    untouched = weights(toy_policy())
    run(recorder, positive_ratio=1.0)
    sampled, labelled = rows(recorder, "sample"), rows(recorder, "label")
    assert [row["questions"] for row in sampled] == [2, 4, 6]
    assert [row["rollouts"] for row in sampled] == [8, 16, 24]
    assert [row["questions"] for row in labelled] == [2, 4, 6]
    rollouts = sample(
        toy_policy(), TOY_PROBLEMS, k=4, max_new_tokens=24, seed=SAMPLING_STREAM
    )
    rewards = sparse_rewards(rollouts, TOY_PROBLEMS)
    distinct = distinct_solutions(rollouts, rewards, TOY_PROBLEMS)
    assert sum(row["accuracy"] for row in sampled) / 3 == pytest.approx(
        sum(rewards) / 24
    )
    kept = balance_solutions(distinct, 1.0, seed=0)
    last = sampled[-1]
    assert last["right_solutions"] == last["wrong_solutions"] == len(kept) / 2
    solutions, used = label_steps(toy_policy(), kept, TOY_PROBLEMS, QUICK)
    labels = [good for s in solutions for good in s.good]
    assert labelled[-1]["rollouts"] == 24 + used
    assert labelled[-1]["steps"] == len(labels)
    assert labelled[-1]["good_steps"] == sum(labels) / len(labels)
    learned = rows(recorder, "update")
    assert len(learned) == 2 * -(-len(kept) // 8)
    tokens = sum(len(s.rollout.tokens) for s in kept)
    assert sum(row["response_tokens"] for row in learned) == 2 * tokens
    assert same_bits(weights(toy_policy()), untouched)


@pytest.mark.parametrize("save_every", [1, 3])
def test_p47_a_run_that_stops_anywhere_equals_an_undisturbed_one(
    small_chunks, save_every
):
    less = {"samples": 3, "k": 2, "max_new_tokens": 20}
    undisturbed = Memory(save_every=save_every)
    expected = weights(run(undisturbed, **less))
    for die_at in range(save_every // 2, len(undisturbed.rows), 2):
        recorder = Memory(save_every=save_every, die_at=die_at)
        with pytest.raises(InterruptedRunError):
            run(recorder, **less)
        assert same_bits(weights(run(recorder, **less)), expected), die_at
        assert recorder.rows == undisturbed.rows, die_at
    again = run(undisturbed, **less)  # of a run that is done, nothing is made again
    assert same_bits(weights(again), expected)


def test_a_run_resumed_does_not_sample_again(small_chunks, monkeypatch):
    recorder = Memory()
    learn_at = 6  # three rows of sampling, three of labels
    recorder.die_at = learn_at + 1
    with pytest.raises(InterruptedRunError):
        run(recorder)
    monkeypatch.setattr(module, "sample", None)
    monkeypatch.setattr(module, "sample_prompts", None)
    run(recorder)
    assert rows(recorder, "update")


def test_a_reward_model_takes_the_place_of_rollouts():
    recorder = Memory()
    run(recorder, orm=lambda rollouts: [[0.9] * len(r.tokens) for r in rollouts])
    assert rows(recorder, "label")[-1]["rollouts"] == 24
    # All first steps, and the last ones of the right half
    assert rows(recorder, "label")[-1]["good_steps"] == 0.75


CHANGED = {
    "samples": 5,
    "temperature": 0.5,
    "k": 1,
    "threshold": 1.0,
    "positive_ratio": 2.0,
    "max_new_tokens": 22,
    "seed": 1,
    "finetune": QUICK.finetune.model_copy(update={"lr": 1e-3}),
}


def test_p49_every_setting_changes_the_result():
    assert set(CHANGED) == set(RcrlSettings.model_fields)
    # An expert that is not sure, so that labels hang on how they are found
    expert = toy_policy().clone()
    with torch.no_grad():
        expert.model.get_output_embeddings().weight.mul_(0.9)

    def trained(**changes):
        chosen = QUICK.model_copy(
            update={"max_new_tokens": 40, "samples": 12} | changes
        )
        return weights(rcrl(expert, toy_policy(), TOY_PROBLEMS, chosen))

    default = trained()
    for name, value in CHANGED.items():
        assert not same_bits(trained(**{name: value}), default), name
    assert same_bits(trained(), default)


def test_unknown_and_impossible_settings_are_refused():
    for wrong in ({"K": 4}, {"samples": 0}, {"threshold": 0.0}, {"positive_ratio": 0}):
        with pytest.raises(ValidationError):
            RcrlSettings(**wrong)


def test_a_base_with_another_vocabulary_is_a_clear_error():
    with pytest.raises(ValueError, match="different vocabularies"):
        rcrl(student(), toy_policy(), TOY_PROBLEMS, QUICK)


# Learning: of two answers, every question of these has the first

BANDIT = TOY_PROBLEMS[::2]
THOROUGH = QUICK.model_copy(
    update={
        "samples": 8,
        "finetune": FinetuneSettings(epochs=60, batch_size=12, lr=1e-2, lr_floor=1e-3),
    }
)


@cache
def learned_gap(seed: int, **changed: Callable) -> float:
    """How much more often it is right asked for good steps than asked for bad ones.

    Shares of solutions at temperature 1. ``changed``: what stands in for functions of
    the algorithm's, given the right one first.
    """
    settings = THOROUGH.model_copy(update={"seed": seed})
    with pytest.MonkeyPatch.context() as patch:
        for name, wrong in changed.items():
            patch.setattr(module, name, partial(wrong, getattr(module, name)))
        policy = rcrl(toy_policy(), toy_policy(), BANDIT, settings)
    shares = []
    for label in (GOOD, BAD):
        rollouts = sample_conditioned(
            policy, BANDIT, label=label, k=64, max_new_tokens=24, seed=99
        )
        shares.append(sum(sparse_rewards(rollouts, BANDIT)) / len(rollouts))
    return shares[0] - shares[1]


@effect(above=0.5)
def rcrl_good_is_right_more_often_than_bad(seed: int) -> float:
    return learned_gap(seed)


def swapped(whole, student, one, problems):
    other = tuple(not good for good in one.good)
    return whole(student, replace(one, good=other), problems)


@effect(above=0.5)
def rcrl_swapped_labels_reverse_it(seed: int) -> float:
    return -learned_gap(seed, conditioned_example=swapped)


def late(whole, student, one, problems):
    """All labels after all steps, as if they described what was written."""
    example = whole(student, one, problems)
    labels = [example.tokens[place] for place in example.given]
    steps = [t for i, t in enumerate(example.tokens) if i not in example.given]
    places = tuple(range(len(steps), len(example.tokens)))
    return Example(example.prompt_tokens, (*steps, *labels), given=places)


@effect(above=0.5)
def rcrl_labels_after_the_steps_teach_nothing(seed: int) -> float:
    return learned_gap(seed) - abs(learned_gap(seed, conditioned_example=late))


def early(whole, expert, prefixes, problems, settings):
    """Each label that of the first token: there nothing is decided yet."""
    rates = whole(expert, [(i, t[:1]) for i, t in prefixes], problems, settings)
    return {(i, t): rates[i, t[:1]] for i, t in prefixes}


@effect(above=0.2)
def rcrl_labels_of_the_prefix_before_teach_less(seed: int) -> float:
    return learned_gap(seed) - abs(learned_gap(seed, prefix_success=early))


@pytest.mark.learning
@pytest.mark.parametrize(
    "found",
    [
        rcrl_good_is_right_more_often_than_bad,
        rcrl_swapped_labels_reverse_it,
        rcrl_labels_after_the_steps_teach_nothing,
        rcrl_labels_of_the_prefix_before_teach_less,
    ],
    ids=lambda found: found.name,
)
def test_p52_it_learns_what_its_labels_say_and_nothing_else(found):
    found.check()

"""Expert iteration: what is kept, what is learned, and from where."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from margins import effect
from pydantic import ValidationError
from tiny_models import spaced_tokenizer, tiny_policy
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

from rlreason.algorithms import expert_iteration as module
from rlreason.algorithms.expert_iteration import (
    ExpertIterationSettings,
    OnRound,
    Solution,
    SolutionScorer,
    Tally,
    allocate,
    expert_iteration,
    grow,
    orm_filter,
    rarity_weights,
    solution_key,
)
from rlreason.algorithms.finetune import FinetuneSettings
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import sample
from rlreason.rewards.orm import OutcomeRewardModel, score_responses
from rlreason.rewards.sparse import sparse_rewards
from rlreason.tasks.answers import operation_key
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt

QUICK = ExpertIterationSettings(
    k=4,
    rounds=2,
    max_new_tokens=24,
    finetune=FinetuneSettings(epochs=3, batch_size=8, lr=1e-2, lr_floor=1e-3),
)
TEXTS = [*toy_solutions(2), *toy_solutions(3), "#### 2", "so 2\n#### 2", "2", ""]


# Growing the data


def rollout(problem: int, text: str, *, finished: bool = True, at: int = 0) -> Rollout:
    """A rollout whose tokens tell it from every other."""
    tokens = (100 + at, *text.encode(), *((2,) if finished else ()))
    return Rollout(
        problem_id=TOY_PROBLEMS[problem].id,
        sample=at,
        prompt_tokens=(1, 5),
        tokens=tokens,
        logprobs=(0.0,) * len(tokens),
        text=text,
        finished=finished,
    )


@pytest.mark.parametrize(
    "policy",
    [toy_policy(), replace(tiny_policy(), tokenizer=spaced_tokenizer())],
    ids=["bytes", "spaced"],
)
def test_eos_is_learned_where_an_answer_ended_with_a_question_of_its_own(policy):
    """As it was sampled, also by tokenizers whose texts lose a space when alone."""
    problem = TOY_PROBLEMS[0]
    prompt, text = format_prompt(problem), f" {problem.solution}"
    right = policy.encode_response(prompt, text)
    asking = policy.encode_response(prompt, f"{text}\n\nQ:")[:-1]
    cut = right[:-1]  # by the length limit: to add EOS would teach what was not said
    data = [Solution(0, (), tuple(tokens)) for tokens in (right, asking, cut)]
    tally = module.Tally((0,), (0,))
    found = module._examples(policy, [problem], data, tally, QUICK)
    assert [list(example.tokens) for example in found] == [right, right, cut]


def grown(rollouts: list[Rollout], dataset=(), **changes) -> list[Solution]:
    rewards = sparse_rewards(rollouts, TOY_PROBLEMS)
    chosen = QUICK.model_copy(update=changes)
    return grow(dataset, rollouts, rewards, TOY_PROBLEMS, chosen)


def obvious_grow(rollouts: list[Rollout], dataset: list[Solution], rule: str) -> set:
    """The set of (problem, key) that ought to be in D, from the definition."""
    index = {problem.id: i for i, problem in enumerate(TOY_PROBLEMS)}
    keys = {(s.problem, s.key) for s in dataset}
    for r in rollouts:
        i = index[r.problem_id]
        if r.finished and sparse_rewards([r], TOY_PROBLEMS) == [1.0]:
            keys.add((i, solution_key(r.text, rule, 0)))
    return keys


any_rollouts = st.lists(
    st.tuples(
        st.integers(0, len(TOY_PROBLEMS) - 1), st.sampled_from(TEXTS), st.booleans()
    ),
    max_size=30,
).map(lambda draws: [rollout(i, t, finished=f, at=n) for n, (i, t, f)
                     in enumerate(draws)])  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    first=any_rollouts,
    second=any_rollouts,
    rule=st.sampled_from(("operations", "text")),
)
def test_data_is_what_is_right_and_ended_once_a_key_and_what_was_there(
    first, second, rule
):
    before = grown(first, deduplicate=rule)
    after = grown(second, before, deduplicate=rule)
    assert after[: len(before)] == before  # D_i holds D_{i-1}, unchanged
    keys = [(s.problem, s.key) for s in after]
    assert len(keys) == len(set(keys))
    assert set(keys) == obvious_grow(first + second, [], rule)
    tokens = {(r.problem_id, r.tokens) for r in first + second if r.finished}
    assert all((TOY_PROBLEMS[s.problem].id, s.tokens) in tokens for s in after)
    assert grown(second, after, deduplicate=rule) == after  # nothing new, no change


@settings(max_examples=60, deadline=None)
@given(rollouts=any_rollouts, cap=st.integers(1, 3))
def test_the_cap_holds_for_every_question_and_takes_the_first(rollouts, cap):
    free = grown(rollouts, deduplicate="none")
    capped = grown(rollouts, deduplicate="none", max_per_question=cap)
    for i in range(len(TOY_PROBLEMS)):
        tokens = [s.tokens for s in capped if s.problem == i]
        assert tokens == [s.tokens for s in free if s.problem == i][:cap]


def test_the_cap_counts_what_was_kept_before():
    one = grown([rollout(0, toy_solutions(2)[0])], max_per_question=1)
    assert grown([rollout(0, toy_solutions(2)[2])], one, max_per_question=1) == one


def test_a_truncated_rollout_is_never_kept_although_it_is_paid():
    cut = rollout(0, "<<1+1=2>>\n#### 2", finished=False)
    assert sparse_rewards([cut], TOY_PROBLEMS) == [1.0]
    assert grown([cut]) == []
    assert len(grown([rollout(0, cut.text)])) == 1


def test_what_counts_as_a_repeat():
    short, wordy, other = toy_solutions(2)
    assert operation_key(short) == operation_key(wordy) != operation_key(other)
    rollouts = [rollout(0, t, at=i) for i, t in enumerate((short, wordy, short, other))]
    kept = {
        rule: [s.tokens[0] - 100 for s in grown(rollouts, deduplicate=rule)]
        for rule in ("operations", "text", "none")
    }
    assert kept == {"operations": [0, 3], "text": [0, 1, 3], "none": [0, 1, 2, 3]}
    # One text answers two questions: these are two solutions
    assert len(grown([rollout(0, short), rollout(2, short)])) == 2


def test_without_a_rule_a_second_round_keeps_repeats_too():
    one = grown([rollout(0, toy_solutions(2)[0])], deduplicate="none")
    assert len(grown([rollout(0, toy_solutions(2)[0])], one, deduplicate="none")) == 2


# The whole algorithm


def run(
    recorder: Memory | None = None,
    *,
    start: Policy | None = None,
    base: Policy | None = None,
    problems: list[Problem] = TOY_PROBLEMS,
    solved: list[Problem] | tuple = (),
    shots: list[Problem] | tuple = (),
    orm: SolutionScorer | None = None,
    on_round: OnRound | None = None,
    **changes,
) -> Policy:
    """Expert iteration on the toy, with ``changes`` to its settings."""
    return expert_iteration(
        start or toy_policy(),
        base or toy_policy(),
        problems,
        QUICK.model_copy(update=changes),
        solved=solved,
        shots=shots,
        orm=orm,
        recorder=recorder,
        on_round=on_round,
    )


def prompts_of(problems) -> list[tuple[int, ...]]:
    return [tuple(toy_policy().encode_prompt(format_prompt(p))) for p in problems]


def rounds(recorder: Memory) -> list[dict]:
    return [row for row in recorder.rows if row["kind"] == "round"]


@pytest.fixture
def seen(monkeypatch) -> dict[str, list]:
    """What was sampled, and what was trained on, round by round."""
    found: dict[str, list] = {
        name: [] for name in ("policies", "sampled", "asked", "trained", "students")
    }
    whole_sample, whole_finetune = module.sample, module.finetune

    def watched_sample(policy, problems, **options):
        found["asked"].append(options)
        found["policies"].append(policy)
        found["sampled"].append(whole_sample(policy, problems, **options))
        return found["sampled"][-1]

    def watched_finetune(policy, examples, *rest):
        found["trained"].append(list(examples))
        found["students"].append(weights(policy))
        return whole_finetune(policy, examples, *rest)

    monkeypatch.setattr(module, "sample", watched_sample)
    monkeypatch.setattr(module, "finetune", watched_finetune)
    return found


def test_it_samples_k_solutions_a_question_and_round_and_counts_them(seen):
    recorder = Memory()
    run(recorder, k=3, rounds=3)
    assert [len(r) for r in seen["sampled"]] == [18, 18, 18]
    assert [row["rollouts"] for row in rounds(recorder)] == [18, 36, 54]
    assert [row["round"] for row in rounds(recorder)] == [1, 2, 3]
    assert all(o["temperature"] == 1.0 and o["k"] == [3] * 6 for o in seen["asked"])
    assert len({o["seed"] for o in seen["asked"]}) == 3


def test_what_is_logged_can_be_counted_from_what_was_sampled(seen):
    recorder = Memory()
    run(recorder, solved=TOY_PROBLEMS[:2])
    size = 2
    for row, rollouts, trained in zip(
        rounds(recorder), seen["sampled"], seen["trained"], strict=True
    ):
        rewards = sparse_rewards(rollouts, TOY_PROBLEMS)
        right = {
            r.problem_id for r, paid in zip(rollouts, rewards, strict=True) if paid
        }
        assert row["accuracy"] == sum(rewards) / 24
        assert row["solved_questions"] == len(right) / 6
        assert row["truncated"] == sum(not r.finished for r in rollouts) / 24
        assert row["response_length"] == sum(len(r.tokens) for r in rollouts) / 24
        assert row["solutions"] == len(trained) == size + row["new_solutions"]
        questions = {example.prompt_tokens for example in trained}
        assert row["solutions_per_question"] == len(trained) / len(questions)
        size = row["solutions"]


def test_the_tokens_trained_are_the_tokens_sampled(seen):
    run()
    for i, examples in enumerate(seen["trained"]):
        earlier = [r for rollouts in seen["sampled"][: i + 1] for r in rollouts]
        sampled = {(r.prompt_tokens, r.tokens) for r in earlier}
        assert examples
        assert {(e.prompt_tokens, e.tokens) for e in examples} <= sampled


def test_an_odd_tokenisation_is_kept_as_it_was_sampled(monkeypatch, seen):
    # A: is one token to the tokenizer; a policy may spell it with two
    policy = toy_policy()
    (example,) = examples_of(policy, TOY_PROBLEMS[0], ["A:\n#### 2"])
    spelled = []
    for token in example.tokens:
        text = policy.decode([token])
        ids = policy.tokenizer.convert_tokens_to_ids
        spelled += [ids("A"), ids(":")] if text == "A:" else [token]
    assert len(spelled) == len(example.tokens) + 1
    text = policy.decode(spelled)
    odd = Rollout(TOY_PROBLEMS[0].id, 0, example.prompt_tokens, tuple(spelled),
                  (0.0,) * len(spelled), text, True)  # fmt: skip
    monkeypatch.setattr(module, "sample", lambda *_, **__: [odd])
    run(k=1, rounds=1, problems=TOY_PROBLEMS[:1])
    assert [e.tokens for e in seen["trained"][0]] == [tuple(spelled)]


def test_the_reference_solutions_are_the_first_data(seen):
    run(rounds=1, solved=TOY_PROBLEMS[1:3])
    policy = toy_policy()
    expected = [
        example
        for problem in TOY_PROBLEMS[1:3]
        for example in examples_of(policy, problem, [problem.solution])
    ]
    assert seen["trained"][0][:2] == expected
    # A rollout with the operations of the reference is a repeat of it
    counts = Counter(
        (e.prompt_tokens, operation_key(policy.decode(e.tokens)))
        for e in seen["trained"][0]
    )
    assert max(counts.values()) == 1


def test_every_round_distils_from_the_base_or_goes_on_with_the_last_policy(seen):
    base = tiny_policy(seed=1)
    untouched, start = weights(base), weights(toy_policy())
    reset = run(base=base)
    assert all(same_bits(student, untouched) for student in seen["students"])
    seen["students"].clear()
    after_each = []
    went_on = run(
        base=base,
        start_from="current",
        on_round=lambda _, policy: after_each.append(weights(policy)) or {},
    )
    assert same_bits(seen["students"][0], start)
    assert same_bits(seen["students"][1], after_each[0])
    assert not same_bits(weights(reset), weights(went_on))
    # What was handed in is not changed
    assert same_bits(weights(base), untouched)
    assert same_bits(weights(toy_policy()), start)


def test_shots_stand_in_the_prompt_of_round_1_and_training_never_sees_them(seen):
    shots = TOY_PROBLEMS[4:]
    problems = TOY_PROBLEMS[:4]
    run(problems=problems, solved=problems[:1], shots=shots, first_round_shots=1)
    assert [list(o["shots"]) for o in seen["asked"]] == [shots[:1], []]
    first, second = ({r.prompt_tokens for r in s} for s in seen["sampled"])
    zero_shot = {
        example.prompt_tokens
        for problem in TOY_PROBLEMS[:4]
        for example in examples_of(toy_policy(), problem, ["#### 2"])
    }
    assert second == zero_shot
    assert not first & zero_shot
    for examples in seen["trained"]:
        assert {e.prompt_tokens for e in examples} <= zero_shot


def test_the_first_round_may_have_a_number_of_samples_of_its_own(seen):
    recorder = Memory()
    run(recorder, first_round_k=2)
    whole = [len(TOY_PROBLEMS) * k for k in (2, 4)]
    assert [len(rollouts) for rollouts in seen["sampled"]] == whole
    counted = [row["rollouts"] for row in rounds(recorder)]
    assert counted == [whole[0], sum(whole)]
    assert counted != [whole[0], 2 * whole[1]]  # wrong: all rounds as large as the last


def test_what_on_round_returns_is_logged():
    recorder = Memory()
    run(recorder, on_round=lambda number, policy: {"validation": number / 10})
    assert [row["validation"] for row in rounds(recorder)] == [0.1, 0.2]


@pytest.mark.parametrize("save_every", [1, 3])
def test_a_run_that_stops_anywhere_and_goes_on_equals_an_undisturbed_one(save_every):
    short = {"k": 2, "finetune": QUICK.finetune.model_copy(update={"epochs": 2})}
    undisturbed = Memory(save_every=save_every)
    expected = weights(run(undisturbed, **short))
    for die_at in range(0, len(undisturbed.rows), 2):
        recorder = Memory(save_every=save_every, die_at=die_at)
        with pytest.raises(InterruptedRunError):
            run(recorder, **short)
        assert same_bits(weights(run(recorder, **short)), expected), die_at
        assert recorder.rows == undisturbed.rows, die_at


# ORM-EI


def briefly(rollouts) -> list[float]:
    """A scorer that likes solutions without a word before them."""
    return [0.2 if "So" in r.text else 0.8 for r in rollouts]


@settings(max_examples=100, deadline=None)
@given(rollouts=any_rollouts, threshold=st.sampled_from((0.0, 0.2, 0.5, 1.0)))
def test_an_orm_filters_the_right_ones_and_cannot_let_a_wrong_one_pass(
    rollouts, threshold
):
    rewards = sparse_rewards(rollouts, TOY_PROBLEMS)
    asked = []

    def scorer(candidates):
        asked.extend(candidates)
        return briefly(candidates)

    passed = orm_filter(rollouts, rewards, scorer, threshold)
    expected = [
        paid if not r.finished or briefly([r])[0] >= threshold else 0.0
        for r, paid in zip(rollouts, rewards, strict=True)
    ]
    assert passed == expected
    # Only what could be kept is scored
    assert asked == [
        r for r, p in zip(rollouts, rewards, strict=True) if p and r.finished
    ]
    kept = grow([], rollouts, passed, TOY_PROBLEMS, QUICK)
    right = {(TOY_PROBLEMS.index(problem), r.tokens)
             for r in rollouts for problem in TOY_PROBLEMS
             if problem.id == r.problem_id and "So" not in r.text}  # fmt: skip
    if threshold == 0.5:
        assert {(s.problem, s.tokens) for s in kept} <= right
    if threshold == 0.0:
        assert passed == rewards


def test_an_orm_in_place_of_the_answer_would_keep_wrong_solutions():
    rollouts = [rollout(0, toy_solutions(3)[0]), rollout(0, toy_solutions(2)[0], at=1)]
    rewards = sparse_rewards(rollouts, TOY_PROBLEMS)
    assert rewards == [0.0, 1.0]
    liked = [float(score >= 0.5) for score in briefly(rollouts)]  # the wrong version
    assert len(grow([], rollouts, liked, TOY_PROBLEMS, QUICK)) == 2
    passed = orm_filter(rollouts, rewards, briefly, 0.5)
    (kept,) = grow([], rollouts, passed, TOY_PROBLEMS, QUICK)
    assert kept.tokens == rollouts[1].tokens


def test_orm_ei_learns_from_what_the_orm_likes_and_says_how_much_that_is(seen):
    recorder = Memory()
    run(recorder, orm=briefly, orm_threshold=0.5, k=8)
    policy = toy_policy()
    for examples in seen["trained"]:
        assert examples
        assert not any("So" in policy.decode(e.tokens) for e in examples)
    for row, rollouts in zip(rounds(recorder), seen["sampled"], strict=True):
        rewards = sparse_rewards(rollouts, TOY_PROBLEMS)
        right = [r for r, p in zip(rollouts, rewards, strict=True)
                 if p and r.finished]  # fmt: skip
        liked = [r for r in right if "So" not in r.text]
        assert row["orm_kept"] == len(liked) / len(right)
        assert row["accuracy"] == sum(rewards) / len(rewards)  # of all, as ever
    assert 0 < rounds(recorder)[0]["orm_kept"] < 1
    plain = Memory()
    run(plain)
    assert not any("orm_kept" in row for row in plain.rows)


def test_a_reward_model_can_be_the_scorer():
    model = OutcomeRewardModel(toy_policy())  # untrained: one half for all
    recorder = Memory()
    scorer = partial(score_responses, model)
    for threshold, kept in ((0.5, 1.0), (0.51, 0.0)):
        run(recorder, orm=scorer, orm_threshold=threshold, rounds=1,
            solved=TOY_PROBLEMS[:1])  # fmt: skip
        assert rounds(recorder)[-1]["orm_kept"] == kept
        recorder = Memory()


def test_p47_orm_ei_goes_on_after_a_kill_to_the_bit():
    given = {"orm": briefly, "orm_threshold": 0.5}
    undisturbed = Memory()
    expected = weights(run(undisturbed, **given))
    for die_at in (2, len(undisturbed.rows) - 1):
        recorder = Memory(die_at=die_at)
        with pytest.raises(InterruptedRunError):
            run(recorder, **given)
        assert same_bits(weights(run(recorder, **given)), expected)
        assert recorder.rows == undisturbed.rows


def test_p49_a_threshold_without_an_orm_or_an_orm_without_one_is_an_error():
    with pytest.raises(ValueError, match=r"orm_threshold=0\.5 and no orm"):
        run(orm_threshold=0.5)
    with pytest.raises(ValueError, match="orm_threshold=None and an orm"):
        run(orm=briefly)


# Exploring: who is asked how often, and what weighs how much


@settings(max_examples=100, deadline=None)
@given(
    rates=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=30),
    k=st.integers(1, 20),
)
def test_the_seldom_solved_are_asked_more_and_all_together_as_often(rates, k):
    counts = allocate(rates, k * len(rates))
    assert sum(counts) == k * len(rates)
    assert min(counts) >= 1
    pairs = sorted(zip(rates, counts, strict=True))
    assert all(n >= m - 1 for (_, n), (_, m) in pairwise(pairs))  # remainders: one
    assert allocate([0.3] * len(rates), k * len(rates)) == [k] * len(rates)
    spared = len(rates) * (k - 1)  # by definition, but for rounding
    for rate, count in zip(rates, counts, strict=True):
        assert abs(count - 1 - spared / rate / sum(1 / r for r in rates)) < 1 + 1e-6


def test_rare_solutions_weigh_more_and_all_together_as_much():
    rates = [0.1, 0.5, 0.5, 0.9]
    assert rarity_weights(rates, 0.0) == [1.0] * 4
    weights_ = rarity_weights(rates, 1.0)
    assert sum(weights_) == pytest.approx(4)
    assert weights_[0] / weights_[3] == pytest.approx(9)
    # Wrong: unscaled, which would be another learning rate as well
    assert sum(1 / rate for rate in rates) > 4 * 2


def test_the_second_round_asks_by_the_first_ones_solve_rates(seen):
    recorder = Memory()
    run(recorder, allocation="rare", rarity=1.0, k=8)
    first = seen["sampled"][0]
    second = [r for part in seen["sampled"][1:] for r in part]
    assert {r["rollouts"] for r in rounds(recorder)} == {48, 96}
    assert len(first) == len(second) == 48
    known = Tally((0,) * 6, (0,) * 6).after(
        TOY_PROBLEMS, first, sparse_rewards(first, TOY_PROBLEMS)
    )
    assert known.asked == (8,) * 6
    asked = Counter(r.problem_id for r in second)
    counts = [asked[problem.id] for problem in TOY_PROBLEMS]
    assert counts == allocate(known.rates(), 48)
    assert len(set(counts)) > 1
    # One question's samples are those it would have had alone
    alone = sample(
        seen["policies"][1], TOY_PROBLEMS[:1], k=counts[0],
        temperature=QUICK.temperature, max_new_tokens=QUICK.max_new_tokens, seed=1,
    )  # fmt: skip
    mine = [r.tokens for r in second if r.problem_id == TOY_PROBLEMS[0].id]
    assert [r.tokens for r in alone] == mine
    # Both rounds' rates weigh what the second learns from
    both = known.after(TOY_PROBLEMS, second, sparse_rewards(second, TOY_PROBLEMS))
    places = {prompt: i for i, prompt in enumerate(prompts_of(TOY_PROBLEMS))}
    learned = seen["trained"][1]
    rates = [both.rates()[places[example.prompt_tokens]] for example in learned]
    assert [e.weight for e in learned] == rarity_weights(rates, 1.0)
    assert {e.weight for e in learned} != {1.0}


def test_p47_exploring_goes_on_after_a_kill_to_the_bit():
    given = {"allocation": "rare", "rarity": 1.0}
    undisturbed = Memory()
    expected = weights(run(undisturbed, **given))
    for die_at in range(1, len(undisturbed.rows), 3):
        recorder = Memory(die_at=die_at)
        with pytest.raises(InterruptedRunError):
            run(recorder, **given)
        assert same_bits(weights(run(recorder, **given)), expected), die_at
        assert recorder.rows == undisturbed.rows


# Settings and faults

CHANGED = {
    "k": 5,
    "temperature": 0.5,
    "rounds": 1,
    "start_from": "current",
    "deduplicate": "none",
    "max_per_question": 1,
    "orm_threshold": 0.5,
    "reference_solutions": False,
    "first_round_shots": 1,
    "first_round_k": 3,
    "allocation": "rare",
    "rarity": 1.0,
    "max_new_tokens": 19,
    "seed": 1,
    "finetune": QUICK.finetune.model_copy(update={"lr": 1e-3}),
}


def test_every_setting_changes_the_result():
    assert set(CHANGED) == set(ExpertIterationSettings.model_fields)
    problems = TOY_PROBLEMS[:5]
    given = {"problems": problems, "solved": problems[:2], "shots": TOY_PROBLEMS[5:]}

    def trained(**changes):
        return weights(run(base=tiny_policy(seed=1), **given, **{"k": 12} | changes))

    default = trained()
    for name, value in CHANGED.items():
        orm = briefly if name == "orm_threshold" else None
        if name == "allocation":  # of round 2, which must find something to tell by
            able = {"start_from": "current", "deduplicate": "none"}
            assert not same_bits(trained(allocation=value, **able), trained(**able))
            continue
        assert not same_bits(trained(**{name: value}, orm=orm), default), name
    assert same_bits(trained(), default)


def test_unknown_and_impossible_settings_are_refused():
    for wrong in ({"K": 4}, {"k": 0}, {"temperature": 0.0}, {"deduplicate": "words"}):
        with pytest.raises(ValidationError):
            ExpertIterationSettings(**wrong)


def test_the_defaults_are_the_papers():
    defaults = ExpertIterationSettings()
    assert (defaults.k, defaults.temperature, defaults.rounds) == (96, 1.0, 2)
    assert (defaults.start_from, defaults.deduplicate) == ("base", "operations")
    assert (defaults.finetune.epochs, defaults.finetune.batch_size) == (4, 128)


def test_no_right_solution_is_a_clear_error():
    with pytest.raises(ValueError, match="round 1 found no right solution among 24"):
        run(start=tiny_policy(seed=1))


def test_right_solutions_that_a_reward_model_throws_out_are_counted_in_the_error():
    with pytest.raises(
        ValueError,
        match=r"\d right solutions, of which none reaches .*=0.9.*; lower it",
    ):
        run(orm=lambda rollouts: [0.1] * len(rollouts), orm_threshold=0.9)


def test_no_right_solution_is_no_error_where_there_are_reference_solutions():
    recorder = Memory()
    run(recorder, start=tiny_policy(seed=1), rounds=1, solved=TOY_PROBLEMS[:2])
    assert rounds(recorder)[0]["new_solutions"] == 0
    assert rounds(recorder)[0]["solutions"] == 2


def test_missing_shots_and_foreign_solutions_are_clear_errors():
    with pytest.raises(ValueError, match="first_round_shots=1, but there are 0 shots"):
        run(first_round_shots=1)
    with pytest.raises(ValueError, match=r"1 solved problem.*'toy/f'"):
        run(problems=TOY_PROBLEMS[:5], solved=TOY_PROBLEMS[5:])


# Learning: of two answers, every question of these has the first

BANDIT = TOY_PROBLEMS[::2]
THOROUGH = {
    "problems": BANDIT,
    "k": 16,
    "finetune": FinetuneSettings(epochs=40, batch_size=18, lr=1e-2, lr_floor=1e-3),
}


def accuracy(policy: Policy) -> float:
    """Share of right solutions at temperature 1."""
    rollouts = sample(policy, BANDIT, k=64, max_new_tokens=24, seed=99)
    return sum(sparse_rewards(rollouts, BANDIT)) / len(rollouts)


def gained(seed: int) -> float:
    return accuracy(run(**THOROUGH, seed=seed)) - accuracy(toy_policy())


@effect(above=0.2)
def expert_iteration_raises_the_accuracy(seed: int) -> float:
    return gained(seed)


@effect(above=0.2)
def expert_iteration_on_the_wrong_ones_lowers_it(seed: int) -> float:
    whole = module.sparse_rewards
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "sparse_rewards", lambda *given: [1 - r for r in whole(*given)]
        )
        return -gained(seed)


@effect(above=0.4)
def keeping_truncated_solutions_teaches_not_to_stop(seed: int) -> float:
    """The share that ends, less that where what was cut is kept as well."""

    def finished(**changes) -> float:
        base = tiny_policy(seed=1)  # knows nothing, EOS neither
        policy = run(base=base, seed=seed, rounds=1, **THOROUGH, **changes)
        rollouts = sample(policy, TOY_PROBLEMS, k=8, max_new_tokens=40, seed=99)
        return sum(r.finished for r in rollouts) / len(rollouts)

    def blind(whole, rollouts, rewards):
        return whole([replace(one, finished=True) for one in rollouts], rewards)

    ended = finished()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_candidates", partial(blind, module._candidates))
        # A limit of 17 leaves place for "<<1+1=2>>\n#### 2", and none for EOS
        return ended - finished(max_new_tokens=17)


@pytest.mark.learning
@pytest.mark.parametrize(
    "found",
    [
        expert_iteration_raises_the_accuracy,
        expert_iteration_on_the_wrong_ones_lowers_it,
        keeping_truncated_solutions_teaches_not_to_stop,
    ],
    ids=lambda found: found.name,
)
def test_it_learns_what_it_keeps(found):
    found.check()

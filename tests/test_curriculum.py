"""Curricula: who is asked, from where, how often, and what is kept of the answers."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_policy

from rlreason.algorithms.curriculum import (
    BacktrackingSettings,
    CurriculumSettings,
    QuestionSampler,
    ReplaySettings,
    UniformSettings,
    best_k_of_n,
    epoch_order,
    given_fraction,
    learning_scores,
    replay_distribution,
    solution_prefixes,
)
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Prompt
from rlreason.policy.sampler import sample_prompts
from rlreason.rewards import dense_reward
from rlreason.settings import Settings, SettingsError, load_settings
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import NEXT_QUESTION, format_prompt, format_response

SOLUTION = "<<3*4=12>>12 \n\n<<12/2=6>>6\nso <<6+1=7>>7\n#### 7"
PROBLEMS = [Problem(f"q{i}", f"{i}?", SOLUTION, "7") for i in range(7)]
KINDS = (UniformSettings(), BacktrackingSettings(), ReplaySettings())


@lru_cache(maxsize=1)
def policy() -> Policy:
    return tiny_policy()


def sampler(kind: Settings, problems=PROBLEMS, *, seed: int = 0, shots=()):
    return QuestionSampler(policy(), problems, kind, seed=seed, shots=shots)


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.problem_id for prompt in prompts]


# What holds for every kind


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_p47_a_sampler_that_is_restored_goes_on_as_if_it_had_not_stopped(kind):
    def phase(one: QuestionSampler, number: int) -> list[Prompt]:
        prompts = one.next(3, progress=number / 20)
        one.update(ids(prompts), [len(p.tokens) / 3 + number % 4 for p in prompts])
        return prompts

    whole = sampler(kind)
    undisturbed = [phase(whole, i) for i in range(20)]
    one = sampler(kind)
    resumed = []
    for i in range(20):
        resumed.append(phase(one, i))
        saved = json.dumps(one.state())
        one = sampler(kind)
        one.restore(json.loads(saved))
        assert json.dumps(one.state()) == saved
    assert resumed == undisturbed
    forgetful = [phase(sampler(kind), i) for i in range(20)]
    assert forgetful != undisturbed
    assert [phase(sampler(kind, seed=1), i) for i in range(20)] != forgetful


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_p08_equal_prompts_have_different_samples_since_their_streams_differ(kind):
    prompts = sampler(kind, PROBLEMS[:1]).next(4, progress=1.0)
    assert len({p.tokens for p in prompts}) == 1
    draw = [r.tokens for r in sample_prompts(policy(), prompts, max_new_tokens=8)]
    assert len(set(draw)) == 4
    same = [Prompt(p.problem_id, p.tokens) for p in prompts]  # no stream of their own
    draw = [r.tokens for r in sample_prompts(policy(), same, max_new_tokens=8)]
    assert len(set(draw)) == 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.kind)
def test_a_prompt_is_the_question_as_it_is_asked_everywhere(kind):
    shots = (Problem("s", "1+1?", "<<1+1=2>>2\n#### 2", "2"),)
    for prompt in sampler(kind, shots=shots).next(14, progress=1.0):
        problem = PROBLEMS[int(prompt.problem_id[1:])]
        asked = policy().encode_prompt(format_prompt(problem, shots))
        assert prompt.tokens == tuple(asked)
        assert prompt.stop == NEXT_QUESTION  # as the example goes on
    assert {prompt.stop for prompt in sampler(kind).next(3, progress=1.0)} == {""}


def test_a_field_of_another_kind_is_an_error_and_each_kind_has_its_own():
    class Learner(Settings):
        curriculum: CurriculumSettings = UniformSettings()

    assert load_settings(Learner, {}).curriculum == UniformSettings()
    chosen = {"kind": "backtracking", "share": 0.25}
    loaded = load_settings(Learner, {"curriculum": chosen}).curriculum
    assert loaded == BacktrackingSettings(share=0.25)
    for wrong in (
        {"kind": "uniform", "share": 0.25},
        {"kind": "replay", "until": 0.5},
        {"kind": "backtracking", "staleness": 0.1},
        {"kind": "other"},
    ):
        with pytest.raises(SettingsError, match="curriculum"):
            load_settings(Learner, {"curriculum": wrong})


def test_wrong_questions_are_refused():
    with pytest.raises(ValueError, match="0 problems"):
        sampler(UniformSettings(), [])
    with pytest.raises(ValueError, match="8 problems with 7"):
        sampler(UniformSettings(), [*PROBLEMS, PROBLEMS[0]])


# Uniform


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 99))
def test_every_question_comes_once_before_any_comes_twice(sizes, seed):
    one = sampler(UniformSettings(), seed=seed)
    got = [name for n in sizes for name in ids(one.next(n, progress=0.0))]
    for start in range(0, len(got), len(PROBLEMS)):
        epoch = got[start : start + len(PROBLEMS)]
        assert len(set(epoch)) == len(epoch)
    # Position and seed decide, and not the sizes of the calls
    assert got == ids(sampler(UniformSettings(), seed=seed).next(len(got), progress=0))


def test_every_epoch_has_an_order_of_its_own():
    orders = {epoch_order(7, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


# Backtracking


def test_prefixes_are_the_reference_up_to_a_line_and_never_its_answer():
    prompt = format_prompt(PROBLEMS[0])
    prefixes = solution_prefixes(policy(), prompt, PROBLEMS[0])
    texts = [policy().decode(prefix) for prefix in prefixes]
    lines = SOLUTION.splitlines(keepends=True)
    assert (
        texts
        == [
            "",
            " " + lines[0],
            " " + "".join(lines[:3]),  # the blank line goes with the step after it
            " " + "".join(lines[:4]),
        ]
    )
    whole = policy().encode_response(prompt, format_response(SOLUTION))
    assert all(tuple(whole[: len(prefix)]) == prefix for prefix in prefixes)


@pytest.mark.parametrize(
    ("solution", "count"),
    [("#### 7", 1), ("7", 1), ("a\n#### 7\nb\n", 2), ("a\nb", 2), ("a\nb\n", 2)],
)
def test_a_prefix_leaves_a_line_to_write_and_stops_before_the_answer(solution, count):
    problem = Problem("p", "?", solution, "7")
    prefixes = solution_prefixes(policy(), format_prompt(problem), problem)
    assert len(prefixes) == count
    texts = [policy().decode(prefix) for prefix in prefixes]
    whole = format_response(solution)
    assert all(len(text) < len(whole) and "####" not in text for text in texts)
    # Cutting at the end of every line gives the answer, or all there is, away
    lines = whole.splitlines(keepends=True)
    cuts = ["".join(lines[: i + 1]) for i in range(len(lines))]
    assert any("####" in cut or len(cut) == len(whole) for cut in cuts)


@settings(max_examples=20)
@given(st.integers(0, 999), st.floats(0, 1))
def test_every_state_is_the_question_and_a_prefix_of_its_reference(seed, progress):
    kind = BacktrackingSettings(share=1.0)
    for prompt in sampler(kind, seed=seed).next(7, progress=progress):
        problem = PROBLEMS[int(prompt.problem_id[1:])]
        text = format_prompt(problem)
        start = tuple(policy().encode_prompt(text))
        assert prompt.tokens[: len(start)] == start
        rest = prompt.tokens[len(start) :]
        assert rest in solution_prefixes(policy(), text, problem)


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_the_share_and_the_mean_number_of_given_steps_follow_the_schedule(progress):
    kind = BacktrackingSettings(share=0.75, start=0.8, until=0.6)
    fraction = 0.8 * max(0.0, 1 - progress / 0.6)
    assert given_fraction(kind, progress) == pytest.approx(fraction)
    steps = []
    asked = len(policy().encode_prompt(format_prompt(PROBLEMS[0])))
    lengths = [len(p) for p in solution_prefixes(policy(), "", PROBLEMS[0])]
    for prompt in sampler(kind).next(1000, progress=progress):
        steps.append(lengths.index(len(prompt.tokens) - asked))
    mean = sum(steps) / len(steps)
    assert mean == pytest.approx(0.75 * fraction * 3, abs=0.12)
    if progress >= 0.6:
        assert not any(steps)
    if progress == 0.0:  # 2.4 of 3 steps: two or three of them, or none at all
        assert set(steps) == {0, 2, 3}
        assert steps.count(0) / 1000 == pytest.approx(0.25, abs=0.05)


def test_what_was_given_is_not_paid_again():
    kind = BacktrackingSettings(share=1.0)
    prompts = sampler(kind).next(3, progress=0.0)
    rollouts = sample_prompts(policy(), prompts, max_new_tokens=4)
    again = [
        type(r)(
            **{
                **{name: getattr(r, name) for name in r.__slots__},
                "tokens": tuple(policy().encode_response("", SOLUTION)),
                "text": SOLUTION,
            }
        )
        for r in rollouts
    ]
    rows = dense_reward(policy())(again, PROBLEMS)
    assert [sum(row) for row in rows] == [1.0, 1.0, 1.0]


# Prioritized level replay


def obvious_distribution(scores, last_drawn, now, beta, rho):
    """The formulas of the paper, one question at a time."""
    n = len(scores)
    chances = []
    for i in range(n):
        rank = [
            1 + sum(
                scores[j] > scores[m]
                or (scores[j] == scores[m] and last_drawn[j] < last_drawn[m])
                for j in range(n)
            )
            for m in range(n)
        ]  # fmt: skip
        priority = (1 / rank[i]) ** (1 / beta)
        p_score = priority / sum((1 / r) ** (1 / beta) for r in rank)
        p_stale = (now - last_drawn[i]) / sum(now - c for c in last_drawn)
        chances.append((1 - rho) * p_score + rho * p_stale)
    return chances


def test_replay_chances_by_hand():
    chances = replay_distribution(
        [1.0, 3.0, 2.0], [0, 1, 2], 4, temperature=1.0, staleness=0.5
    )
    expected = [2 / 11 / 2 + 4 / 18, 6 / 11 / 2 + 3 / 18, 3 / 11 / 2 + 2 / 18]
    assert chances == pytest.approx(expected)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
    st.floats(0.05, 5),
    st.floats(0, 1),
)
def test_replay_chances_are_those_of_the_paper(scores, random, beta, rho):
    last_drawn = random.sample(range(20), len(scores))  # a draw is of one question
    chances = replay_distribution(
        scores, last_drawn, 20, temperature=beta, staleness=rho
    )
    obvious = obvious_distribution(scores, last_drawn, 20, beta, rho)
    assert chances == pytest.approx(obvious, rel=1e-9, abs=1e-12)
    assert sum(chances) == pytest.approx(1)
    # Ranks alone count: any growing function of the scores gives the same
    cubes = [score**3 for score in scores]
    assert chances == replay_distribution(
        cubes, last_drawn, 20, temperature=beta, staleness=rho
    )


def test_draws_have_the_frequencies_that_the_formulas_say():
    kind = ReplaySettings(temperature=1.0, staleness=0.3)
    state = {
        "drawn": 12,
        "scores": {p.id: float(i * 3 % 7) for i, p in enumerate(PROBLEMS)},
        "last_drawn": {p.id: 2 * i - i % 2 for i, p in enumerate(PROBLEMS)},
    }
    counts: Counter[str] = Counter()
    for seed in range(2000):
        one = sampler(kind, seed=seed)
        one.restore(state)
        counts[one.next(1, progress=0.0)[0].problem_id] += 1
    chances = obvious_distribution(
        [state["scores"][p.id] for p in PROBLEMS],
        [state["last_drawn"][p.id] for p in PROBLEMS],
        12,
        1.0,
        0.3,
    )
    chi2 = sum(
        (counts[p.id] - 2000 * c) ** 2 / (2000 * c)
        for p, c in zip(PROBLEMS, chances, strict=True)
    )
    assert chi2 < 22.5  # the 0.999 quantile with 6 degrees of freedom
    uniform = sum((counts[p.id] - 2000 / 7) ** 2 / (2000 / 7) for p in PROBLEMS)
    assert uniform > 22.5  # a sampler that forgets its scores would not pass


def test_new_questions_are_all_visited_and_the_surprising_ones_more_often():
    many = [Problem(f"q{i}", f"{i}?", "7", "7") for i in range(40)]
    one = sampler(ReplaySettings(replay_probability=0.9), many)
    visits: Counter[str] = Counter()
    for _ in range(300):
        names = ids(one.next(4, progress=0.0))
        assert len(set(names)) == 4  # no question twice in a batch
        one.update(names, [float(name in ("q3", "q5")) for name in names])
        visits.update(names)
    assert len(visits) == 40
    assert min(visits["q3"], visits["q5"]) > 3 * 1200 / 40
    # Staleness brings every one of them back
    assert min(visits.values()) > 1


def test_no_known_question_is_replayed_before_there_is_one_and_new_ones_run_out():
    one = sampler(ReplaySettings(replay_probability=0.0))
    first = ids(one.next(7, progress=0.0))
    assert sorted(first) == [p.id for p in PROBLEMS]
    one.update(first[:6], [1.0] * 6)  # what was asked and never scored is still new
    assert ids(one.next(1, progress=0.0)) == [first[6]]
    one.update(first[6:], [1.0])
    assert set(ids(one.next(9, progress=0.0))) == set(first)  # more than there are


def test_a_questions_score_is_the_mean_of_its_rollouts_at_the_last_visit():
    one = sampler(ReplaySettings())
    one.update(["q1", "q0", "q1"], [1.0, 5.0, 2.0])
    one.update(["q0"], [0.25])
    assert one.scores == {"q1": 1.5, "q0": 0.25}
    plain = sampler(UniformSettings())
    plain.update(["q1"], [1.0])
    assert plain.scores == {}


def test_p21_a_score_is_the_mean_size_of_the_advantages_whatever_the_padding():
    advantages = torch.tensor([[1.0, -3.0, 9.0], [0.5, 0.5, -2.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert learning_scores(advantages, mask).tolist() == [2.0, 1.0]
    padded = torch.cat([advantages, torch.full((2, 100), float("nan"))], dim=1)
    wide = torch.cat([mask, torch.zeros(2, 100, dtype=mask.dtype)], dim=1)
    assert learning_scores(padded, wide).tolist() == [2.0, 1.0]
    assert advantages.abs().mean(dim=1)[0] != 2.0  # without the mask


# Best K of N


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=20),
    st.integers(1, 3),
)
def test_p29_the_best_k_of_each_group_stay_in_order_wherever_the_rows_stand(rows, k):
    groups, scores = [g for g, _ in rows], [float(s) for _, s in rows]
    sizes = Counter(groups)
    if rows and min(sizes.values()) < k:
        with pytest.raises(ValueError, match="cannot keep"):
            best_k_of_n(scores, groups, k)
        return
    kept = best_k_of_n(scores, groups, k)
    assert kept == sorted(set(kept))
    for group in sizes:
        mine = [i for i in range(len(rows)) if groups[i] == group]
        beaten_by = {
            i: sum((-scores[j], j) < (-scores[i], i) for j in mine) for i in mine
        }
        assert [i for i in kept if i in mine] == [i for i in mine if beaten_by[i] < k]


def test_k_equal_to_n_keeps_all():
    groups = ["a", "b", "a", "b"]
    assert best_k_of_n([1.0, 0.0, 0.0, 0.0], groups, 2) == [0, 1, 2, 3]
    assert best_k_of_n([], [], 2) == []


def test_a_selection_is_biased_upwards_unless_it_keeps_all():
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(4000, generator=generator) < 0.5).double().tolist()
    groups = [i // 4 for i in range(4000)]

    def mean_of_kept(k: int) -> float:
        kept = best_k_of_n(rewards, groups, k)
        return sum(rewards[i] for i in kept) / len(kept)

    assert mean_of_kept(4) == sum(rewards) / len(rewards)
    assert mean_of_kept(1) == pytest.approx(1 - 0.5**4, abs=0.03)


def test_none_of_n_is_no_selection():
    with pytest.raises(ValueError, match="at least 1"):
        best_k_of_n([1.0], [0], 0)

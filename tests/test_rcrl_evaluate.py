"""Judging a return-conditioned policy: the label reaches every step of every sample."""

from __future__ import annotations

from functools import lru_cache

import pytest
from toys import TOY_PROBLEMS, toy_policy

from rlreason.algorithms.finetune import FinetuneSettings
from rlreason.algorithms.rcrl import (
    RcrlSettings,
    rcrl,
)
from rlreason.evaluation.evaluate import evaluate, grade_greedy, grade_samples
from rlreason.policy import labels as module
from rlreason.policy.labels import BAD, GOOD, answer_groups, sample_conditioned
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.policy.vocabulary import token_id
from rlreason.rewards.orm import OutcomeRewardModel

pytestmark = pytest.mark.filterwarnings("ignore:.*of the solutions were cut")

# Of two answers, every question of these has the first
BANDIT = TOY_PROBLEMS[::2]


@lru_cache(maxsize=1)
def conditioned() -> Policy:
    """A policy for which good steps are right and bad ones are wrong."""
    learn = FinetuneSettings(epochs=40, batch_size=12, lr=1e-2, lr_floor=1e-3)
    settings = RcrlSettings(samples=8, k=4, max_new_tokens=24, finetune=learn)
    return rcrl(toy_policy(), toy_policy(), BANDIT, settings)


def report_of(label: str | None, **options):
    return evaluate(conditioned(), BANDIT, max_new_tokens=24, label=label, **options)


def test_p52_good_is_right_more_often_than_bad():
    good, bad = (report_of(label, k=16, temperature=1.0) for label in (GOOD, BAD))
    assert (good.maj_1.mean, bad.maj_1.mean) == (1.0, 0.0)
    assert good.accuracy.mean > 0.9 > 0.1 > bad.accuracy.mean

    # Wrong: the label is taken and does not reach the sampler
    def deaf(*args, label, **options):
        return answer_groups(*args, label=GOOD, **options)

    assert report_of(BAD, k=0, sampler=deaf).maj_1.mean == good.maj_1.mean


@pytest.mark.parametrize("label", [GOOD, BAD])
def test_a_report_is_of_conditioned_samples(label):
    report = report_of(label, k=3, temperature=0.9, seed=5)
    options = {"label": label, "max_new_tokens": 24, "seed": 5}
    greedy = sample_conditioned(conditioned(), BANDIT, temperature=0.0, **options)
    samples = sample_conditioned(conditioned(), BANDIT, k=3, temperature=0.9, **options)
    for i, problem in enumerate(BANDIT):
        alone = grade_greedy(problem, greedy[i])
        expected = grade_samples(alone, problem, samples[3 * i : 3 * i + 3])
        assert report.results[i] == expected


def test_many_problems_are_sampled_in_parts_and_keep_their_order(monkeypatch):
    calls = []

    def fake(policy, problems, *, label, k, temperature, **_):
        calls.append((len(problems), k, temperature, label))
        return [
            Rollout(p.id, j, (1,), (5, 0), (-0.1, -0.2), f"#### {p.answer}", True)
            for p in problems
            for j in range(k)
        ]

    monkeypatch.setattr(module, "sample_conditioned", fake)
    report = evaluate(toy_policy(), TOY_PROBLEMS, k=2000, label=GOOD)
    assert calls == [(6, 1, 0.0, GOOD)] + [(2, 2000, 0.7, GOOD)] * 3
    assert [result.id for result in report.results] == [p.id for p in TOY_PROBLEMS]
    assert report.accuracy.mean == 1.0  # each answer stands with its own problem


def test_a_label_with_shots_or_without_its_token_is_a_clear_error():
    with pytest.raises(ValueError, match="worked examples have no labels"):
        evaluate(conditioned(), BANDIT, k=0, label=GOOD, shots=TOY_PROBLEMS[1:2])
    with pytest.raises(ValueError, match=r"no token '\[GOOD\]'.*add_tokens"):
        evaluate(toy_policy(), BANDIT, k=0, label=GOOD)
    with pytest.raises(ValueError, match=r"no token '\[BEST\]'"):
        report_of("[BEST]", k=0)


def test_a_reward_model_that_does_not_know_the_labels_says_so():
    unknown = token_id(conditioned(), GOOD)
    orm = OutcomeRewardModel(toy_policy())
    with pytest.raises(ValueError, match=f"token {unknown} is not among the 260"):
        report_of(GOOD, k=2, orm=orm)

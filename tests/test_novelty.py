"""The bonus for a new way to a right answer: who gets it, and that a run keeps it."""

from __future__ import annotations

import json
import math
from random import Random

import pytest
from test_ppo import quick
from toys import (
    TOY_PROBLEMS,
    InterruptedRunError,
    Memory,
    same_bits,
    toy_policy,
    toy_solutions,
    weights,
)

from rlreason.algorithms.ppo import Learner, ppo
from rlreason.policy.rollout import Rollout
from rlreason.rewards import NoveltyReward, sparse_token_rewards
from rlreason.rewards.base import RememberingReward

ADDED, WORDED, TAKEN = toy_solutions(2)  # two wordings of one way, and another way


def rollout(text: str, *, finished: bool = True, problem: int = 0) -> Rollout:
    tokens = (*text.encode(), *((2,) if finished else ()))
    logprobs = (0.0,) * len(tokens)
    return Rollout(TOY_PROBLEMS[problem].id, 0, (1,), tokens, logprobs, text, finished)


def paid(reward, *rollouts: Rollout) -> list[float]:
    """What each response earns, having seen that it all stands on the last token."""
    rows = reward(rollouts, TOY_PROBLEMS)
    assert [len(row) for row in rows] == [len(r.tokens) for r in rollouts]
    assert not any(any(row[:-1]) for row in rows)
    return [row[-1] for row in rows]


def test_a_way_is_worth_less_each_time_and_another_one_as_much_as_the_first():
    reward = NoveltyReward(bonus=0.5)
    found = [paid(reward, rollout(ADDED))[0] for _ in range(4)]
    assert found == pytest.approx([1 + 0.5 / math.sqrt(n) for n in (1, 2, 3, 4)])
    assert paid(reward, rollout(WORDED)) == pytest.approx([1 + 0.5 / math.sqrt(5)])
    assert paid(reward, rollout(TAKEN)) == [1.5]
    assert paid(reward, rollout(ADDED, problem=2)) == [1.5]  # another question


def test_new_mistakes_and_cut_responses_discover_nothing():
    reward = NoveltyReward(bonus=0.5)
    wrong, cut = rollout("<<1+2=3>>\n#### 3"), rollout(ADDED, finished=False)
    assert paid(reward, wrong, cut) == [0.0, 1.0]
    assert not reward.state()


def test_what_a_batch_pays_does_not_depend_on_its_order():
    texts = [ADDED, TAKEN, WORDED, ADDED, "#### 3"]
    order = Random(0).sample(range(5), 5)
    straight = paid(NoveltyReward(), *map(rollout, texts))
    shuffled = paid(NoveltyReward(), *(rollout(texts[i]) for i in order))
    assert shuffled == [straight[i] for i in order]
    assert straight[0] == straight[2] == straight[3]
    # Wrong: one after the other. The first of equal responses earns most
    reward = NoveltyReward()
    one_by_one = [paid(reward, rollout(text))[0] for text in texts]
    assert one_by_one[0] > one_by_one[2] > one_by_one[3]


def rewards_of(settings, reward, recorder):
    return weights(
        ppo(toy_policy(), TOY_PROBLEMS, settings, reward=reward, recorder=recorder)
    )


def test_p47_a_killed_run_remembers_what_it_has_seen():
    settings, undisturbed = quick(), Memory()
    expected = rewards_of(settings, NoveltyReward(), undisturbed)
    for die_at in range(settings.phases):
        recorder = Memory(die_at=die_at)
        with pytest.raises(InterruptedRunError):
            rewards_of(settings, NoveltyReward(), recorder)
        found = rewards_of(settings, NoveltyReward(), recorder)
        assert same_bits(found, expected), die_at
        assert recorder.rows == undisturbed.rows, die_at

    # Wrong: the counts begin anew where the run goes on
    class Forgetful(NoveltyReward):
        def restore(self, state):
            pass

    recorder = Memory(die_at=2)
    with pytest.raises(InterruptedRunError):
        rewards_of(settings, Forgetful(), recorder)
    rewards_of(settings, Forgetful(), recorder)
    assert recorder.rows != undisturbed.rows


def test_only_what_remembers_is_asked_what_it_remembers():
    assert isinstance(NoveltyReward(), RememberingReward)
    assert not isinstance(sparse_token_rewards, RememberingReward)
    recorder = Memory()
    Learner(toy_policy(), TOY_PROBLEMS, quick()).save(recorder, 1)
    assert "reward" not in json.loads(recorder.saved[1])

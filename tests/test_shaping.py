"""Shaping: the optimal policy stays, by enumeration of a small token MDP."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dense import BOUND, PROBLEM, STEPS, lines, policy, rollout

from rlreason.mdp import discounted_returns
from rlreason.rewards import dense_reward, shaped_reward, sparse_token_rewards
from rlreason.rewards.dense import share_stated
from rlreason.rewards.shaping import shaping_terms, state_potentials

EOS, HORIZON = 0, 3
GAMMAS = (Fraction(9, 10), Fraction(1))
SEEDS = range(20)

# A token MDP of three tokens. An episode is terminal at EOS, truncated at the horizon
EPISODES = [
    (*body, EOS) for n in range(HORIZON) for body in product((1, 2), repeat=n)
] + list(product((1, 2), repeat=HORIZON))
STATES = sorted({e[:t] for e in EPISODES for t in range(len(e) + 1)})


def table(seed: int, name: str) -> dict[tuple, Fraction]:
    """A number for each state of the MDP; few values, so that there are ties."""
    rng = Random(f"{seed} {name}")
    return {state: Fraction(rng.randint(-3, 3), 2) for state in STATES}


def optimal_actions(returns: dict[tuple, list]) -> dict[tuple, set]:
    """The best actions in each state; ``returns[episode][t]`` is the return from t."""
    best: dict[tuple, dict[int, Fraction]] = {}
    for episode, row in returns.items():
        for t, value in enumerate(row):
            actions = best.setdefault(episode[:t], {})
            actions[episode[t]] = max(value, actions.get(episode[t], value))
    return {
        state: {a for a, value in actions.items() if value == max(actions.values())}
        for state, actions in best.items()
    }


def all_returns(reward, gamma, *, phi=None, bonus=None, end=0, tail=None):
    """Returns of every episode.

    ``reward`` is paid for arriving in a state. ``phi`` shapes; ``end`` is the
    potential of ends (None: their own). ``tail`` is a learner's value of truncated
    ends, which it adds, discounted, to the last reward.
    """
    returns = {}
    for episode in EPISODES:
        states = [episode[: t + 1] for t in range(len(episode))]
        paid = [reward[s] for s in states]
        truncated = episode[-1] != EOS
        if phi is not None:
            potentials = [phi[s] for s in [(), *states]]
            keeps = end is None or (tail is not None and truncated)
            potentials[-1] = potentials[-1] if keeps else Fraction(end)
            terms = shaping_terms(potentials, gamma)
            paid = [r + f for r, f in zip(paid, terms, strict=True)]
        if bonus is not None:
            paid = [r + bonus(s) for r, s in zip(paid, states, strict=True)]
        if tail is not None and truncated:
            paid[-1] += gamma * tail(episode)
        returns[episode] = exact_returns(paid, gamma)
    return returns


def exact_returns(paid: list[Fraction], gamma: Fraction) -> list[Fraction]:
    return [
        sum((gamma**i * r for i, r in enumerate(paid[t:])), Fraction(0))
        for t in range(len(paid))
    ]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_shaping_keeps_every_optimal_action_and_moves_returns_by_the_potential(
    gamma, seed
):
    reward, phi = table(seed, "reward"), table(seed, "phi")
    plain = all_returns(reward, gamma)
    shaped = all_returns(reward, gamma, phi=phi)
    assert optimal_actions(shaped) == optimal_actions(plain)
    for episode, row in shaped.items():  # the sum telescopes, from every state on
        moved = [g - phi[episode[:t]] for t, g in enumerate(plain[episode])]
        assert row == moved


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_learner_that_continues_cut_episodes_keeps_their_potential(gamma, seed):
    reward, phi, value = (table(seed, name) for name in ("reward", "phi", "value"))
    # The value of a shaped state is the plain one less its potential
    plain = all_returns(reward, gamma, tail=lambda e: value[e])
    shaped = all_returns(reward, gamma, phi=phi, tail=lambda e: value[e] - phi[e])
    assert optimal_actions(shaped) == optimal_actions(plain)
    assert all(shaped[e][0] == plain[e][0] - phi[()] for e in EPISODES)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_potential_left_at_the_end_changes_what_is_optimal(gamma):
    reward = dict.fromkeys(STATES, Fraction(0)) | {(1, EOS): Fraction(1)}
    phi = {state: Fraction(state.count(2)) for state in STATES}
    plain = optimal_actions(all_returns(reward, gamma))
    assert plain[()] == {1}
    assert optimal_actions(all_returns(reward, gamma, phi=phi))[()] == {1}
    wrong = optimal_actions(all_returns(reward, gamma, phi=phi, end=None))
    assert wrong[()] == {2}  # it is paid for 2s and runs into the limit


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_bonus_that_is_no_potential_is_farmed(gamma):
    reward = dict.fromkeys(STATES, Fraction(0)) | {(1, EOS): Fraction(1)}
    farmed = all_returns(
        reward, gamma, bonus=lambda s: Fraction(1, 2) if s[-1] == 2 else Fraction(0)
    )
    assert optimal_actions(farmed)[()] == {2}
    assert max(farmed, key=lambda e: farmed[e][0]) == (2,) * HORIZON


# On rollouts


@given(lines, st.integers(0, 3), st.booleans(), st.sampled_from((0.9, 1.0)))
def test_on_rollouts_the_return_is_the_plain_one_less_the_first_potential(
    texts, given_steps, finished, gamma
):
    prefix = "".join(f"{line}\n" for line in STEPS[:given_steps])
    text = "\n".join([*texts, "#### 20"])
    batch = [rollout(text, prefix=prefix, finished=finished)]
    start = BOUND * share_stated(prefix, PROBLEM)
    kept = BOUND * share_stated(prefix + text, PROBLEM) * (not finished)
    (plain,) = sparse_token_rewards(batch, [PROBLEM])
    g = discounted_returns(list(plain), gamma)[0]
    for bootstrap in (False, True):
        reward = shaped_reward(policy(), gamma=gamma, scale=BOUND, bootstrap=bootstrap)
        (row,) = reward(batch, [PROBLEM])
        last = gamma ** len(row) * kept if bootstrap else 0.0
        # What goes on has not ended, so that nothing is paid for an end
        earned = 0.0 if bootstrap and not finished else g
        assert discounted_returns(list(row), gamma)[0] == pytest.approx(
            earned - start + last, abs=1e-9
        )


@settings(max_examples=20)
@given(lines)
def test_a_potential_depends_on_the_state_and_not_on_what_follows(texts):
    sample = rollout("\n".join([*texts, "#### 20"]))
    (row,) = state_potentials(policy(), [sample], [PROBLEM])
    texts = policy().decode_batch(
        [sample.tokens[:t] for t in range(len(sample.tokens) + 1)]
    )
    assert row == [share_stated(text, PROBLEM) for text in texts]


def test_a_match_is_paid_where_it_closes_and_taken_back_at_the_end():
    text = f"{STEPS[1]}\n#### 21"
    batch = [rollout(text)]
    (row,) = shaped_reward(policy(), gamma=1.0, scale=BOUND)(batch, [PROBLEM])
    closed = text.index(">>") + 1
    assert {t: r for t, r in enumerate(row) if r} == {
        closed: BOUND / 4,
        len(row) - 1: -BOUND / 4,
    }
    (kept,) = dense_reward(policy(), bound=BOUND)(batch, [PROBLEM])
    assert sum(row) == 0.0
    assert sum(kept) == BOUND / 4  # the dense heuristic leaves it


def test_p17_being_cut_is_worth_nothing_unless_the_learner_goes_on_from_there():
    stated = "\n".join(STEPS)
    ended, cut = rollout(stated), rollout(stated, finished=False)
    end, go_on = (
        shaped_reward(policy(), gamma=1.0, scale=BOUND, bootstrap=flag)
        for flag in (False, True)
    )
    totals = [sum(row) for row in end([ended, cut], [PROBLEM])]
    assert totals == pytest.approx([0.0, 0.0])
    totals = [sum(row) for row in go_on([ended, cut], [PROBLEM])]
    assert totals == pytest.approx([0.0, BOUND])


def test_shaping_is_added_to_whatever_reward_is_given():
    batch = [rollout(PROBLEM.solution)]
    over_dense = shaped_reward(policy(), gamma=1.0, reward=dense_reward(policy()))
    (row,) = over_dense(batch, [PROBLEM])
    assert sum(row) == pytest.approx(1 + BOUND)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_discount_out_of_range_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        shaped_reward(policy(), gamma=gamma)

r"""Potential-based shaping: guidance that leaves the optimal policy as it was.

Ng, Harada and Russell (1999): a bonus of the form

    F(s, s') = gamma * Phi(s') - Phi(s),        Phi(terminal) = 0,

added to any reward changes no ordering of policies. Along an episode the bonuses
telescope, so its discounted return becomes the original one minus Phi(s_0), whatever
was done in between. The potential here is what the dense heuristic gives,

    Phi(s) = scale * share of the reference's intermediate results stated in s,

prefix in the prompt included. What a matched step earns is taken back when the
episode ends: stating right steps is a help in learning and no end in itself. Compare
``rewards.dense``, which never takes anything back.

Time runs over tokens, as everywhere in training, and ``gamma`` must be the learner's;
below 1 every token costs (1 - gamma) Phi(s), the price of waiting.

**Where an episode ends.** After EOS the potential is 0. Where the length limit cut, it
depends on the learner. One that puts its value function there (``bootstrap=True``)
goes on from a state that still has its potential, which is kept. One that takes the
cut for an end must see 0 as after EOS; otherwise a policy earns by running into the
limit after its right steps.

Left out: learned potentials (a value function or an outcome model would do).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.rewards.base import RewardFunction, goes_on, made_of, problems_of
from rlreason.rewards.dense import given_texts, stated_shares, token_pieces
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.tasks.problem import Problem


def shaping_terms(potentials: Sequence[float], gamma: float) -> list[float]:
    """F of each of T actions from the potentials of the T + 1 states around them.

    The caller sets the last potential to 0 where the last state is an end.

    >>> shaping_terms([0.0, 0.5, 0.5, 0.0], 1.0)
    [0.5, 0.0, -0.5]
    """
    return [gamma * after - before for before, after in pairwise(potentials)]


def shaped_reward(
    policy: Policy,
    *,
    gamma: float,
    scale: float = 0.5,
    bootstrap: bool = False,
    reward: RewardFunction = sparse_token_rewards,
) -> RewardFunction:
    """``reward`` plus potential-based shaping by matched intermediate results.

    Args:
        policy: Whose tokenizer made the rollouts' tokens.
        gamma: The learner's discount, a token.
        scale: The potential of a state that states all results of the reference.
        bootstrap: Whether the learner continues truncated responses with its value.
            What ``reward`` pays where they were cut is then left out.
        reward: What is shaped.

    Raises:
        ValueError: ``gamma`` is not in [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma}: give the learner's discount, in [0, 1]")

    def shaped(
        rollouts: Sequence[Rollout], problems: Sequence[Problem]
    ) -> list[tuple[float, ...]]:
        given = reward(rollouts, problems)
        states = state_potentials(policy, rollouts, problems)
        rows = []
        for rollout, row, phi in zip(rollouts, given, states, strict=True):
            not_ended = bootstrap and not rollout.finished
            potentials = [scale * p for p in phi[:-1]]
            potentials.append(scale * phi[-1] if not_ended else 0.0)
            terms = shaping_terms(potentials, gamma)
            if not_ended and not goes_on(reward):  # what an end earns is not paid
                row = (*row[:-1], 0.0)
            rows.append(tuple(r + f for r, f in zip(row, terms, strict=True)))
        return rows

    made_of(reward, shaped)
    shaped.goes_on = bootstrap
    return shaped


def state_potentials(
    policy: Policy, rollouts: Sequence[Rollout], problems: Sequence[Problem]
) -> list[list[float]]:
    """The share of results stated in each state: T + 1 numbers for T tokens.

    A function of the state alone, whatever follows: a result counts from the token on
    that closes its annotation, so only tokens that hold ``>`` can change it. The last
    number is that of the text, and not yet 0 for its being an end.
    """
    asked = problems_of(rollouts, problems)
    pieces = token_pieces(policy, rollouts)
    given = given_texts(policy, rollouts)
    rows = []
    for rollout, problem, start in zip(rollouts, asked, given, strict=True):
        tokens = rollout.tokens
        ends = [t + 1 for t, token in enumerate(tokens) if ">" in pieces[token]]
        shares = stated_shares(policy, start, tokens, ends, problem)
        row, last = [], 0
        for end, share in zip([*ends, len(tokens) + 1], shares, strict=True):
            row += [share] * (end - last)
            last = end
        rows.append(row)
    return rows

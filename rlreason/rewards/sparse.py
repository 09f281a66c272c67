"""The sparse reward: 1 where the final answer is right, 0 elsewhere.

The default of Havrilla et al. (2024). The text alone decides, as in the paper: the
answer that it states is compared, as a number, with the reference answer. So a
truncated rollout that states the right answer before the length limit is rewarded,
although it never chose to stop; one that is cut inside the number counts by the digits
that it got out. Whoever must not learn from unfinished text (a fine-tuning set, say)
filters on ``Rollout.finished`` as well. Evaluation counts with this same function, so
what is rewarded in training is what is reported, and reports the truncated share too.

Left out: credit for single steps and penalties for length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rlreason.policy.rollout import Rollout
from rlreason.rewards.base import last_token_reward, problems_of
from rlreason.tasks.answers import is_correct
from rlreason.tasks.problem import Problem


def sparse_reward(rollout: Rollout, problem: Problem) -> float:
    """1.0 where the rollout's final answer is the problem's, else 0.0.

    The reward belongs to the last token (``mdp.token_rewards``).

    Raises:
        ValueError: The rollout answers another problem.
    """
    if rollout.problem_id != problem.id:
        raise ValueError(
            f"a rollout of problem {rollout.problem_id!r} cannot be rewarded by the "
            f"answer of problem {problem.id!r}"
        )
    return float(is_correct(rollout.text, problem.answer))


def sparse_rewards(
    rollouts: Sequence[Rollout], problems: Iterable[Problem]
) -> list[float]:
    """The sparse reward of each rollout, in the rollouts' order.

    ``problems`` may come in any order and hold more than were asked: each rollout is
    matched by ``problem_id``. A rollout of a problem that is not there is an error.
    """
    pairs = zip(rollouts, problems_of(rollouts, problems), strict=True)
    return [sparse_reward(rollout, problem) for rollout, problem in pairs]


def sparse_token_rewards(
    rollouts: Sequence[Rollout], problems: Sequence[Problem]
) -> list[tuple[float, ...]]:
    """The sparse reward as a ``RewardFunction``: on the last token, 0.0 before it."""
    rewards = sparse_rewards(rollouts, problems)
    pairs = zip(rollouts, rewards, strict=True)
    return [last_token_reward(rollout, reward) for rollout, reward in pairs]

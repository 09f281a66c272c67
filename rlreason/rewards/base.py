"""What every reward has in common: its signature, and how a rollout finds its problem.

A reward function rewards *tokens*: it returns one number for each token of each
response, 0.0 where nothing is earned, and nothing for prompts or padding. So sparse,
dense and learned rewards differ in where they stand and not in how they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from rlreason.policy.rollout import Rollout
from rlreason.tasks.problem import Problem


class RewardFunction(Protocol):
    """Rewards rollouts, token by token."""

    def __call__(
        self, rollouts: Sequence[Rollout], problems: Sequence[Problem]
    ) -> list[tuple[float, ...]]:
        """One tuple a rollout, in the rollouts' order, as long as its ``tokens``.

        ``problems`` may come in any order and hold more than were asked: each rollout
        is matched by ``problem_id``. A rollout of a problem that is not there is an
        error.
        """


@runtime_checkable
class RememberingReward(RewardFunction, Protocol):
    """A reward that depends on what it was shown before.

    What it remembers decides what follows, so a run keeps it in its checkpoints.
    """

    def state(self) -> dict[str, Any]:
        """All that it remembers, as JSON holds it."""

    def restore(self, state: dict[str, Any]) -> None:
        """Remember that, and nothing else."""


def goes_on(reward: RewardFunction) -> bool:
    """Whether a reward pays nothing for an end where the length limit cut a response.

    It says so by an attribute ``goes_on``. All else is paid as if the cut were an end.
    """
    return getattr(reward, "goes_on", False)


def made_of(other: Any, reward: RewardFunction) -> RewardFunction:
    """The reward, made of another one: it goes on and remembers as that one does."""
    reward.goes_on = goes_on(other)
    if isinstance(other, RememberingReward) and callable(other.state):
        reward.state, reward.restore = other.state, other.restore
    return reward


def problems_of(
    rollouts: Sequence[Rollout], problems: Iterable[Problem]
) -> list[Problem]:
    """The problem that each rollout answers, in the rollouts' order.

    Raises:
        ValueError: A rollout's problem is not among ``problems``.
    """
    by_id = {problem.id: problem for problem in problems}
    unknown = {rollout.problem_id for rollout in rollouts} - by_id.keys()
    if unknown:
        raise ValueError(
            f"{len(unknown)} problem(s) of the rollouts are not among the "
            f"{len(by_id)} given, the first being {min(unknown)!r}; give the problems "
            f"that were sampled"
        )
    return [by_id[rollout.problem_id] for rollout in rollouts]


def last_token_reward(rollout: Rollout, reward: float) -> tuple[float, ...]:
    """The whole reward on the last token: EOS, or where the length limit cut."""
    if not rollout.tokens:
        raise ValueError("a response without tokens has no place for its reward")
    return (0.0,) * (len(rollout.tokens) - 1) + (float(reward),)

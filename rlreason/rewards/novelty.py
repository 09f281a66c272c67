r"""A reward for right answers that were reached in a way not often seen: exploration.

Beyond the paper, which finds that RL hardly leaves the solutions that the start already
samples. A right response whose operations were seen N times for its question, its own
batch included, earns

    reward + bonus / sqrt(N)

the count-based bonus of Bellemare et al. (2016) with counts of operation sequences in
place of states. A *way* is what expert iteration de-duplicates by (``operation_key``).

- *Right ones only*, and ended by themselves: a new mistake is no discovery.
- *Equal responses of a batch earn the same*, whatever their order: all of them count
  before any is paid.
- *Counts belong to the run.* They decide what is paid next, so they are in its
  checkpoint, and each run needs a ``NoveltyReward`` of its own.

The bonus fades as a way is repeated and does not vanish: it changes what is optimal,
towards many ways to the answer. Left out: whether the new way is sound. Operations that
reach the right number by luck are new as well, and are paid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlreason.policy.rollout import Rollout
from rlreason.rewards.sparse import sparse_rewards, sparse_token_rewards
from rlreason.tasks.answers import operation_key
from rlreason.tasks.problem import Problem


class NoveltyReward:
    """The sparse reward plus the bonus on the last token of right responses.

    A ``RememberingReward``.

    Args:
        bonus: What the first right response of a kind earns on top.
    """

    def __init__(self, *, bonus: float = 0.5) -> None:
        self.bonus = bonus
        self.seen: dict[str, Counter[str]] = {}  # question to way to times

    def __call__(
        self, rollouts: Sequence[Rollout], problems: Sequence[Problem]
    ) -> list[tuple[float, ...]]:
        """Count the batch, then pay it."""
        right = sparse_rewards(rollouts, problems)
        ways = [
            "\n".join(operation_key(r.text)) if paid and r.finished else None
            for r, paid in zip(rollouts, right, strict=True)
        ]
        for rollout, way in zip(rollouts, ways, strict=True):
            if way is not None:
                self.seen.setdefault(rollout.problem_id, Counter())[way] += 1
        rows = sparse_token_rewards(rollouts, problems)
        for i, (rollout, way) in enumerate(zip(rollouts, ways, strict=True)):
            if way is not None:
                times = self.seen[rollout.problem_id][way]
                *before, last = rows[i]
                rows[i] = (*before, last + self.bonus / times**0.5)
        return rows

    def state(self) -> dict[str, Any]:
        """The counts, as JSON holds them."""
        return {question: dict(ways) for question, ways in self.seen.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo ``state``."""
        self.seen = {question: Counter(ways) for question, ways in state.items()}

"""What is paid for a rollout."""

from rlreason.rewards.base import RewardFunction
from rlreason.rewards.sparse import (
    sparse_reward,
    sparse_rewards,
    sparse_token_rewards,
)

__all__ = ["RewardFunction", "sparse_reward", "sparse_rewards", "sparse_token_rewards"]

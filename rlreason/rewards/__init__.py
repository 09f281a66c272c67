"""What is paid for a rollout."""

from rlreason.rewards.base import RewardFunction
from rlreason.rewards.dense import dense_reward
from rlreason.rewards.shaping import shaped_reward
from rlreason.rewards.sparse import (
    sparse_reward,
    sparse_rewards,
    sparse_token_rewards,
)

__all__ = [
    "RewardFunction",
    "dense_reward",
    "shaped_reward",
    "sparse_reward",
    "sparse_rewards",
    "sparse_token_rewards",
]

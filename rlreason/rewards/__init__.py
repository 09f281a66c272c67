"""What a rollout earns."""

from rlreason.rewards.base import RewardFunction
from rlreason.rewards.dense import dense_reward
from rlreason.rewards.novelty import NoveltyReward
from rlreason.rewards.own import load_reward
from rlreason.rewards.shaping import shaped_reward
from rlreason.rewards.sparse import (
    sparse_reward,
    sparse_rewards,
    sparse_token_rewards,
)

__all__ = [
    "NoveltyReward",
    "RewardFunction",
    "dense_reward",
    "load_reward",
    "shaped_reward",
    "sparse_reward",
    "sparse_rewards",
    "sparse_token_rewards",
]

"""Who acts: loading a policy, its sampler, its log-probabilities."""

from rlreason.policy.load import Policy, PolicyError, load_policy
from rlreason.policy.logprobs import token_logprobs
from rlreason.policy.rollout import Prompt, Rollout
from rlreason.policy.sampler import sample, sample_groups, sample_prompts

__all__ = [
    "Policy",
    "PolicyError",
    "Prompt",
    "Rollout",
    "load_policy",
    "sample",
    "sample_groups",
    "sample_prompts",
    "token_logprobs",
]

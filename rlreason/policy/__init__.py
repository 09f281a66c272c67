"""Who acts: loading a policy, its sampler, its log-probabilities."""

from rlreason.policy.logprobs import token_logprobs

__all__ = ["token_logprobs"]

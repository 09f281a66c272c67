"""What a phase of PPO learns from, and what is known of it before that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlreason.algorithms.credit import explained_variance
from rlreason.algorithms.losses import kl_estimate
from rlreason.policy.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """What a phase learns from: B responses, padded on the right to T tokens.

    Attributes:
        rollouts: The B responses.
        response_mask: True at response tokens, (B, T), from lengths.
        logprobs: Of the sampling policy at the sampling temperature, (B, T).
        ref_logprobs: Of the reference at the same temperature, (B, T); ``logprobs``
            where it is not asked.
        values: V before each token, (B, T); 0 without a value function.
        last_values: V after the last token, (B,).
        rewards: What the task paid per token, (B, T).
        penalties: The price of the KL per token, (B, T), to be taken off.
        advantages: (B, T).
        returns: What V is to become, (B, T).
        totals: What the task paid each response, before anything was done to it.

    All tensors are float32 on the policy's device and 0 outside the mask.
    """

    rollouts: tuple[Rollout, ...]
    response_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    last_values: Tensor
    rewards: Tensor
    penalties: Tensor
    advantages: Tensor
    returns: Tensor
    totals: tuple[float, ...] = ()


def phase_metrics(
    experience: Experience, *, kl_coef: float | None, valued: bool
) -> dict[str, float]:
    """What is known of a phase before it is learned from; ``ppo`` says what each is.

    Args:
        experience: After credit.
        kl_coef: Beta; None where the reference is not asked.
        valued: Whether there is a value function.
    """
    rollouts, mask = experience.rollouts, experience.response_mask
    tokens, count = int(mask.sum()), len(rollouts)
    net = experience.rewards - experience.penalties
    sampled = torch.zeros_like(experience.logprobs)
    for row, rollout in enumerate(rollouts):
        sampled[row, : len(rollout.tokens)] = torch.tensor(rollout.logprobs)
    error = torch.where(mask, (experience.logprobs - sampled).expm1().abs(), 0.0)
    metrics = {
        "reward": sum(experience.totals) / count,
        "penalised_reward": float(net.sum()) / count,
        "response_length": sum(len(r.tokens) for r in rollouts) / count,
        "response_tokens": tokens,
        "truncated": sum(not r.finished for r in rollouts) / count,
        "ratio_error": float(error.max()),
    }
    if kl_coef is not None:
        k1, k3 = (
            kl_estimate(experience.logprobs, experience.ref_logprobs, kind) * mask
            for kind in ("k1", "k3")
        )
        metrics["kl"] = float(k1.sum()) / count
        metrics["kl_token"] = float(k3.sum()) / tokens
        metrics["kl_coef"] = kl_coef
    if valued:
        metrics["explained_variance"] = explained_variance(
            experience.values[mask], experience.returns[mask]
        )
        metrics["value"] = float(experience.values[mask].mean())
    return metrics

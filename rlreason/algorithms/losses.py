"""What PPO makes smaller: the clipped surrogate and the error of the values; and KL.

Losses are sums over response tokens, for the caller to divide by the number of tokens
of the whole mini-batch, however it is cut into micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

# exp of it is finite in float32; a token never gets there honestly
MAX_LOG_RATIO = 20.0


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    r"""Estimates of KL(pi || ref) at sampled tokens, in nats (Schulman 2020).

    With :math:`d = \log \pi - \log \pi_{ref}`: k1 is :math:`d`, unbiased, can be
    negative; k2 is :math:`d^2 / 2`, biased, low variance; k3 is
    :math:`e^{-d} - 1 + d`, unbiased, never negative.

    As a reward each may be used. As a *loss*, differentiating k1 or k3 gives the wrong
    gradient: that of KL(pi || ref) is the expectation of k2's gradient.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-d) + d


def policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The clipped surrogate (Schulman et al. 2017, eq. 7), summed over tokens.

    .. math:: -\min(\rho_t A_t, \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_t),
              \quad \rho_t = \exp(\log\pi_t - \log\pi^{old}_t)

    Args:
        new_logprobs: (B, T), differentiable.
        logprobs: Of the policy that sampled, (B, T).
        advantages: (B, T).
        response_mask: (B, T).
        clip: Epsilon.

    Returns:
        The sum, for the caller to divide by the mini-batch's number of tokens, and sums
        over tokens of ``policy_loss``, ``clip_fraction`` and ``stop_kl`` (k3).
    """
    mask = response_mask.bool()
    log_ratio = torch.where(mask, new_logprobs - logprobs, 0.0)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    losses = -torch.minimum(ratio * advantages, clipped * advantages) * mask
    with torch.no_grad():
        metrics = {
            "policy_loss": losses.sum(),
            "clip_fraction": (((ratio - 1).abs() > clip) & mask).float().sum(),
            "stop_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        }
    return losses.sum(), metrics


def value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    clip: float | None,
) -> Tensor:
    """Half the squared error, clipped around the values of the sampling time; a sum.

    ``0.5 * max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2)``: the larger of
    the two, so that a step beyond the clip earns nothing. All (B, T).
    """
    mask = response_mask.bool()
    errors = (new_values - returns).square()
    if clip is not None:
        near = values + (new_values - values).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * torch.where(mask, errors, 0.0).sum()

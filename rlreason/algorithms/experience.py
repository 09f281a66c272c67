"""What a phase of PPO learns from, what is known of it, and whether to go on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlreason.algorithms.credit import explained_variance
from rlreason.algorithms.losses import kl_estimate
from rlreason.algorithms.optim import HALF, DivergedError, check_finite
from rlreason.algorithms.ppo_settings import PpoSettings
from rlreason.algorithms.recorder import Recorder, last_checkpoint
from rlreason.policy.load import Policy
from rlreason.policy.rollout import Rollout
from rlreason.policy.value import Scores


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
    metrics = {
        "reward": sum(experience.totals) / count,
        "penalised_reward": float(net.sum()) / count,
        "response_length": sum(len(r.tokens) for r in rollouts) / count,
        "response_tokens": tokens,
        "truncated": sum(not r.finished for r in rollouts) / count,
        "ratio_error": float(_ratio_errors(experience).max()),
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


def _ratio_errors(experience: Experience) -> Tensor:
    """abs(ratio - 1) of scoring pass to sampler, of each token of a response: (N,)."""
    sampled = sampled_logprobs(experience.rollouts, experience.logprobs)
    apart = experience.logprobs - sampled  # (B, T)
    return apart[experience.response_mask].expm1().abs()


def sampled_logprobs(rollouts: Sequence[Rollout], like: Tensor) -> Tensor:
    """What the sampler said of its tokens, laid out as ``like`` (B, T), 0 elsewhere."""
    sampled = torch.zeros(like.shape)
    for row, rollout in enumerate(rollouts):
        sampled[row, : len(rollout.tokens)] = torch.tensor(rollout.logprobs)
    return sampled.to(like)


def agree(scores: Scores, sampled: Tensor, dtype: torch.dtype) -> bool:
    """Whether a pass gives the tokens of responses the probabilities of the sampler.

    The ratio of the larger to the smaller one is below 1.0001; in half precision, where
    both round in their own way, its mean is below 1.02. (The mean of the ratios as they
    are would be 1 whatever the two distributions were.)

    Args:
        sampled: Log-probabilities by the sampler, (B, T).
        dtype: Of the weights of both.
    """
    apart = (scores.logprobs - sampled).abs()[scores.response_mask].expm1()
    return bool(apart.mean() <= 0.02 if dtype in HALF else apart.max() <= 1e-4)


def check_phase(
    metrics: Mapping[str, float],
    phase: int,
    settings: PpoSettings,
    saved: int,
    recorder: Recorder,
) -> None:
    """Stop at the first number that is none, or when the policy has run away."""
    last = last_checkpoint(recorder, "phase", saved)
    remedy = f"Lower lr (now {settings.lr:g}), or load the policy in float32"
    check_finite(metrics, where=f"phase {phase + 1}", then=f"{last}. {remedy}")
    if settings.max_kl is not None and metrics["kl_token"] > settings.max_kl:
        raise DivergedError(
            f"phase {phase + 1}: the policy is {metrics['kl_token']:.2g} nats a token "
            f"from the reference, more than max_kl={settings.max_kl:g}; {last}. Raise "
            f"kl.coef (now {settings.kl.coef:g}), or lower lr (now {settings.lr:g})"
        )


def warn_of_mismatch(experience: Experience, policy: Policy, phase: int) -> None:
    """Warn where the sampler and the scoring pass are clearly not one distribution.

    By the largest error; in half precision, where of many tokens some are far off by
    rounding alone, by the mean one, as in ``agree``.
    """
    errors = _ratio_errors(experience)
    half = policy.model.dtype in HALF
    off, limit = (errors.mean(), 0.02) if half else (errors.max(), 1e-3)
    if off > limit:
        warnings.warn(
            f"phase {phase + 1}: sampler and scoring pass disagree by {off:.1e} "
            f"{'on average ' * half}on the probability of a token, more than "
            f"{limit:g}: what is trained is not what sampled",
            stacklevel=3,
        )

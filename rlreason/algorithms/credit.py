"""Credit: what each token is told of what its response was paid.

With a value function, generalised advantage estimation; without one, a baseline over
whole responses. Then whitening. Equations alone: tensors in, tensors out.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

from rlreason.policy.rollout import Rollout


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    .. math:: \delta_t = r_t + \gamma V(s_{t+1}) - V(s_t), \quad
              A_t = \delta_t + \gamma \lambda A_{t+1}

    After the last token of a row V is 0: the row is over. For a truncated row add
    ``gamma * V`` to its last reward first (``bootstrapped``). Positions outside the
    mask are skipped as if they were not there, on whichever side or in the middle:
    what stands in them, NaN even, changes nothing.

    Args:
        rewards: (B, T).
        values: V before each token, (B, T).
        mask: True at tokens that are actions, (B, T).

    Returns:
        ``advantages`` and ``returns``, their sum with the values; (B, T), 0 outside
        the mask.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(values)  # (B, T)
    running = values.new_zeros(values.shape[:-1])  # (B,)
    next_value = running
    for t in reversed(range(values.shape[-1])):
        here = mask[..., t]
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        running = torch.where(here, delta + gamma * lam * running, running)
        next_value = torch.where(here, values[..., t], next_value)
        advantages[..., t] = torch.where(here, running, 0.0)
    returns = torch.where(mask, advantages + values, 0.0)
    return advantages, returns


def bootstrapped(
    rewards: Tensor,
    mask: Tensor,
    *,
    last_values: Tensor,
    truncated: Tensor,
    gamma: float,
) -> Tensor:
    """Add gamma V(s_T) to the last reward of each truncated response, once: (B, T).

    A response that chose EOS is over and worth nothing more; one that the length limit
    cut would have gone on.

    Args:
        rewards: (B, T).
        mask: True at response tokens, (B, T), contiguous from the left.
        last_values: V after the last token, (B,).
        truncated: (B,), bool.
    """
    last = (mask.sum(1) - 1).clamp(min=0)[:, None]  # (B, 1)
    extra = (gamma * last_values * truncated * mask.any(1))[:, None]
    return rewards.scatter_add(1, last, extra)


def response_advantages(
    rewards: Tensor,
    groups: Tensor,
    kind: str,
    *,
    penalties: Tensor | None = None,
    k: int = 1,
) -> Tensor:
    """Advantage of whole responses against a baseline, (B,); see BaselineSettings.

    Args:
        rewards: What the task paid for each response, (B,).
        groups: A number for each response that says which question it answers, (B,),
            in any order. A group of one, or of equal returns, gets 0 under rloo/grpo.
        kind: "reinforce", "rloo" or "grpo".
        penalties: What each response's KL costs, (B,); None: nothing. GRPO divides the
            rewards alone by their deviation: where all rewards are equal, the tiny
            differences of the penalties would be blown up to advantages of size 1.
        k: Of rloo: how many responses the objective takes the best of. The penalties
            are those of one.
    """
    if penalties is None:
        penalties = torch.zeros_like(rewards)
    totals = rewards - penalties  # (B,)
    if kind == "reinforce":
        return totals - totals.mean()
    _, group = groups.unique(return_inverse=True)  # (B,)
    size = torch.bincount(group).to(totals)  # (G,)

    def means(values: Tensor) -> Tensor:
        """The mean over its question, for each response: (B,)."""
        return (torch.zeros_like(size).index_add_(0, group, values) / size)[group]

    others = (size / (size - 1).clamp(min=1))[group]  # n / (n - 1)
    if kind == "rloo" and k > 1:
        best = torch.zeros_like(rewards)
        for g in range(len(size)):
            best[group == g] = best_of_k_advantages(rewards[group == g], k)
        return best - (penalties - means(penalties)) * others
    if kind == "rloo":
        # R - mean of the others = (R - mean of all) * n / (n - 1)
        return (totals - means(totals)) * others
    centred = rewards - means(rewards)
    deviation = (means(centred.square()) * others).sqrt()
    spread = deviation > 1e-5 * means(rewards.abs())  # else it is the mean's rounding
    scaled = torch.where(spread, centred / (deviation + 1e-6), 0.0)
    return scaled - (penalties - means(penalties))


def best_of_k(rewards: Tensor, k: int) -> Tensor:
    """The mean, over all sets of k out of m rewards, of the largest: (..., m) to (...).

    The j-th smallest is the largest of C(j - 1, k - 1) of the C(m, k) sets. Of rewards
    0 and 1 it is the unbiased pass@k (Chen et al. 2021); k = 1 is the mean.
    """
    m = rewards.shape[-1]
    shares = [comb(j, k - 1) / comb(m, k) for j in range(m)]
    return rewards.sort(-1).values @ rewards.new_tensor(shares)


def best_of_k_advantages(rewards: Tensor, k: int) -> Tensor:
    r"""Advantages whose objective is the best of k responses, not the mean one: (n,).

    .. math:: A_i = \operatorname{mean}_{S \ni i} \max_{j \in S} R_j
              - \operatorname{mean}_{S \not\ni i} \max_{j \in S} R_j, \quad |S| = k

    The first mean is what response i is part of, the unbiased gradient of the expected
    best of k; the second, over the other n - 1 alone, is a baseline that does not
    depend on i and leaves it unbiased (Walder and Karkhanis 2025; Chen et al. 2025
    have the same first part for rewards 0 and 1). The sum over a group is 0, and k = 1
    is rloo. A right answer to a question that nearly all solve earns nearly nothing: a
    set of k would have held another. A group of k or fewer gets 0.

    Args:
        rewards: Of the n responses to one question, (n,).
        k: 2 or more.
    """
    n = len(rewards)
    if n <= k:
        return torch.zeros_like(rewards)
    apart = ~torch.eye(n, dtype=torch.bool, device=rewards.device)
    others = rewards.expand(n, n)[apart].view(n, n - 1)  # row i: all but i
    # i in the set: the largest of it and of k - 1 others
    joined = best_of_k(others.maximum(rewards[:, None]), k - 1)  # (n,)
    return joined - best_of_k(others, k)


def group_ids(rollouts: Sequence[Rollout]) -> Tensor:
    """A number for each prompt, (B,): by id and tokens, never by place in the batch."""
    numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    keys = [(r.problem_id, r.prompt_tokens) for r in rollouts]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the mask; 0 outside it.

    A single value, or equal ones, become 0 and not NaN. Over the whole phase, never
    over a micro-batch, whose mean would depend on how the batch was cut.
    """
    mask = mask.bool()
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum() / count
    centred = torch.where(mask, values - mean, 0.0)
    variance = centred.square().sum() / count
    rounding = 1e-12 * mean.square().clamp(min=1.0)  # of equal values, by their size
    scale = variance.clamp(min=1e-12).rsqrt()
    return centred * torch.where(variance > rounding, scale, torch.zeros_like(scale))


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), of (N,); 0 where returns are equal."""
    spread = returns.var(unbiased=False)
    if spread < 1e-12:
        return 0.0
    return float(1 - (returns - values).var(unbiased=False) / spread)

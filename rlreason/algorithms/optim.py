"""Optimisation that the algorithms share: schedules, optimiser state, divergence.

State goes through plain tensors and numbers, never through pickle, so that it fits in a
safetensors file and a resumed run continues, on a CPU to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlreason.algorithms.sharded import ShardedOptimizer
from rlreason.policy.parallel import collected, ranks


class DivergedError(ValueError):
    """Training has left the region where going on makes sense."""


def check_finite(metrics: Mapping[str, float], *, where: str, then: str) -> None:
    """Stop at the first numbers that are none.

    Args:
        metrics: By name.
        where: E.g. ``"update 5"``.
        then: What is left, and what mends it.

    Raises:
        DivergedError: Names all that is not finite.
    """
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        verb = "is not a finite number" if len(broken) == 1 else "are not finite"
        raise DivergedError(f"{where}: {', '.join(broken)} {verb}; {then}")


def cosine_lr(
    step: int, *, total: int, warmup: int, peak: float, floor: float
) -> float:
    """Linear warm-up to ``peak``, then half a cosine down to ``floor``.

    Args:
        step: 0-based index of the update about to be made.
        total: Number of updates in all.
        warmup: Updates of warm-up; update ``warmup - 1`` is made at ``peak``.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def scheduled_lr(step: int, total: int, settings: Any) -> float:
    """``cosine_lr`` by the ``lr``, ``lr_floor`` and ``warmup`` of settings."""
    return cosine_lr(
        step,
        total=total,
        warmup=math.ceil(settings.warmup * total),
        peak=settings.lr,
        floor=min(settings.lr_floor, settings.lr),
    )


def trapezoid(step: int, *, total: int, warmup: int, decay: int) -> float:
    """Warm-up, a plateau at 1, a linear decay over the last ``decay`` updates.

    Any point of the plateau can be a start of the decay, so one long run gives models
    of several lengths.
    """
    down = (total - step) / max(1, decay)
    return max(0.0, min(1.0, (step + 1) / max(1, warmup), down))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times the group's own ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


HALF = (torch.float16, torch.bfloat16)


class MasterAdamW(torch.optim.AdamW):
    """AdamW that keeps float32 weights beside those of a model in half precision.

    A bfloat16 has 8 significant bits: an update below 1/256 of a weight is rounded
    away, and with the learning rates of fine-tuning nearly all are. So the update is
    made to a float32 weight, with float32 moments, and the model gets it rounded.
    Other weights are updated where they are.

    Attributes:
        masters: The float32 weights, by the index of their parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self.masters: dict[int, Tensor] = {}
        self._rounded: list[tuple[Tensor, Tensor]] = []
        groups = [{**group, "params": list(group["params"])} for group in groups]
        index = 0
        for group in groups:
            for i, weight in enumerate(group["params"]):
                if weight.dtype in HALF:
                    master = weight.detach().float()
                    self.masters[index] = group["params"][i] = master
                    self._rounded.append((weight, master))
                index += 1
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients of the model's own weights."""
        learning = [pair for pair in self._rounded if pair[0].grad is not None]
        if not learning:
            return super().step()
        weights, masters = zip(*learning, strict=True)
        for master in masters:
            master.grad = torch.empty_like(master)
        gradients = [master.grad for master in masters]
        torch._foreach_copy_(gradients, [weight.grad for weight in weights])
        super().step()
        torch._foreach_copy_(weights, masters)
        for master in masters:
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the model's own weights."""
        super().zero_grad(set_to_none)
        for weight, _ in self._rounded:
            weight.grad = None


def adamw(
    groups: Iterable[nn.Parameter] | Iterable[dict[str, Any]], **options: Any
) -> torch.optim.AdamW:
    """AdamW in one fused step; with float32 masters of weights in half precision.

    Of several processes each keeps the state of its share of the weights.
    """
    groups = list(groups)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    groups = [{**group, "params": list(group["params"])} for group in groups]
    weights = [weight for group in groups for weight in group["params"]]
    half = any(weight.dtype in HALF for weight in weights)
    kind = MasterAdamW if half else torch.optim.AdamW
    make = partial(kind, fused=True, **options)
    return make(groups) if ranks() == 1 else ShardedOptimizer(groups, make)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, prefix: str
) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, e.g. ``"adamw.0.exp_avg"``.

    Of several processes the first has it.
    """
    if isinstance(optimizer, ShardedOptimizer):
        own = optimizer_tensors(optimizer.local, prefix)
        return collected(optimizer.to_all(prefix, own))
    masters = getattr(optimizer, "masters", {})
    return {
        f"{prefix}.{i}.{key}": torch.as_tensor(value)
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    } | {f"{prefix}.{i}.master": master for i, master in masters.items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]
) -> None:
    """Undo ``optimizer_tensors``. Groups and their settings stay as they are."""
    if isinstance(optimizer, ShardedOptimizer):
        tensors, optimizer = optimizer.to_own(prefix, tensors), optimizer.local
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix + "."):
            index, key = name[len(prefix) + 1 :].split(".", 1)
            if key == "master":
                optimizer.masters[int(index)].copy_(value)
            else:
                state.setdefault(int(index), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def largest_weight(model: nn.Module) -> float:
    """The largest absolute weight of a model; NaN where a weight is."""
    weights = [weight.detach() for weight in model.parameters()]
    largest = torch._foreach_norm(weights, math.inf, dtype=torch.float32)
    return float(torch.stack(largest).max())  # Python's max passes NaN over

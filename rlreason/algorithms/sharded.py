"""An optimiser whose state is shared out over processes: ZeRO, stage 1.

Rajbhandari et al. (2020). Every rank has all weights and, summed over ranks, all
gradients. Of each weight one rank alone has master and moments: it makes that weight's
update and sends the result to the others.

Left out: sharing gradients and weights out too (stages 2 and 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlreason.policy.parallel import rank, ranks


class ShardedOptimizer:
    """Of several ranks; every call is made by all of them.

    Args:
        groups: Of all weights, as an optimiser of PyTorch takes them.
        make: Makes the optimiser of a rank's own weights from such groups.

    Attributes:
        local: The optimiser of this rank's own weights.
        param_groups: Its groups, with their learning rates.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        self.weights = [weight for group in groups for weight in group["params"]]
        self.owners = owners([w.numel() for w in self.weights], ranks())
        self.own = [i for i, owner in enumerate(self.owners) if owner == rank()]
        mine = {id(self.weights[i]) for i in self.own}
        self.local = make(
            [
                {**group, "params": [w for w in group["params"] if id(w) in mine]}
                for group in groups
            ]
        )
        self.param_groups = self.local.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """One update: each rank makes its own, and sends it round."""
        self.local.step()
        sent = [
            dist.broadcast(weight.data, owner, async_op=True)
            for weight, owner in zip(self.weights, self.owners, strict=True)
        ]
        for each in sent:
            each.wait()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all weights."""
        self.local.zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None

    def to_all(self, prefix: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """State named after this rank's weights, named after all weights."""
        return _renamed(prefix, own, dict(enumerate(self.own)))

    def to_own(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo ``to_all``; state of other ranks' weights is left out."""
        return _renamed(prefix, tensors, {n: i for i, n in enumerate(self.own)})


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Who owns each weight: the largest first, each to who has the least so far.

    >>> owners([5, 3, 2, 4], 2)
    [0, 1, 0, 1]
    """
    loads, found = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found[i] = loads.index(min(loads))
        loads[found[i]] += sizes[i]
    return found


def _renamed(
    prefix: str, tensors: dict[str, Tensor], numbers: dict[int, int]
) -> dict[str, Tensor]:
    """Tensors ``prefix.N.key`` under other numbers; those without one are left out."""
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            number, key = name[len(prefix) + 1 :].split(".", 1)
            if int(number) in numbers:
                renamed[f"{prefix}.{numbers[int(number)]}.{key}"] = tensor
    return renamed

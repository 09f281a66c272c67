"""The reference of a learner: the policy that it started from, to be scored beside it.

Adapters need no second model: with them off, the learner's own is the start. Where all
weights learn the start is kept as a second model (*copy*), or as weights on the CPU
that are put into the one model while it scores (*swap*): slower, half the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from peft import PeftModel
from torch import Tensor

from rlreason.policy.load import Policy
from rlreason.policy.lora import adapters_off, merge_adapters


class Reference:
    """Scores as ``start`` did, whatever ``policy`` has become.

    Args:
        start: The policy before learning. Not changed.
        policy: The one that learns.
        kind: What is kept where ``policy`` has no adapters to switch off.
    """

    def __init__(
        self, start: Policy, policy: Policy, kind: Literal["copy", "swap"] = "copy"
    ) -> None:
        self.policy, self.copy, self.weights = policy, None, None
        if isinstance(policy.model, PeftModel):
            return
        if kind == "copy":
            self.copy = start.clone()
            self.copy.model.requires_grad_(False)
        else:
            adapted = isinstance(start.model, PeftModel)
            plain = merge_adapters(start.clone()) if adapted else start
            state = plain.model.state_dict()
            self.weights = {name: t.detach().cpu().clone() for name, t in state.items()}

    @contextmanager
    def lent(self) -> Iterator[Policy]:
        """A policy that scores as the start; afterwards all is as before."""
        if self.copy is not None:
            yield self.copy
        elif self.weights is None:
            with adapters_off(self.policy.model):
                yield self.policy
        else:
            own = self.policy.model.state_dict()
            kept = {name: tensor.cpu().clone() for name, tensor in own.items()}
            try:
                _put(self.weights, own)
                yield self.policy
            finally:
                _put(kept, own)


@contextmanager
def set_aside(*policies: Policy) -> Iterator[None]:
    """Keep the weights of policies that wait on the CPU, so that another can learn."""
    places = {policy.model: policy.device for policy in policies}
    for model in places:
        model.to("cpu")
    try:
        yield
    finally:
        for model, device in places.items():
            model.to(device)


def _put(weights: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for name, tensor in own.items():
        tensor.copy_(weights[name])

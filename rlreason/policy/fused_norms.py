"""RMS norms as one kernel each while a model is sampled on a GPU.

transformers writes such a norm as eight operators, and two of them stand in each layer:
a third of all kernels of a step of decoding. PyTorch has one kernel for it. It rounds
once where the operators round twice, so in half precision the result may differ in the
last bit, as it does between batches of other sizes.

Families scale by other things than the weight, so a norm is replaced only where it has
been seen to compute the same with random weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import rms_norm

# What stands in for each norm that was looked at, or None
_fused: WeakKeyDictionary[nn.Module, partial | None] = WeakKeyDictionary()


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Let the RMS norms of a model be one kernel each for a while."""
    replaced = []
    try:
        for module in model.modules():
            if not type(module).__name__.endswith("RMSNorm"):
                continue
            if module not in _fused:
                _fused[module] = _same(module)
            if _fused[module] is not None and "forward" not in vars(module):
                module.forward = _fused[module]
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


@torch.no_grad()
def _same(module: nn.Module) -> partial | None:
    """The kernel that computes the same as a norm, if it does."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn((2, 7, len(weight)), generator=generator).to(weight)
    other = other[0].abs() + 0.5
    try:
        expected = functional_call(module, {"weight": other}, (x,))
    except Exception:  # another family's norm may ask for more
        return None
    found = rms_norm(x, weight.shape, other, eps)
    close = torch.finfo(weight.dtype).eps * 4
    if found.dtype != expected.dtype or not torch.allclose(
        found, expected, rtol=close, atol=close
    ):
        return None
    return partial(_norm, weight, eps)


def _norm(weight: torch.Tensor, eps: float, hidden: torch.Tensor) -> torch.Tensor:
    """(..., H), by the weight as it is when this is called."""
    return rms_norm(hidden, weight.shape, weight, eps)

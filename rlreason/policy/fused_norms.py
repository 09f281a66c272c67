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

# Epsilon of each norm that was looked at, by the weight's number format; or None
_seen: WeakKeyDictionary[nn.Module, dict[torch.dtype, float | None]] = (
    WeakKeyDictionary()
)


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """Let the RMS norms of a model be one kernel each for a while."""
    replaced = []
    try:
        for module in model.modules():
            if not type(module).__name__.endswith("RMSNorm"):
                continue
            eps = _epsilon(module)
            if eps is not None and "forward" not in vars(module):
                weight = module.weight
                module.forward = partial(
                    rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps
                )
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            del module.forward


def _epsilon(module: nn.Module) -> float | None:
    """What the kernel needs to compute the same as a norm; None where it does not."""
    seen = _seen.setdefault(module, {})
    weight = getattr(module, "weight", None)
    dtype = getattr(weight, "dtype", None)
    if dtype not in seen:
        seen[dtype] = _same(module, weight)
    return seen[dtype]


@torch.no_grad()
def _same(module: nn.Module, weight: torch.Tensor | None) -> float | None:
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
    return eps

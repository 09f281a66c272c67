"""Decoder layers compiled by ``torch.compile`` while a model learns.

On a GPU most of the time of a small model's update goes into launching kernels for
norms, rotations and activations, one operator each, and into their passes over memory.
The compiler fuses them. Layers of a model are alike, so one is compiled and serves all
of them, for any number of tokens: half a minute at the first update. Another kind of
pass (without gradients, with adapters, of a single sequence) is compiled when it first
comes.

Only layers are compiled, and only in the block: the output layer, losses, optimiser
and sampler stay as they are, and so do names of weights.

Left out: compiling the whole model, which takes minutes and starts again for each
length of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlreason.policy.logprobs import trunk_of
from rlreason.policy.packing import packs

_VARIANTS = 64  # kinds of passes that are compiled; torch would stop at 8


@contextmanager
def compiled_layers(
    *models: nn.Module | None, compiled: bool | None = None
) -> Iterator[None]:
    """Let the decoder layers of models run compiled for a while.

    Args:
        models: With layers as transformers builds them; others stay as they are.
        compiled: None: those on a GPU in half precision. In single precision, where
                attention goes row by row, there are too many variants to compile.
    """
    layers = [
        layer
        for model in models
        if model is not None and (_worth_it(model) if compiled is None else compiled)
        for layer in _layers_of(model)
    ]
    if not layers:
        yield
        return
    from torch._dynamo import config  # takes a second

    # Of the function, not of a layer: what is compiled belongs to it, and keeps no
    # model alive
    call = torch.compile(nn.Module._call_impl, dynamic=True)
    try:
        for layer in layers:
            layer._compiled_call_impl = partial(call, layer)
        with config.patch(recompile_limit=_VARIANTS):
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def _layers_of(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, PreTrainedModel | PeftModel):
        packs(trunk_of(model), 0)  # a look at the model that is not to be compiled
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def _worth_it(model: nn.Module) -> bool:
    return any(
        w.is_cuda and w.dtype in (torch.float16, torch.bfloat16)
        for w in model.parameters()
    )

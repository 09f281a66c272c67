"""Sequences end to end in one row, so that no padding goes through a model.

Layers that look at one token at a time do not care whose token it is. Attention must
not look across sequences, and positions start anew at each. The first is done by an
attention function registered with transformers' ``AttentionInterface``: on a GPU in
half precision by one kernel for sequences of any lengths, elsewhere on rows that are
padded for attention alone. Without packed sequences it is transformers' own ``sdpa``.

transformers promises no family that it packs, so each model is compared once with
itself on padded rows. One that differs, or whose attention is not ``sdpa``, gets
padded rows: in a causal model nothing looks to the right, so padding on the right needs
no mask.

Left out: sequences longer than a sliding window or a chunk of attention; those batches
are padded too.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

PACKED = "rlreason_packed"
_WINDOWS = ("sliding_window", "attention_chunk_size")
# Older versions of torch take fewer key heads than query heads without being asked
_ASKED = "enable_gqa" in inspect.signature(varlen_attn).parameters

# The longest sequence that each trunk packs; beside it, so that a copy is asked anew
_longest: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


@dataclass(frozen=True)
class Packed:
    """Where the sequences of a row lie.

    Attributes:
        count: B, of the sequences.
        longest: L, tokens of the longest.
        bounds: The place where each starts, and the end of the last, (B + 1,), int32.
        places: Of each token among those of padded rows, (N,).
    """

    count: int
    longest: int
    bounds: Tensor
    places: Tensor


@dataclass(frozen=True)
class Inputs:
    """What a model is called with, packed or padded.

    Attributes:
        input_ids: (1, N) packed, (B, L) padded.
        options: What else its trunk is given, the positions among it.
        starts: The place of each sequence's first token among all places, row by row,
            (B,).
    """

    input_ids: Tensor
    options: dict[str, Any]
    starts: Tensor


def pack(tokens: Tensor, lengths: Sequence[int]) -> Inputs:
    """The inputs of sequences that stand end to end.

    Args:
        tokens: All tokens, (N,).
        lengths: Of the B sequences, N in all.
    """
    device, longest = tokens.device, max(lengths)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(tokens)) - bounds[:-1].repeat(lengths)
    places = np.arange(len(lengths)).repeat(lengths) * longest + positions
    ends = moved(bounds, device)
    options = {
        "position_ids": moved(positions, device)[None],
        # A mask of four dimensions is passed on as it is; ``packed`` knows better.
        "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
        "packed": Packed(len(lengths), longest, ends.int(), moved(places, device)),
        "use_cache": False,
    }
    return Inputs(tokens[None], options, ends[:-1])


def moved(array: np.ndarray, device: torch.device | str | None) -> Tensor:
    """An array as a tensor on a device; a GPU's queue is not waited for."""
    tensor = torch.from_numpy(array)
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad(input_ids: Tensor) -> Inputs:
    """The inputs of rows (B, L) that are padded on the right."""
    rows, width = input_ids.shape
    places = torch.arange(max(rows, width), device=input_ids.device)
    options = {"position_ids": places[None, :width], "use_cache": False}
    return Inputs(input_ids, options, places[:rows] * width)


def packs(trunk: PreTrainedModel, longest: int) -> bool:
    """Whether a trunk may be given packed sequences of up to so many tokens.

    Costs two short passes at the first call, in which it also gets our attention.
    """
    if trunk not in _longest:
        config = trunk.config
        windows = [getattr(config, name, None) for name in _WINDOWS]
        limit = min(filter(None, windows), default=float("inf"))
        _longest[trunk] = limit if _agrees(trunk) else 0
    return longest <= _longest[trunk]


def allow_packing(trunk: PreTrainedModel) -> None:
    """Put our attention in the place of ``sdpa``."""
    if trunk.config._attn_implementation != PACKED:
        trunk.set_attn_implementation(PACKED)


@torch.no_grad()
def _agrees(trunk: PreTrainedModel) -> bool:
    """Whether a trunk makes of packed sequences what it makes of each alone."""
    own = trunk.config._attn_implementation
    if own not in ("sdpa", PACKED):
        return False
    weight = trunk.get_input_embeddings().weight
    ids = torch.arange(1, 11, device=weight.device).view(2, 5) % len(weight)
    try:
        expected = _hidden(trunk, pad(ids)).flatten(0, 1)[:8]  # two of padding
        allow_packing(trunk)
        found = _hidden(trunk, pack(ids.flatten()[:8], (5, 3)))[0]
    except Exception:  # an unknown family may raise anything
        trunk.set_attn_implementation(own)
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    if (found - expected).norm() <= tolerance * expected.norm():
        return True
    trunk.set_attn_implementation(own)
    return False


def _hidden(trunk: PreTrainedModel, inputs: Inputs) -> Tensor:
    output: BaseModelOutput = trunk(input_ids=inputs.input_ids, **inputs.options)
    return output.last_hidden_state


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers' layers call.

    Args:
        module: The layer's attention.
        query: (1, H, N, D); key and value may have fewer heads.
        packed: None where rows are what transformers takes them for.
        options: Of ``sdpa``; a family that gives others is found out in ``packs``.

    Returns:
        (1, N, H, D).
    """
    if packed is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    if any(options.get(name) is not None for name in ("softcap", "s_aux")):
        raise ValueError(f"{type(module).__name__} has an attention of its own")
    heads = [x.transpose(1, 2)[0] for x in (query, key, value)]  # (N, H, D)
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]}
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        bounds, longest = packed.bounds, packed.longest
        out = varlen_attn(
            *heads,
            bounds,
            bounds,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),  # causal
            **(grouped if _ASKED else {}),
        )
        return out[None], None
    shape = packed.count, packed.longest  # (B, L)
    rows = [_pad(x, packed.places, shape).transpose(1, 2) for x in heads]
    out = scaled_dot_product_attention(
        *rows, is_causal=True, scale=scaling, **grouped
    )  # (B, H, L, D); what is made of padding is dropped
    return _Unpad.apply(out.transpose(1, 2).flatten(0, 1), packed.places)[None], None


def _pad(x: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """(N, H, D) as rows (B, L, H, D), with zeros at the right."""
    zeros = x.new_zeros((shape[0] * shape[1], *x.shape[1:]))
    return zeros.index_copy(0, places, x).unflatten(0, shape)


class _Unpad(torch.autograd.Function):
    """The rows at distinct places: of ``index_select``, whose gradient is slow."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = rows.shape
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy(0, places, gradient), None


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)

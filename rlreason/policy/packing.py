"""Sequences end to end in one row, so that no padding goes through a model.

Layers that look at one token at a time do not care whose token it is. Attention must
not look across sequences, and positions start anew at each. The first is done by an
attention function registered with transformers' ``AttentionInterface``: on a GPU in
half precision by one kernel for sequences of any lengths, elsewhere on rows that are
padded for attention alone. Without packed sequences it is transformers' own ``sdpa``.

Where sequences begin alike a token may stand for several of them, see ``layout``: then
it is the query of one sequence, and a key of all that hold it.

transformers promises no family that it packs, so each model is compared once with
itself on padded rows, and once more past each number of its configuration that a batch
comes past. One that differs, or whose attention is not ``sdpa``, gets padded rows: in a
causal model nothing looks to the right, so padding on the right needs no mask. Where
the longest sequence of a call decides how positions are stretched, what would be read
differently for it is refused.

Left out: sequences longer than a sliding window or a chunk of attention; those batches
are padded too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput

from rlreason.policy.layout import Layout, lay_out
from rlreason.policy.limits import limits_of, rounding, telling_length
from rlreason.policy.load import PolicyError
from rlreason.policy.memory import out_of_memory

PACKED = "rlreason_packed"
_SHORTEST = 6  # tokens of the sequences by which a model is asked whether it packs
_WINDOWS = ("sliding_window", "attention_chunk_size")
# Older versions of torch take fewer key heads than query heads without being asked
_ASKED = "enable_gqa" in inspect.signature(varlen_attn).parameters

# What each trunk was found to pack; beside it, so that a copy is asked anew
_packs: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Rows:
    """Some of the sequences of a layout, as padded rows for attention.

    Attributes:
        count: b, of the sequences.
        most: Q, the most tokens that one of them asks.
        places: Of the tokens that ask among b * Q.
        asked: Which of the N tokens ask, (b, Q); None: all.
        keys: What they look at, (b, K); None: each other.
        mask: 0 for keys that a token may look at, else minus infinity, (b, 1, Q, K);
            None: it looks at those to its left.
    """

    count: int
    most: int
    places: Tensor
    asked: Tensor | None
    keys: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Packed:
    """How the tokens of a row attend.

    Attributes:
        query_bounds: Where the tokens of each sequence start, and the end of the last,
            (B + 1,), int32.
        key_bounds: The same, of what they look at.
        keys: Which of the N tokens that is; None: the tokens themselves.
        most: Tokens that one sequence asks at most.
        longest: Tokens of the longest sequence.
        rows: The same as padded rows; none where there is a kernel for it.
    """

    query_bounds: Tensor
    key_bounds: Tensor
    keys: Tensor | None
    most: int
    longest: int
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class Inputs:
    """What a model is called with, packed or padded.

    Attributes:
        input_ids: (1, N) packed, (B, L) padded.
        options: What else its trunk is given, the positions among it.
        places: Where each token of padded rows (B, L) is among all, row by row.
    """

    input_ids: Tensor
    options: dict[str, Any]
    places: Tensor


def check_lengths(trunk: PreTrainedModel, lengths: np.ndarray) -> None:
    """Refuse sequences whose length would change what a model makes of others.

    Past a limit some ways of stretching positions look at the longest of a call.

    Args:
        lengths: Of all that goes through the trunk at once, (B,).

    Raises:
        PolicyError: Some are on the other side of such a limit.
    """
    config = trunk.config
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        kind = rope.get("rope_type")
        if kind not in ("longrope", "dynamic"):
            continue
        limit = rope.get("original_max_position_embeddings")
        if kind == "dynamic" or limit is None:
            limit = config.max_position_embeddings
        beyond = lengths > limit
        # The frequencies of "dynamic" are those of the longest call that there was
        if kind == "dynamic" and beyond.any():
            remedy = f"Shorten what is longer than {limit}"
        elif kind == "longrope" and beyond.any() and not beyond.all():
            remedy = f"Score those of up to {limit} tokens and longer ones apart"
        else:
            continue
        raise PolicyError(
            f"Positions in {type(trunk).__name__} are stretched by {kind!r}, so beside "
            f"a sequence of {lengths.max()} tokens it reads shorter ones in another "
            f"way. {remedy}."
        )


def pack(layout: Layout, weight: Tensor) -> Inputs:
    """The inputs of sequences that stand end to end, for a model with such weights."""
    device = weight.device
    order, lengths = layout.order, layout.lengths[layout.order]
    own, shares = layout.own[order], layout.begins.any()
    real = np.arange(lengths.max()) < lengths[:, None]
    packed = Packed(
        query_bounds=moved(np.append(0, own.cumsum()), device).int(),
        key_bounds=moved(np.append(0, lengths.cumsum()), device).int(),
        keys=moved(layout.places[order][real], device) if shares else None,
        most=int(own.max()),
        longest=int(lengths.max()),
        rows=() if _has_kernel(weight) else tuple(_padded_rows(layout, weight)),
    )
    options = {
        "position_ids": moved(layout.columns, device)[None],
        # A mask of four dimensions is passed on as it is; ``packed`` knows better.
        "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
        "packed": packed,
        "use_cache": False,
    }
    places = moved(layout.places, device)
    return Inputs(moved(layout.tokens, device)[None], options, places)


def _has_kernel(x: Tensor) -> bool:
    """Whether one kernel attends among sequences of any lengths."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _padded_rows(layout: Layout, weight: Tensor) -> Iterator[Rows]:
    """All sequences as padded rows; apart, where some ask much more than others."""
    order, device = layout.order, weight.device
    shares = layout.begins.any()
    cut = _cut(layout.own[order], layout.lengths[order]) if shares else len(order)
    for part in filter(len, (order[:cut], order[cut:])):
        asks = layout.own[part]
        most, longest = int(asks.max()), int(layout.lengths[part].max())
        real = np.arange(most) < asks[:, None]  # (b, Q)
        asked = keys = mask = None
        if shares:
            columns = layout.begins[part, None] + np.arange(most)  # (b, Q)
            last = layout.lengths[part, None] - 1  # stands where nothing is asked
            asked = layout.places[part[:, None], np.minimum(columns, last)]
            asked = moved(asked, device)
            keys = moved(layout.places[part, :longest], device)
            columns = moved(columns, device)[..., None]
            seen = torch.arange(longest, device=device) <= columns  # (b, Q, K)
            # As it is added to the scores, so that no layer makes and keeps its own
            mask = weight.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]
        places = moved(real.ravel().nonzero()[0], device)
        yield Rows(len(part), most, places, asked, keys, mask)


def _cut(own: np.ndarray, lengths: np.ndarray) -> int:
    """Where to cut rows that ask less and less, so that the least is padding."""
    before = np.maximum.accumulate(lengths)
    behind = np.append(np.maximum.accumulate(lengths[::-1])[-2::-1], 0)
    count = np.arange(1, len(own) + 1)
    area = count * own[0] * before
    area += (len(own) - count) * np.append(own[1:], 0) * behind
    return int(area.argmin()) + 1


def moved(array: np.ndarray, device: torch.device | str | None) -> Tensor:
    """An array as a tensor on a device; a GPU's queue is not waited for."""
    tensor = torch.from_numpy(array)
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pad(input_ids: Tensor) -> Inputs:
    """The inputs of rows (B, L) that are padded on the right."""
    rows, width = input_ids.shape
    places = torch.arange(rows * width, device=input_ids.device).view(rows, width)
    options = {"position_ids": places[:1], "use_cache": False}
    return Inputs(input_ids, options, places)


def packs(trunk: PreTrainedModel, longest: int, total: int = 0) -> bool:
    """Whether a trunk may be given packed sequences of up to so many tokens.

    Costs two short passes at the first call, in which it also gets our attention, and
    two of about that size where it comes past a number of the configuration.

    Args:
        longest: Tokens of the longest sequence.
        total: Of all of them; some layers count positions for themselves.
    """
    windows = [getattr(trunk.config, name, None) for name in _WINDOWS]
    if longest > min(filter(None, windows), default=longest):
        return False
    limits = limits_of(trunk.config)
    length = telling_length(longest, limits, least=_SHORTEST)
    count = max(3, -(-telling_length(total, limits, least=0) // length))
    return _known(trunk, 3, _SHORTEST) and _known(trunk, count, length)


def _known(trunk: PreTrainedModel, count: int, length: int) -> bool:
    """``_agrees``, asked once of a device, a number format and an attention."""
    weight, known = trunk.get_input_embeddings().weight, _packs.setdefault(trunk, {})

    def kind() -> tuple:  # the attention becomes ours where it agrees
        attention = trunk.config._attn_implementation
        return weight.device.type, weight.dtype, attention, count, length

    if kind() not in known:
        found = _agrees(trunk, count, length)
        known[kind()] = found
    return known[kind()]


def allow_packing(trunk: PreTrainedModel) -> None:
    """Put our attention in the place of ``sdpa``."""
    if trunk.config._attn_implementation != PACKED:
        trunk.set_attn_implementation(PACKED)


@torch.no_grad()
def _agrees(trunk: PreTrainedModel, count: int, length: int) -> bool:
    """Whether a trunk makes of packed sequences what it makes of padded ones.

    Of so many that are about so long, of which two begin alike.
    """
    before = trunk.config._attn_implementation
    if before not in ("sdpa", PACKED):
        return False
    weight = trunk.get_input_embeddings().weight
    ids = torch.arange(1, count * length + 1, device=weight.device) % len(weight)
    ids = ids.view(count, length)
    ids[2, :3] = ids[1, :3]
    first, *others = ids.tolist()
    sequences = [first[:-1], *others]
    real = [*range(length - 1), *range(length, count * length)]
    try:
        expected = _hidden(trunk, pad(ids)).flatten(0, 1)[real]
        allow_packing(trunk)
        inputs = pack(lay_out(sequences), weight)
        found = _hidden(trunk, inputs)[0][inputs.places.flatten()[real]]
    except Exception as error:  # an unknown family may raise anything
        if out_of_memory(error):
            raise
        trunk.set_attn_implementation(before)
        return False
    tolerance = rounding(expected.dtype)
    apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # Where experts are nearly alike, rounding in half precision may choose another one
    worst = apart.max() if tolerance < 1e-3 else apart.float().quantile(0.9)
    if worst <= tolerance:
        return True
    trunk.set_attn_implementation(before)
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
    queries, keys, values = (x.transpose(1, 2)[0] for x in (query, key, value))
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]}
    if not packed.rows:
        if packed.keys is not None:
            keys, values = (_at(x, packed.keys) for x in (keys, values))
        out = varlen_attn(
            queries,
            keys,
            values,
            packed.query_bounds,
            packed.key_bounds,
            packed.most,
            packed.longest,
            scale=scaling,
            window_size=(-1, 0),  # causal, the last query being at the last key
            **(grouped if _ASKED else {}),
        )
        return out[None], None
    outs = []
    for part in packed.rows:
        if part.keys is None:
            heads = [_pad(x, part) for x in (queries, keys, values)]
        else:
            heads = [_at(queries, part.asked)]
            heads += [_at(x, part.keys) for x in (keys, values)]
        out = scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in heads),
            attn_mask=part.mask,
            is_causal=part.mask is None,
            scale=scaling,
            **grouped,
        )  # (b, H, Q, D); what is made of padding is dropped
        outs.append(_Unpad.apply(out.transpose(1, 2).flatten(0, 1), part.places))
    return torch.cat(outs)[None] if len(outs) > 1 else outs[0][None], None


def _pad(x: Tensor, part: Rows) -> Tensor:
    """(n, H, D) as rows (b, Q, H, D), with zeros at the right."""
    zeros = x.new_zeros((part.count * part.most, *x.shape[1:]))
    rows = zeros.index_copy(0, part.places, x)
    return rows.unflatten(0, (part.count, part.most))


def _at(x: Tensor, places: Tensor) -> Tensor:
    """(N, H, D) at places (...), as (..., H, D); its gradient is quicker than that of
    ``index_select``, and the same each time."""
    return embedding(places, x.flatten(1)).unflatten(-1, x.shape[1:])


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

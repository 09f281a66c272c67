"""Attention of one new token a row, as one kernel a layer on a GPU.

What ``slots.attend`` computes with a dozen operators, each with its own launch and its
own pass over memory, in one kernel of Triton: a program for each row and key head
writes the row's newest key and value into its slot and goes once over the prompt of
the row's question and over the row's own tokens, with a softmax that runs along. How
far it goes is read on the device, so that one captured graph serves all lengths.

Rows of one question read the same prompt at about the same time, so that all but the
first find it in the cache of the chip.

Left out: splitting long sequences among programs, which pays with few rows and
thousands of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlreason.policy.slots import Held


@triton.jit
def _attend(
    query,  # (R, Hkv * Q, D), contiguous like all tensors here
    key,  # (R, Hkv, D), of the newest token, as value is
    value,
    prompt_keys,  # (G, Hkv, P, D)
    prompt_values,
    own_keys,  # (R, Hkv, C, D)
    own_values,
    group,  # (R,), the question of each row
    pads,  # (G,), columns at the left of each prompt that hold nothing
    length,  # (R,), own tokens of each row so far
    out,  # (R, Hkv * Q, D)
    scaling,
    width,  # P
    columns,  # C
    KEY_HEADS: tl.constexpr,
    SHARED: tl.constexpr,  # Q, query heads to a key head
    D: tl.constexpr,
    Q_PADDED: tl.constexpr,  # powers of two, at least the 16 that a product needs
    D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens at a time
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    heads, dims = tl.arange(0, Q_PADDED), tl.arange(0, D_PADDED)
    in_head = dims < D
    lines = (row * KEY_HEADS + head) * SHARED + heads
    here = (heads < SHARED)[:, None] & in_head[None, :]
    q = tl.load(query + lines[:, None] * D + dims[None, :], mask=here, other=0.0)

    # The newest token: kept for later, and the begin of the running softmax
    place = (row * KEY_HEADS + head) * D + dims
    new_key = tl.load(key + place, mask=in_head, other=0.0)
    new_value = tl.load(value + place, mask=in_head, other=0.0)
    own = (row * KEY_HEADS + head) * columns
    count = tl.load(length + row)
    tl.store(own_keys + (own + count) * D + dims, new_key, mask=in_head)
    tl.store(own_values + (own + count) * D + dims, new_value, mask=in_head)
    products = q.to(tl.float32) * new_key.to(tl.float32)[None, :]
    top = tl.sum(products, axis=1) * scaling  # (Q,)
    total = tl.zeros([Q_PADDED], tl.float32) + 1.0
    mean = tl.zeros([Q_PADDED, D_PADDED], tl.float32)
    mean += new_value.to(tl.float32)[None, :]

    question = tl.load(group + row).to(tl.int64)
    pad = tl.load(pads + question)
    prompt = (question * KEY_HEADS + head) * width
    for part in tl.static_range(2):  # the prompt, then the row's own tokens
        keys = prompt_keys if part == 0 else own_keys
        values = prompt_values if part == 0 else own_values
        first = prompt if part == 0 else own
        start = pad if part == 0 else 0 * pad
        end = width if part == 0 else count
        for begin in range(start, end, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            there = (column < end)[:, None] & in_head[None, :]
            places = (first + column)[:, None] * D + dims[None, :]
            k = tl.load(keys + places, mask=there, other=0.0)
            v = tl.load(values + places, mask=there, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
            scores = tl.where((column < end)[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp(scores - new_top[:, None])
            shrink = tl.exp(top - new_top)
            total = total * shrink + tl.sum(weights, axis=1)
            added = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            mean = mean * shrink[:, None] + added
            top = new_top
    mean = mean / total[:, None]
    places = lines[:, None] * D + dims[None, :]
    tl.store(out + places, mean.to(out.dtype.element_ty), mask=here)


def attend(
    query: Tensor, key: Tensor, value: Tensor, held: Held, *, scaling: float
) -> Tensor:
    """As ``rlreason.policy.slots.attend``."""
    key_heads, width = held.prompt_keys.shape[1:3]
    rows, heads, dim = query.shape
    out = torch.empty((rows, heads, dim), dtype=query.dtype, device=query.device)
    _attend[(rows, key_heads)](
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        *held,
        out,
        scaling,
        width,
        held.own_keys.shape[2],
        KEY_HEADS=key_heads,
        SHARED=heads // key_heads,
        D=dim,
        Q_PADDED=max(16, triton.next_power_of_2(heads // key_heads)),
        D_PADDED=max(16, triton.next_power_of_2(dim)),
        BLOCK=64 if query.itemsize == 2 else 32,
    )
    return out

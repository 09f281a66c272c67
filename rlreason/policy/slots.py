"""Keys and values of rollouts in flight in fixed places, for a GPU.

A step of decoding on a GPU is bound by the time that the host takes to launch its
kernels, 1,600 of them for 30 layers, unless all of them are captured once as a graph
and replayed with one call. A graph replays the same kernels on the same memory, so
nothing may depend on a number that the host knows: here each row has a *slot* for its
own tokens and counts them on the device, and a question has a *place* for its prompt,
whose keys and values its samples share. Slots and places are filled anew as samples
end, see ``slot_engine``.

``attend`` says in operators of PyTorch what is computed. On a GPU the same is done by
one kernel, see ``slot_attention``.

Left out: as in ``kv_cache``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class Held(NamedTuple):
    """What a layer attends to, in memory that is never moved.

    Attributes:
        prompt_keys: (G, Hkv, P, D), aligned to the right, as ``prompt_values`` are.
        own_keys: (R, Hkv, C, D), as ``own_values``.
        group: The question of each row, (R,).
        pads: Columns at the left of each prompt that hold nothing, (G,).
        length: Own tokens of each row so far, (R,).
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor
    group: Tensor
    pads: Tensor
    length: Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, held: Held, *, scaling: float
) -> Tensor:
    """Keep each row's newest key and value, and attend to its prompt and own tokens.

    With several query heads to a key head, H = Hkv * Q.

    Args:
        query: Of the newest token, (R, H, D).
        key: Likewise, (R, Hkv, D), as is ``value``.
        held: Of this layer; own keys and values are written to.
        scaling: Factor of the scores, usually D ** -0.5.

    Returns:
        (R, H, D).
    """
    group, pads, length = held.group, held.pads, held.length
    count, key_heads, dim = key.shape
    width, columns = held.prompt_keys.shape[2], held.own_keys.shape[2]
    device = query.device
    every = torch.arange(count, device=device)
    held.own_keys[every, :, length] = key
    held.own_values[every, :, length] = value
    keys = torch.cat([held.prompt_keys[group], held.own_keys], dim=2)
    values = torch.cat([held.prompt_values[group], held.own_values], dim=2)
    column = torch.arange(columns, device=device)
    hidden = torch.cat(
        [
            torch.arange(width, device=device) < pads[group][:, None],
            column > length[:, None],
        ],
        dim=1,
    )  # (R, P + C)
    grouped = (query * scaling).view(count, key_heads, -1, dim)  # (R, Hkv, Q, D)
    scores = grouped @ keys.transpose(2, 3)
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ values).view(query.shape)


def attention_on(device: torch.device) -> Callable[..., Tensor]:
    """``attend``, or the kernel that does the same; not all systems have Triton."""
    if device.type == "cuda":
        with suppress(ImportError):
            from rlreason.policy import slot_attention

            return slot_attention.attend
    return attend


class SlotStore:
    """Keys and values of G prompts and R rows, in memory that is never moved.

    Args:
        pads: Unused columns at the left of each prompt, (G,), int64.
        width: P, columns of a prompt.
        group: The question that each row answers, (R,), int64, below G.
        max_columns: Own tokens that a row can come to hold.

    Attributes:
        length: Own tokens of each row, (R,), int64; whoever decodes counts them.
        opening: Tokens that are kept once for all prompts: none, since what stands in
            a place changes as questions come and go.
    """

    opening = 0

    def __init__(
        self, pads: Tensor, width: int, group: Tensor, *, max_columns: int
    ) -> None:
        self.pads, self.width, self.group = pads, width, group
        self.length = torch.zeros_like(group)
        self.max_columns = max_columns
        self.heads = 0  # query heads of the layer that attended last
        self._attend = attention_on(group.device)
        self._prompts: list[tuple[Tensor, Tensor]] = []
        self._own: list[tuple[Tensor, Tensor]] = []

    @property
    def rows(self) -> int:
        """R."""
        return len(self.group)

    @property
    def layers(self) -> int:
        """Layers that have kept a prompt here."""
        return len(self._prompts)

    @property
    def slabs(self) -> list[Tensor]:
        """All tensors that keys and values are kept in."""
        return [slab for pair in self._prompts + self._own for slab in pair]

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        slabs = [slab for pair in self._prompts for slab in pair]
        return sum(slab[0, :, 0].numel() * slab.itemsize for slab in slabs)

    def write_prompt(
        self, layer: int, questions: slice | Tensor, keys: Tensor, values: Tensor
    ) -> None:
        """Keep the prompt keys and values (g, Hkv, p, D) of some of the questions."""
        _, heads, columns, dim = keys.shape
        if layer == len(self._prompts):
            shape = (len(self.pads), heads, self.width, dim)
            self._prompts.append((keys.new_zeros(shape), keys.new_zeros(shape)))
            shape = (self.rows, heads, self.max_columns, dim)
            self._own.append((keys.new_zeros(shape), keys.new_zeros(shape)))
        for slab, new in zip(self._prompts[layer], (keys, values), strict=True):
            slab[questions, :, self.width - columns :] = new

    def decoding(self) -> SlotCache:
        """What the model's layers are given for one more token of each row."""
        return SlotCache(self)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """``attend`` in one layer: (R, H, D)."""
        self.heads = query.shape[1]
        slabs = (*self._prompts[layer], *self._own[layer])
        held = Held(*slabs, self.group, self.pads, self.length)
        return self._attend(query, key, value, held, scaling=scaling)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but some, (N,), which from now on are 0 to N - 1."""
        self.group, self.length = self.group[rows], self.length[rows]
        for layer, (keys, values) in enumerate(self._own):
            self._own[layer] = keys[rows], values[rows]


class SlotCache(Cache):
    """Receives one new token of every row."""

    def __init__(self, store: SlotStore) -> None:
        super().__init__(layers=[])
        self._store = store

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by the model's layers; ``attend`` keeps what it is given."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """At most: how many there are is known to the device alone."""
        return self._store.width + self._store.max_columns - 1

    def attend(self, layer, query, key, value, scaling) -> Tensor:
        """(R, H, 1, D) to (R, 1, H, D)."""
        new = (states.squeeze(2) for states in (query, key, value))
        return self._store.attend(layer, *new, scaling).unsqueeze(1)

    def advance(self) -> None:
        """Count the new token, after the forward pass."""
        self._store.length += 1

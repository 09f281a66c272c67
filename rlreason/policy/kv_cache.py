"""Keys and values of rollouts in flight, and attention over them.

The sampler keeps the model as transformers built it and plugs in at two points: a
``Cache`` that receives each layer's new keys and values, and an attention function
registered with ``AttentionInterface``. Any decoder of transformers that uses that
interface (Llama, GPT-2, Qwen, Mistral, ...) is served by the same code. (Layers of
Llama take a shorter way to the same two points on a CPU, see ``fused_layers``.)

What is done differently from transformers' own cache, and why:

* The K samples of a question share one copy of its prompt's keys and values. Their
  queries meet the prompt in one matrix product per question, so that the prompt is
  read once a step and not K times. What all prompts of a cohort begin with, such as
  solved examples, is there once for all questions: the *opening*.
* New keys are written in place into a slab with spare columns; nothing is
  concatenated, which would copy the whole cache at every step.
* Samples of a question that have drawn the same tokens so far can share a row. A row
  that splits keeps its place for one part and is copied for the others; rows that have
  ended leave gaps, which these copies or the last rows fill.
* Rows that were started together form a *cohort* and have the same number of tokens,
  so attention to a row's own tokens needs no mask and wastes nothing. Several cohorts
  are decoded in one forward pass: weights are applied to all rows at once, attention
  goes cohort by cohort.

Left out: sliding windows shorter than the sequence, soft-capped scores and attention
sinks. They are refused, not ignored; what else a family may do around its attention is
found out in ``rlreason.policy.passes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache

if TYPE_CHECKING:  # it knows of this module
    from rlreason.policy.slots import SlotStore

ATTENTION_NAME = "rlreason_rollout"
_FIRST_COLUMNS = 32  # slabs start with room for this many tokens, then double


class AttentionError(ValueError):
    """The model's attention is of a kind that is not computed here."""


class CohortStore:
    """Keys and values of one cohort: G prompts and the R rows that answer them.

    For each layer there are the opening (1, Hkv, B, D), prompt slabs (G, Hkv, P, D) and
    own slabs (R, Hkv, C, D) for keys and for values. Hkv is the number of key heads, D
    their width, P the longest prompt without the opening (shorter ones are aligned to
    the right), C the room for own tokens, of which ``length`` columns are filled.

    Args:
        pads: Unused columns at the left of each prompt, (G,), int64.
        width: P.
        group: The question that each row answers, (R,), int64, below G.
        max_columns: Own tokens that a row can come to hold.
        opening: B, the tokens that all prompts begin with and that are kept once.
    """

    def __init__(
        self,
        pads: Tensor,
        width: int,
        group: Tensor,
        *,
        max_columns: int,
        opening: int = 0,
    ) -> None:
        self.group = group
        self.width, self.opening = width, opening
        self.length = 0
        self.rows = self.slab_rows = len(group)
        self.questions = len(pads)
        self._max_columns = max_columns
        self.openings: list[tuple[Tensor, Tensor]] = []
        self._prompt_keys: list[Tensor] = []
        self._prompt_values: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        columns = torch.arange(width, device=pads.device)
        is_pad = columns < pads[:, None]  # (G, P)
        self._is_pad = is_pad if bool(is_pad.any()) else None
        self._bias: Tensor | None = None  # of the scores, (G*Hkv, 1, P)
        self._heads: tuple[int, int] | None = None

    def write_prompt(
        self, layer: int, questions: slice, keys: Tensor, values: Tensor
    ) -> None:
        """Keep the prompt keys and values (g, Hkv, p, D) of some of the questions."""
        _, heads, columns, dim = keys.shape
        if layer == len(self._prompt_keys):
            shape = (self.questions, heads, self.width, dim)
            self._prompt_keys.append(keys.new_zeros(shape))
            self._prompt_values.append(values.new_zeros(shape))
        self._prompt_keys[layer][questions, :, self.width - columns :] = keys
        self._prompt_values[layer][questions, :, self.width - columns :] = values

    @property
    def layers(self) -> int:
        """Layers that have kept a prompt here."""
        return len(self._prompt_keys)

    @property
    def slabs(self) -> list[Tensor]:
        """All tensors that keys and values are kept in."""
        prompts = [*self._prompt_keys, *self._prompt_values]
        return prompts + self._keys + self._values

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        slabs = (*self._prompt_keys, *self._prompt_values)
        return sum(slab[0, :, 0].numel() * slab.itemsize for slab in slabs)

    @property
    def heads(self) -> int:
        """Query heads of the layer that attended last."""
        return self._heads[0]

    def decoding(self) -> DecodeCache:
        """What the model's layers are given for one more token of each row."""
        return DecodeCache([self])

    def make_room(self) -> None:
        """Make sure that one more token fits, before a forward pass."""
        if not self._keys:
            columns = min(_FIRST_COLUMNS, self._max_columns)
            for keys in self._prompt_keys:
                shape = (self.slab_rows, keys.shape[1], columns, keys.shape[3])
                self._keys.append(keys.new_empty(shape))
                self._values.append(keys.new_empty(shape))
        columns = self._keys[0].shape[2]
        if self.length == columns:
            self._resize(self.rows, min(2 * columns, self._max_columns))

    def _resize(self, rows: int, columns: int) -> None:
        """Move the rows in use to slabs of another size, layer by layer."""
        self.slab_rows = rows
        for slabs in (self._keys, self._values):
            for layer, old in enumerate(slabs):
                new = old.new_empty((rows, old.shape[1], columns, old.shape[3]))
                new[: self.rows, :, : self.length] = old[: self.rows, :, : self.length]
                slabs[layer] = new

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write each row's newest key and value (R, Hkv, D) in place."""
        self._keys[layer][: self.rows, :, self.length] = keys
        self._values[layer][: self.rows, :, self.length] = values

    def attend(self, layer: int, query: Tensor, scaling: float) -> Tensor:
        """Attention of each row's newest token to its prompt and its own tokens.

        One softmax runs over all parts, so the result is what a cache with the whole
        sequence would give. With several query heads to a key head, H = Hkv * Q.

        Args:
            layer: Which layer's keys to use.
            query: (R, H, D). The row's own key must have been appended before.
            scaling: Factor of the scores, usually D ** -0.5.

        Returns:
            (R, H, D).
        """
        rows, heads, dim = query.shape
        prompt_keys = self._prompt_keys[layer]
        key_heads = prompt_keys.shape[1]
        shared = heads // key_heads
        if self._heads != (heads, key_heads):
            self._heads = (heads, key_heads)
            self._index_grid()
            self._hide_padding(query.dtype)
        flat = (query * scaling).reshape(rows * heads, dim)

        # To the prompt: one product per question and key head. (G*Hkv, S*Q, P)
        by_question = flat.index_select(0, self._to_grid)
        by_question = by_question.view(self.questions * key_heads, -1, dim)
        keys = self._by_head(prompt_keys).transpose(1, 2)
        if self._bias is None:
            scores = torch.bmm(by_question, keys)
        else:
            scores = torch.baddbmm(self._bias, by_question, keys)
        scores = scores.view(-1, self.width).index_select(0, self._from_grid)
        parts = [scores.view(rows, key_heads, shared, self.width)]
        if self.opening:
            keys = self.openings[layer][0].transpose(2, 3)
            by_row = flat.view(rows, key_heads, shared, dim)
            parts.insert(0, _once_for_all(by_row, keys))

        # To the row's own tokens: one product per row and key head. (R*Hkv, Q, T)
        length = self.length + 1
        keys = self._by_head(self._keys[layer][:rows])[:, :length]
        values = self._by_head(self._values[layer][:rows])[:, :length]
        own = torch.bmm(flat.view(-1, shared, dim), keys.transpose(1, 2))
        parts.append(own.view(rows, key_heads, shared, length))

        weights = torch.cat(parts, dim=-1).softmax(-1, dtype=torch.float32)
        weights = weights.to(query.dtype)  # (R, Hkv, Q, B+P+T)
        to_opening, to_prompt, to_own = weights.split(
            [self.opening, self.width, length], dim=-1
        )
        to_own = to_own.reshape(rows * key_heads, shared, length)
        out = torch.bmm(to_own, values).view(rows * heads, dim)
        to_prompt = to_prompt.flatten(0, 2).index_select(0, self._to_grid)
        to_prompt = to_prompt.view(self.questions * key_heads, -1, self.width)
        from_prompt = torch.bmm(to_prompt, self._by_head(self._prompt_values[layer]))
        out += from_prompt.view(-1, dim).index_select(0, self._from_grid)
        out = out.view(rows, key_heads, shared, dim)
        if self.opening:
            values = self.openings[layer][1]
            out += _once_for_all(to_opening, values)
        return out.reshape(rows, heads, dim)

    @staticmethod
    def _by_head(slab: Tensor) -> Tensor:
        """(N, Hkv, C, D) as (N*Hkv, C, D), without a copy."""
        return slab.view(-1, *slab.shape[2:])

    def _index_grid(self) -> None:
        """Index the rows by question, for the products with the prompts.

        Rows lie in any order, a product per question needs them side by side: a grid
        (G, S), S the most rows that a question has. Places without a row repeat row 0
        and are never read back. ``_to_grid`` lists, for the places of the grid (G, Hkv,
        S, Q), the line of a (R*H, ...) matrix; ``_from_grid`` goes the other way.
        """
        heads, key_heads = self._heads
        shared, group, device = heads // key_heads, self.group, self.group.device
        counts = torch.bincount(group, minlength=self.questions)
        size = int(counts.max())
        order = torch.argsort(group, stable=True)
        starts = counts.cumsum(0) - counts
        place = torch.empty_like(group)
        place[order] = torch.arange(self.rows, device=device) - starts[group[order]]
        grid = group.new_zeros((self.questions, size))
        grid[group, place] = torch.arange(self.rows, device=device)
        head = torch.arange(heads, device=device).view(key_heads, shared)
        self._to_grid = (grid[:, None, :, None] * heads + head[:, None]).flatten()
        product = group[:, None, None] * key_heads + head // shared  # (R, Hkv, Q)
        line = product * size + place[:, None, None]
        self._from_grid = (line * shared + head % shared).flatten()

    def _hide_padding(self, dtype: torch.dtype) -> None:
        """Prepare what is added to the scores: -inf at the padding of prompts."""
        if self._is_pad is not None:
            bias = torch.zeros(
                self._is_pad.shape, dtype=dtype, device=self._is_pad.device
            )
            bias = bias.masked_fill_(self._is_pad, float("-inf"))
            self._bias = bias.repeat_interleave(self._heads[1], dim=0)[:, None]

    def follow(self, parents: Tensor, *, most: int) -> Moves:
        """Let new rows go on from present ones, and forget what nobody goes on from.

        Args:
            parents: The row that each new row goes on from, (N,), int64, ascending.
                One that stands there twice splits; one that is missing has ended, and
                so has a question that none of its rows is left of.
            most: Rows that there can come to be later on.

        Returns:
            Where the new rows lie.
        """
        moves = Moves(parents)
        count, columns = len(parents), self._keys[0].shape[2] if self._keys else 0
        if count > self.slab_rows:  # spare rows, so that not each split moves all
            self._resize(min(count + count // 2, most), columns)
        for slab in (*self._keys, *self._values):
            moves.apply_(slab[:, :, : self.length])
        self.rows, self._heads = count, None
        self.group = self.group[moves.parents]
        if self.rows <= self.slab_rows // 2:
            self._resize(self.rows, columns)
        answered = torch.bincount(self.group, minlength=self.questions).nonzero()
        if len(answered) < self.questions:
            self._keep_questions(answered.squeeze(1))
        return moves

    def _keep_questions(self, kept: Tensor) -> None:
        moves = Moves(kept)
        places = kept.new_zeros(self.questions)
        places[kept] = moves.places
        self.group, self.questions = places[self.group], len(kept)
        for slabs in (self._prompt_keys, self._prompt_values):
            for layer, slab in enumerate(slabs):
                slabs[layer] = moves.apply_(slab)
        if self._is_pad is not None:
            self._is_pad = moves.apply_(self._is_pad)


def _once_for_all(rows: Tensor, shared: Tensor) -> Tensor:
    """Rows (R, Hkv, Q, N) times what all of them share, (1, Hkv, N, M), by key head.

    Returns:
        (R, Hkv, Q, M), of one product for all rows.
    """
    count, key_heads, queries, width = rows.shape
    by_head = rows.transpose(0, 1).reshape(key_heads, count * queries, width)
    product = torch.bmm(by_head, shared[0])  # (Hkv, R*Q, M)
    return product.view(key_heads, count, queries, -1).transpose(0, 1)


class Moves:
    """Where the successors of entries lie, so that few have to be copied.

    The first successor of an entry takes its place. The others, and those of entries
    past the new end, are copied to where an entry has none, or to the end. Nothing is
    written over before it has been read.

    Args:
        parents: Whose successor each is, (N,), int64, ascending.

    Attributes:
        places: Where each of the successors lies, (N,).
        parents: Whose successor lies at each place, (N,).
    """

    def __init__(self, parents: Tensor) -> None:
        count = len(parents)
        stays = parents < count
        stays[1:] &= parents[1:] != parents[:-1]
        kept = parents[stays]
        self.parents = torch.full_like(parents, -1)
        self.parents[kept] = kept
        self._gaps = (self.parents < 0).nonzero().squeeze(1)
        self._sources = parents[~stays]
        self.parents[self._gaps] = self._sources
        self.places = parents.clone()
        self.places[~stays] = self._gaps

    def apply_(self, entries: Tensor) -> Tensor:
        """Move entries (N or more, ...) in place, and return the successors."""
        if len(self._gaps):
            entries.index_copy_(0, self._gaps, entries.index_select(0, self._sources))
        return entries[: len(self.places)]


class OpeningCache(Cache):
    """Receives the keys and values of a forward pass over the opening.

    Args:
        store: Where they are kept.
        mask: True where attention is allowed, (1, 1, B, B).
    """

    def __init__(self, store: CohortStore, mask: Tensor) -> None:
        super().__init__(layers=[])
        self._store, self._mask = store, mask

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by the model's layers, one after the other."""
        self._store.openings.append((key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No token precedes it."""
        return 0

    def attend(self, layer, query, key, value, scaling) -> Tensor:
        """(1, H, B, D) to (1, B, H, D)."""
        return _masked_attention(query, key, value, self._mask, scaling)


class PromptCache(Cache):
    """Receives the keys and values of a forward pass over some of the prompts.

    Args:
        store: Where they are kept.
        questions: Which of the store's questions the pass covers.
        mask: True where attention is allowed, (g, 1, p, B + p).
    """

    def __init__(
        self,
        store: CohortStore | SlotStore,
        questions: slice | Tensor,
        mask: Tensor,
    ) -> None:
        super().__init__(layers=[])
        self._store, self._questions, self._mask = store, questions, mask

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by the model's layers."""
        self._store.write_prompt(layer_idx, self._questions, key_states, value_states)
        if not self._store.opening:
            return key_states, value_states
        new = (key_states, value_states)
        return tuple(
            torch.cat([opening.expand(len(own), -1, -1, -1), own], dim=2)
            for opening, own in zip(self._store.openings[layer_idx], new, strict=True)
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Only the opening precedes what is left of a prompt."""
        return self._store.opening

    def attend(self, layer, query, key, value, scaling) -> Tensor:
        """(g, H, p, D) to (g, p, H, D)."""
        return _masked_attention(query, key, value, self._mask, scaling)


def _masked_attention(query, key, value, mask: Tensor, scaling: float) -> Tensor:
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


class DecodeCache(Cache):
    """Receives one new token of every row of the cohorts, in their order."""

    def __init__(self, stores: Sequence[CohortStore]) -> None:
        super().__init__(layers=[])
        self._stores = stores
        self._sizes = [store.rows for store in stores]
        for store in stores:
            store.make_room()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Called by the model's layers. Keys and values are (R, Hkv, 1, D)."""
        keys = key_states.squeeze(2).split(self._sizes)
        values = value_states.squeeze(2).split(self._sizes)
        for store, key, value in zip(self._stores, keys, values, strict=True):
            store.append(layer_idx, key, value)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows differ in length; positions are passed to the model instead."""
        return max(s.opening + s.width + s.length for s in self._stores)

    def attend(self, layer, query, key, value, scaling) -> Tensor:
        """(R, H, 1, D) to (R, 1, H, D)."""
        parts = [
            store.attend(layer, part, scaling)
            for store, part in zip(
                self._stores, query.squeeze(2).split(self._sizes), strict=True
            )
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(1)

    def advance(self) -> None:
        """Count the new token, after the forward pass."""
        for store in self._stores:
            store.length += 1


def _rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    rollout_cache: Cache | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function that transformers' layers call while we sample."""
    if rollout_cache is None:
        raise AttentionError(
            f"{type(module).__name__} did not pass the rollout cache on to its "
            "attention (or another thread uses the model while it is sampled)"
        )
    if softcap is not None or s_aux is not None:
        raise AttentionError(
            f"{type(module).__name__} uses soft-capped scores or attention sinks, "
            "which are not computed here"
        )
    tokens = rollout_cache.get_seq_length() + query.shape[2]
    # What the cache could hold may be more than a sequence can have
    tokens = min(tokens, getattr(module.config, "max_position_embeddings", tokens))
    if sliding_window is not None and tokens > sliding_window:
        raise AttentionError(
            f"{type(module).__name__} has a sliding window of {sliding_window} tokens, "
            "past which attention is not computed here"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.layer_idx
    return rollout_cache.attend(layer, query, key, value, scaling), None


AttentionInterface.register(ATTENTION_NAME, _rollout_attention)

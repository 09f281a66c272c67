"""What of some sequences goes through a model, and which go through it together.

In a causal model what a token becomes depends on what stands before it alone. So where
many sequences begin alike, as the samples of one question do, and questions after the
same examples, a common beginning needs to go through the model once. ``lay_out`` says
where each token then stands, ``alike_batches`` brings together what begins alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")
Text = tuple[tuple[int, ...], tuple[int, ...]]  # prompt and response

# Looking up common beginnings costs attention a little, so it has to save this share
_SAVES = 0.1


@dataclass(frozen=True)
class Layout:
    """Which tokens of B sequences go through a model, and where they stand.

    Attributes:
        tokens: Ids, (N,): all of them, or those of a common beginning once.
        columns: The place of each in the sequence that it was taken from, (N,).
        order: The sequences as their tokens follow each other, (B,).
        begins: How many tokens a sequence shares with one before it, (B,).
        lengths: Of the sequences, (B,).
        places: Where each token of padded rows (B, L) is among the N; 0 for padding.
    """

    tokens: np.ndarray
    columns: np.ndarray
    order: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    places: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """Tokens that a sequence shares with none before it, (B,)."""
        return self.lengths - self.begins


def in_order(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Put sequences beside each other that begin alike.

    Returns:
        Which sequence comes when, and how many tokens it shares with the one before.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    pairs = pairwise(sequences[i] for i in order)
    alike = [_common(one, other) for one, other in pairs]
    return order, [0, *alike][: len(order)]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Of two sequences: by halves, since tuples are compared quickly."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def opening_of(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with; 0 where it pays too little.

    The last token of each is always its own.
    """
    common = _common(min(sequences), max(sequences))
    common = min(common, min(map(len, sequences)) - 1)
    others = [common] * (len(sequences) - 1)
    return common if begin_alike([*map(len, sequences)], others) else 0


def begin_alike(lengths: Sequence[int], begins: Sequence[int]) -> bool:
    """Whether it pays to let common beginnings go through a model once."""
    return sum(begins) >= _SAVES * sum(lengths)


def lay_out(sequences: Sequence[Sequence[int]]) -> Layout:
    """Decide what of B sequences of token ids goes through a model.

    The last token of each is always its own.
    """
    lengths = np.array([len(ids) for ids in sequences])
    order, alike = in_order(sequences)
    begins = np.zeros_like(lengths)
    if begin_alike(lengths, alike):
        begins[order] = np.minimum(alike, lengths[order] - 1)
    own = lengths - begins
    # What asks little and what asks much is padded apart, so they lie together
    laid = np.argsort(-own, kind="stable") if begins.any() else np.arange(len(own))
    rows = laid.repeat(own[laid])
    ends = own[laid].cumsum()
    columns = np.arange(len(rows)) - (ends - lengths[laid]).repeat(own[laid])
    places = np.zeros((len(own), lengths.max()), np.int64)
    places[rows, columns] = np.arange(len(rows))
    for before, row in pairwise(order):
        places[row, : begins[row]] = places[before, : begins[row]]
    every = (sequences[row][begins[row] :] for row in laid)
    tokens = np.fromiter((token for ids in every for token in ids), np.int64)
    return Layout(tokens, columns, laid, begins, lengths, places)


def micro_batches(
    batch: Sequence[Item], *, max_tokens: int, size: Callable[[Item], int] = len
) -> Iterator[list[Item]]:
    """Cut a batch, sorted by length, so that rows times longest row fits the budget.

    Items of like length go together: padding is computed and thrown away.

    Args:
        batch: Examples of one update, or whatever ``size`` tells the length of.
        max_tokens: Budget in tokens, padding included. A single longer example still
            makes a micro-batch of its own.
        size: Tokens of an item, prompt and response.
    """
    mb: list[Item] = []
    for item in sorted(batch, key=size, reverse=True):
        if mb and size(mb[0]) * (len(mb) + 1) > max_tokens:
            yield mb
            mb = []
        mb.append(item)
    if mb:
        yield mb


def alike_batches(
    batch: Sequence[Item],
    *,
    max_tokens: int,
    text: Callable[[Item], Text],
) -> Iterator[list[Item]]:
    """As ``micro_batches``, but items that begin alike go together where many do.

    Common beginnings count once, since they go through a model once. But attention
    looks at them from each row, which keeps a quarter at most of what a layer keeps of
    a token, and each token of a response has its logits, whoever else begins so. Where
    a micro-batch has next to nothing in common it may be a tenth above the budget.

    Args:
        text: Prompt and response of an item.
    """

    def size(item: Item) -> int:
        return sum(map(len, text(item)))

    order, begins = in_order([sum(text(item), ()) for item in batch])
    if not begin_alike([*map(size, batch)], begins):
        yield from micro_batches(batch, max_tokens=max_tokens, size=size)
        return
    mb: list[Item] = []
    own = longest = told = 0
    for i, begin in zip(order, begins, strict=True):
        length, response = size(batch[i]), len(text(batch[i])[1])
        looked_at = (len(mb) + 1) * max(longest, length) / 4
        if mb and max(own + length - begin, looked_at, told + response) > max_tokens:
            yield mb
            mb, own, longest, told = [], 0, 0, 0
        own += length - (begin if mb else 0)
        longest, told = max(longest, length), told + response
        mb.append(batch[i])
    if mb:
        yield mb


def shares_of(
    batch: Sequence[Item], count: int, text: Callable[[Item], Text]
) -> list[list[Item]]:
    """Cut a batch into shares of about equal work in which items begin alike."""
    tokens = [sum(text(item), ()) for item in batch]
    order, begins = in_order(tokens)
    own = [len(tokens[i]) - begin for i, begin in zip(order, begins, strict=True)]
    done = np.cumsum(own) - np.array(own) / 2  # to the middle of each
    of = np.minimum(done * count // max(1, sum(own)), count - 1) if own else done
    which = dict(zip(order, of, strict=True))
    return [[x for i, x in enumerate(batch) if which[i] == n] for n in range(count)]

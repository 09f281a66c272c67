"""Batches: the examples that one update sees.

A *batch* is the set of examples whose mean loss one optimiser step follows. What goes
through the model at once is a *micro-batch*, see ``policy.layout``. Cutting a batch
into micro-batches must not change its gradient, so every loss is a sum over tokens
divided by the number of response tokens of the whole batch (never a mean of means).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from rlreason.policy.memory import free_bytes, out_of_memory

AnyExample = TypeVar("AnyExample", bound="Example")
Item = TypeVar("Item")
# What a micro-batch may keep for the backward pass: on a CPU larger ones leave its
# cache, on a GPU gradients, and what is not kept, need room beside it
CPU_ROOM = 192 * 2**20
GPU_SHARE = 0.5  # of the free memory


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the response to learn from it, as tokens.

    Attributes:
        prompt_tokens: Ids of the prompt, BOS included where the model has one.
        tokens: Ids of the response, EOS included where it ended by itself.
        weight: Of its loss.
        given: Places in ``tokens`` of what is told and not learned, such as labels.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    weight: float = field(default=1.0, kw_only=True)
    given: tuple[int, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.prompt_tokens) + len(self.tokens)


def in_random_order(
    items: Sequence[Item], batch_size: int, seed: int
) -> Iterator[list[Item]]:
    """Cut items into batches in an order that the seed decides; the last is smaller."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(items), generator=generator).tolist()
    for start in range(0, len(order), batch_size):
        yield [items[i] for i in order[start : start + batch_size]]


def response_token_count(batch: Sequence[Example]) -> int:
    """The number of tokens a loss of this batch is divided by."""
    return sum(len(example.tokens) - len(example.given) for example in batch)


def tokens_that_fit(
    loss: Callable[[list[AnyExample]], Tensor], examples: Sequence[AnyExample]
) -> int:
    """How many tokens a micro-batch may have, by what the longest example keeps.

    What is kept for the backward pass grows with the tokens, so it is measured on one
    example: weights, which are there anyway, do not count. On a CPU the answer depends
    on model and example alone, so a resumed run cuts as before.

    Args:
        loss: Of a micro-batch.
        examples: Of which the longest is tried; no gradient is added.
    """
    longest = max(examples, key=len)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            device = loss([longest]).device
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return len(longest)  # whoever learns it will say so, and what to do
    room = GPU_SHARE * free_bytes(device) if device.type == "cuda" else CPU_ROOM
    return max(1, int(room * len(longest) / max(1, sum(kept.values()))))

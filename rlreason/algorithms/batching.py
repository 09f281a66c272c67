"""Batches: the examples that one update sees.

A *batch* is the set of examples whose mean loss one optimiser step follows. What goes
through the model at once is a *micro-batch*, see ``policy.logprobs``. Cutting a batch
into micro-batches must not change its gradient, so every loss is a sum over tokens
divided by the number of response tokens of the whole batch (never a mean of means).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the response to learn from it, as tokens.

    Attributes:
        prompt_tokens: Ids of the prompt, BOS included where the model has one.
        tokens: Ids of the response, EOS included where it ended by itself.
        weight: Of its loss.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    weight: float = field(default=1.0, kw_only=True)

    def __len__(self) -> int:
        return len(self.prompt_tokens) + len(self.tokens)


def shuffled_batches(
    examples: Sequence[Example], *, batch_size: int, seed: int, epoch: int
) -> Iterator[list[Example]]:
    """Cut one epoch into batches in an order that (seed, epoch) alone decides.

    The last batch is smaller where ``batch_size`` does not divide the examples; none is
    left out.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    for start in range(0, len(order), batch_size):
        yield [examples[i] for i in order[start : start + batch_size]]


def response_token_count(batch: Sequence[Example]) -> int:
    """The number of tokens a loss of this batch is divided by."""
    return sum(len(example.tokens) for example in batch)

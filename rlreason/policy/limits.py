"""Lengths past which a model may compute something else.

A configuration says in many words where attention begins to forget, positions are
stretched, or a table ends. Each number in it is taken for such a limit, unless its name
says that it is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

# Numbers of a configuration that are no number of tokens, for sure
_NO_LENGTHS = re.compile(
    r"num_.*|n_(embd|inner|head|layer)|.*_token_id|(vocab|hidden|intermediate)_size|"
    r"head_dim|d_model"
)


def limits_of(config: PreTrainedConfig) -> set[int]:
    """All numbers of tokens at which the model may begin to compute something else."""

    def numbers(value: object) -> Iterator[int]:
        if isinstance(value, dict):
            for key, item in value.items():
                if not _NO_LENGTHS.fullmatch(str(key)):
                    yield from numbers(item)
        elif isinstance(value, list | tuple):
            for item in value:
                yield from numbers(item)
        elif isinstance(value, int) and value > 1:
            yield int(value)

    return set(numbers(config.get_text_config().to_dict()))


def below(tokens: int, limits: set[int]) -> list[int]:
    """The limits that so many tokens come past, and 0."""
    return [0, *(limit for limit in limits if limit < tokens)]


def telling_length(tokens: int, limits: set[int], *, least: int) -> int:
    """How long a sequence has to be for what is past those limits to be seen in it.

    Twice as long as the largest of them: what attention forgets of a sequence is then
    half of it, and not lost in the rounding of half precision. Up to the next limit.
    """
    beyond = min((limit for limit in limits if limit >= tokens), default=2**31)
    return min(max(least, 2 * max(below(tokens, limits))), beyond)


def rounding(dtype: torch.dtype) -> float:
    """How far apart, relatively, rounding may bring what is computed in two ways.

    Norms, and at times attention, are in float32 where weights are in float64.
    """
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5

"""How many rows the sampler may have in flight, by a budget in bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlreason.policy.memory import free_bytes
from rlreason.policy.passes import Checked

PREFILL_TOKENS = 8192  # prompt tokens in one forward pass, bounds its activations
REFILL_BELOW = 0.5  # admit new work when fewer rows than this share are in flight


@dataclass(frozen=True)
class Costs:
    """What rows and prompts take of the budget, in bytes."""

    token: int  # keys and values of one token in all layers
    row: int  # a row with its own tokens and its share of the logits
    score: int  # attention of a row to one token, in the layer at work

    @classmethod
    def of(cls, model: Checked, max_new_tokens: int) -> Costs:
        # Logits as the model gives them, divided by the temperature, their softmax, and
        # its cumulative sum in float64.
        logits = model.logits * (4 + 4 + 4 + 8)
        records = 12 * max_new_tokens
        score = 16 * model.heads  # by question and by row, joined, and their softmax
        row = (model.token_bytes + score) * max_new_tokens + logits + records
        return cls(token=model.token_bytes, row=row, score=score)

    def of_request(self, width: int, rows: int) -> int:
        """One question with a prompt of ``width`` tokens."""
        return self.token * width + (self.row + self.score * width) * rows

    def rows_within(self, budget: int, width: int) -> int:
        """Rows of one question that fit.

        Raises:
            ValueError: If there is none.
        """
        rows = (budget - self.token * width) // (self.row + self.score * width)
        if rows < 1:
            need = self.of_request(width, 1)
            raise ValueError(
                f"byte_budget={budget:,} does not hold one row, which needs {need:,} "
                "bytes. Raise byte_budget or lower max_new_tokens."
            )
        return rows


def default_budget(device: torch.device) -> int:
    """1 GiB on a CPU, and half of what is free on a GPU."""
    return free_bytes(device) // 2 if device.type == "cuda" else 2**30

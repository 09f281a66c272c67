"""Tokens that are put into an answer and not drawn: a label before each of its steps.

A policy of return-conditioned RL is told by a label what is expected of the step after
it. The sampler puts it there in the same pass that draws the others: where a step has
ended the next token is no draw but the label, with the log-probability 0.0 of what is
certain to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlreason.policy.load import Policy, positions_of, vocabulary_rows


@dataclass(frozen=True, eq=False)
class Forced:
    """What is put before each step but the first, and where steps end.

    A step ends with a token that holds a newline, as soon as the step has anything to
    be seen: a blank line belongs to the step after it, as in ``step_spans``.

    Attributes:
        token: What is put there.
        newline: Which tokens hold a newline, (V,), bool.
        visible: Which hold more than white space, (V,), bool.
        draws: Tokens of an answer that are drawn, at most.
        positions: Of the model, or None without a limit. An answer that labels make
            longer than that is cut.
    """

    token: int
    newline: Tensor
    visible: Tensor
    draws: int
    positions: int | None

    @classmethod
    def of(cls, policy: Policy, token: int, draws: int) -> Forced:
        """The rule of a policy's vocabulary: rows without a token hold nothing."""
        rows = vocabulary_rows(policy.model)
        texts = policy.decode_batch([[i] for i in range(len(policy.tokenizer))])
        texts = (texts + [""] * rows)[:rows]
        newline, visible = (
            torch.tensor(found, device=policy.device)
            for found in (["\n" in t for t in texts], [bool(t.strip()) for t in texts])
        )
        return cls(token, newline, visible, draws, positions_of(policy.model))

    def longest(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens of an answer at most, if its steps are as short as can be."""
        shortest = 1 if bool((self.newline & self.visible).any()) else 2
        most = self.draws + (self.draws - 1) // shortest
        if self.positions is None:
            return most
        return min(most, self.positions - min(map(len, prompts)))


class Forcing:
    """Where S samples stand: whether a token is to be put, and how many may come.

    Attributes:
        due: Whether the next token of a sample is put and not drawn, (S,), bool.
        seen: Whether its step has anything to be seen, (S,), bool.
        left: How many tokens it may still draw, (S,).
        room: How many it may still have, those that are put included, (S,).
    """

    def __init__(self, forced: Forced, samples: int) -> None:
        self.forced = forced
        self.due = torch.zeros(samples, dtype=torch.bool, device=forced.newline.device)
        self.seen = self.due.clone()
        self.left = torch.zeros_like(self.due, dtype=torch.int64)
        self.room = self.left.clone()

    def begin(self, rows: Tensor, lengths: Tensor) -> None:
        """Start samples whose prompts have so many tokens, (S,)."""
        most = self.forced.positions
        self.due[rows], self.seen[rows] = False, False
        self.left[rows] = self.forced.draws
        self.room[rows] = 2 * self.forced.draws if most is None else most - lengths

    def put(
        self, rows: Tensor | slice, tokens: Tensor, logprobs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put tokens in the place of those that were drawn where they are due.

        Returns:
            Tokens (S,), their log-probabilities (S,), and who may have no more (S,).
        """
        forced, due = self.forced, self.due[rows]
        tokens = torch.where(due, forced.token, tokens)
        logprobs = torch.where(due, 0.0, logprobs)
        seen = (self.seen[rows] | forced.visible[tokens]) & ~due
        self.left[rows] -= (~due).long()
        self.room[rows] -= 1
        self.seen[rows] = seen
        self.due[rows] = forced.newline[tokens] & seen  # ``due`` may be a view of it
        return tokens, logprobs, (self.left[rows] <= 0) | (self.room[rows] <= 0)

    def keep(self, rows: Tensor) -> None:
        """Forget all samples but some."""
        for name in ("due", "seen", "left", "room"):
            setattr(self, name, getattr(self, name)[rows])

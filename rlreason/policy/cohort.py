"""The samples that the sampler has in flight: what they drew, and which row each has.

A *sample* is one answer to one question. A *row* is one line of a forward pass, with
its keys and values in a ``CohortStore``. Samples of a question that have drawn the same
tokens so far can share a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlreason.policy.engine import Answer, Request
from rlreason.policy.forced import Forced, Forcing
from rlreason.policy.kv_cache import CohortStore
from rlreason.policy.layout import opening_of
from rlreason.policy.passes import NOT_FINITE

NOTHING = -1  # in the records, after a sample has ended


class Cohort:
    """Samples that were started together and have drawn the same number of tokens.

    ``drawn`` counts them. Tensors are (S,), S being the samples still in flight.
    ``home`` says which line of the records (S at the start, limit) is a sample's, and
    ``row`` which of the store's rows it has: samples that have drawn the same tokens
    can share one, which stands for all of them in the forward pass.

    Args:
        requests: Whose samples.
        limit: Tokens of a sample.
        forced: What stands before each step and is not drawn.
    """

    def __init__(
        self,
        requests: list[Request],
        *,
        limit: int,
        device: torch.device,
        forced: Forced | None = None,
    ) -> None:
        self.requests = requests
        sizes = torch.tensor([len(r.keys) for r in requests], device=device)
        lengths = torch.tensor([len(r.prompt) for r in requests], device=device)
        questions = torch.arange(len(requests), device=device)
        self.owner = torch.repeat_interleave(questions, sizes)  # whose request, by line
        self.answered: set[int] = set()  # requests
        self.row = self.owner  # that of the question
        self.home = torch.arange(len(self.row), device=device)
        opening = opening_of([request.prompt for request in requests])
        width = max(len(request.prompt) for request in requests) - opening
        self.store = CohortStore(
            width + opening - lengths,
            width,
            questions,
            max_columns=max(limit - 1, 1),
            opening=opening,
        )
        self.limit, self.drawn = limit, 0
        self.position = lengths  # of a row's newest token, (R,)
        self.stream = torch.tensor(
            [key for request in requests for key in request.keys], device=device
        )
        self.last = torch.zeros_like(self.home)
        self.done = torch.zeros_like(self.home, dtype=torch.bool)
        self.forcing = forced and Forcing(forced, len(self.home))
        if self.forcing:
            self.forcing.begin(self.home, lengths[self.row])
        records = (len(self.home), limit)
        self.tokens = torch.full(records, NOTHING, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(records, device=device)

    @property
    def samples(self) -> int:
        return len(self.home)

    @property
    def rows(self) -> int:
        return self.store.rows

    def record(self, tokens: Tensor, logprobs: Tensor, ends: tuple[int, ...]) -> None:
        """Write down what each sample drew, both (S,), or was given."""
        if self.forcing:
            every = slice(None)
            tokens, logprobs, full = self.forcing.put(every, tokens, logprobs)
            self.done |= full
        self.tokens[self.home, self.drawn] = tokens
        self.logprobs[self.home, self.drawn] = logprobs
        for end in ends:
            self.done |= tokens == end
        self.last = tokens
        self.drawn += 1

    def newest(self) -> Tensor:
        """Each row's newest token, (R,), when its samples have drawn the same."""
        return self.last.new_zeros(self.rows).index_copy_(0, self.row, self.last)

    def splits(self) -> bool:
        """Whether samples of one row have drawn different tokens."""
        if self.rows == self.samples:  # known without a look at the device
            return False
        return bool((self.newest()[self.row] != self.last).any())

    def regroup(self) -> None:
        """Take finished samples out, at least one is left, and give the others rows.

        The newest token goes beside the row that it was drawn from: each of these
        pairs that is there, once or more often, is a row from now on.
        """
        going = (~self.done).nonzero().squeeze(1)
        self.home, self.stream = self.home[going], self.stream[going]
        self.last, self.done = self.last[going], self.done[going]
        if self.forcing:
            self.forcing.keep(going)
        pairs, which = torch.unique(
            (self.row[going] << 32) + self.last, return_inverse=True
        )
        moves = self.store.follow(pairs >> 32, most=len(going))
        self.row = moves.places[which]
        self.position = self.position[moves.parents]

    def leave(self) -> list[int]:
        """The requests that have no sample in flight any more; each is told once."""
        counts = torch.zeros(len(self.requests), dtype=torch.int64)
        if self.drawn < self.limit and not bool(self.done.all()):
            going = self.owner[self.home[~self.done]]
            counts = torch.bincount(going, minlength=len(self.requests))
        left = set((counts == 0).nonzero().flatten().tolist()) - self.answered
        self.answered |= left
        return sorted(left)

    def answers(self, ended: Sequence[int], ends: tuple[int, ...]) -> list[Answer]:
        """What the samples of requests said that have left.

        Raises:
            ValueError: If the model's outputs are not finite numbers.
        """
        lines = torch.isin(self.owner, self.owner.new_tensor(ended))
        if not bool(self.logprobs[lines].isfinite().all()):
            raise ValueError(NOT_FINITE)
        tokens = self.tokens[lines, : self.drawn].tolist()
        logprobs = self.logprobs[lines, : self.drawn].tolist()
        owners = [
            (self.requests[i], number)
            for i in ended
            for number in self.requests[i].numbers
        ]
        answers = []
        for (request, number), ids, logps in zip(owners, tokens, logprobs, strict=True):
            length = ids.index(NOTHING) if NOTHING in ids else len(ids)
            answers.append(
                Answer(
                    problem=request.problem,
                    sample=number,
                    prompt=request.prompt,
                    tokens=tuple(ids[:length]),
                    logprobs=tuple(logps[:length]),
                    finished=ids[length - 1] in ends,
                )
            )
        return answers

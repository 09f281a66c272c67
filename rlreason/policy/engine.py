"""What an engine of the sampler is asked, what it answers, and how it is begun.

There are two, ``cohort_engine`` for a CPU and ``slot_engine`` for a GPU. They differ in
what they keep in flight, and share the queue, the budget and what happens where memory
ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rlreason.policy.budget import PREFILL_TOKENS, Costs, default_budget
from rlreason.policy.forced import Forced
from rlreason.policy.load import Policy
from rlreason.policy.progress import tell
from rlreason.policy.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Request:
    """Some of the samples of one problem, admitted together."""

    problem: int  # index in the caller's list
    prompt: tuple[int, ...]
    numbers: Sequence[int]  # which samples
    keys: Sequence[int]  # start of each sample's random stream

    def cut(self, count: int) -> tuple[Request, Request | None]:
        """The first so many samples, and the others if there are any."""
        first, rest = (
            replace(self, numbers=self.numbers[part], keys=self.keys[part])
            for part in (slice(count), slice(count, None))
        )
        return first, rest if rest.keys else None


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished or truncated sample."""

    problem: int
    sample: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: bool

    def rollout(self, problem_id: str, text: str) -> Rollout:
        return Rollout(
            problem_id=problem_id,
            sample=self.sample,
            prompt_tokens=self.prompt,
            tokens=self.tokens,
            logprobs=self.logprobs,
            text=text,
            finished=self.finished,
        )


class Engine(ABC):
    """Takes requests, keeps samples in flight, gives answers.

    Args:
        policy: Who answers.
        costs: Of its rows, in bytes.
        temperature: As in ``sample``, like ``byte_budget``.
        limit: Tokens of an answer.
        forced: What stands before each step and is not drawn.
    """

    store: type  # where keys and values are kept, which says how the model is checked

    def __init__(
        self,
        policy: Policy,
        *,
        costs: Costs,
        temperature: float,
        limit: int,
        byte_budget: int | None,
        forced: Forced | None,
    ) -> None:
        self.model, self.device = policy.model, policy.device
        self.pad_id = policy.pad_id
        self.ends = policy.eos_ids
        self.temperature = temperature
        self.limit, self.forced = limit, forced
        self.costs = costs
        if byte_budget is None:
            byte_budget = default_budget(policy.device)
        self.budget = byte_budget
        self.prefill_tokens = PREFILL_TOKENS
        self.queue: deque[Request] = deque()

    @abstractmethod
    def ask(self, request: Request) -> None:
        """Queue some samples of one problem."""

    @abstractmethod
    def run(self) -> Iterator[list[Answer]]:
        """Decode until the queue is empty; yields answers as they come."""

    @abstractmethod
    def give_up(self) -> list[Request]:
        """Forget what is in flight, and say what was asked."""

    def halve(self) -> None:
        """Begin what is in flight again, in half of the memory.

        Raises:
            ValueError: That does not hold one row.
        """
        self.budget //= 2
        self.prefill_tokens = max(1, self.prefill_tokens // 2)
        tell(f"out of memory: sampling goes on with {self.budget:,} bytes")
        again = [*self.give_up(), *self.queue]
        self.queue.clear()
        for request in again:
            self.ask(request)

"""A toy task that a tiny policy learns in a second, and a recorder in memory.

Each question has the answer 2 or 3. The policy that the toy starts from gives both to
every question, by two sequences of operations and in two wordings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

from tiny_models import tiny_policy
from torch import Tensor

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import FinetuneSettings, finetune
from rlreason.algorithms.recorder import Checkpoint
from rlreason.policy.load import Policy
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt, format_response


def toy_solutions(answer: int) -> list[str]:
    """Three solutions: the first two differ in words, the third in its operations."""
    return [
        f"<<1+{answer - 1}={answer}>>\n#### {answer}",
        f"So <<1+{answer - 1}={answer}>>\n#### {answer}",
        f"<<5-{5 - answer}={answer}>>\n#### {answer}",
    ]


TOY_PROBLEMS = [
    Problem(f"toy/{name}", f"{name}?", toy_solutions(answer)[0], str(answer))
    for name, answer in zip("abcdef", (2, 3, 2, 3, 2, 3), strict=True)
]


def examples_of(
    policy: Policy, problem: Problem, solutions: Sequence[str]
) -> list[Example]:
    """Each of ``solutions`` as an answer to ``problem``, in tokens."""
    prompt = format_prompt(problem)
    return [
        Example(
            tuple(policy.encode_prompt(prompt)),
            tuple(policy.encode_response(prompt, format_response(solution))),
        )
        for solution in solutions
    ]


@lru_cache(maxsize=1)
def toy_policy() -> Policy:
    """Gives 2 and 3 with about equal chances, whatever is asked. Not to be changed."""
    policy = tiny_policy()
    examples = [
        example
        for problem in TOY_PROBLEMS
        for example in examples_of(policy, problem, toy_solutions(2) + toy_solutions(3))
    ]
    settings = FinetuneSettings(
        epochs=25, batch_size=len(examples), lr=2e-2, lr_floor=1e-3, warmup=0.1
    )
    return finetune(policy, examples, settings)


class InterruptedRunError(Exception):
    """What ``Memory`` raises in place of a kill."""


class Memory:
    """A recorder that behaves as a run folder does, without the disk.

    Args:
        save_every: Rows from one checkpoint to the next one that is due.
        die_at: The row, counted over all sessions, before which it raises; once.
    """

    def __init__(self, *, save_every: int = 1, die_at: int | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.save_every, self.die_at = save_every, die_at
        self.saved: tuple[dict[str, Tensor], str, int] | None = None

    def log(self, **metrics: Any) -> None:
        if len(self.rows) == self.die_at:
            self.die_at = None
            raise InterruptedRunError
        self.rows.append(metrics)

    def clock(self, stage: str) -> nullcontext[None]:
        return nullcontext()

    def due(self) -> bool:
        return len(self.rows) - (self.saved[2] if self.saved else 0) >= self.save_every

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.saved = own, json.dumps(state), len(self.rows)

    def restore(self) -> Checkpoint | None:
        if self.saved is None:
            self.rows.clear()
            return None
        tensors, state, rows = self.saved
        del self.rows[rows:]
        return Checkpoint(tensors, json.loads(state))


def weights(policy: Policy) -> dict[str, Tensor]:
    """A copy of a policy's weights."""
    return {name: t.clone() for name, t in policy.model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return one.keys() == other.keys() and all(
        one[name].equal(other[name]) for name in one
    )

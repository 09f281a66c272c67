"""What an algorithm asks of the place it is run in: log, save, restore.

Algorithms know this protocol and nothing of folders, so that they can be called bare
in a notebook (``Recorder``, or ``MemoryRecorder`` to see what it logged) and be
stopped and taken up again in a batch (``rlreason.runs.folder.RunFolder``). An algorithm
that is a part of another one gets a ``NestedRecorder``.

The contract of a resumable algorithm, which is what makes a killed run equal an
undisturbed one, on a CPU to the bit:

1. It begins with ``checkpoint = recorder.restore()``. Where there is one, *everything*
   that decides what follows comes from it: weights, optimiser, position in the data,
   random generators.
2. It calls ``log`` with the kind of a row (``update``, ``round``, ``phase``, ...) and
   numbers that follow from settings and seed alone. Seconds,
   rates and memory are the recorder's to add: they differ from run to run. So an
   algorithm wraps its stages in ``clock`` and does not look at a clock itself.
3. It calls ``save`` between two steps when ``due()`` says so. What it returns at the
   end is the caller's to keep. Metrics logged after the last save are taken back on
   resume, and logged again.
4. What it samples for longer than a job may run, it samples with ``keep_groups`` as the
   keeper. The next ``save`` must hold what came of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlreason.policy.parallel import Group
from rlreason.policy.sampler import Asked, Draw


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a run needs to go on.

    Attributes:
        tensors: Weights, optimiser moments, generator states (``uint8``), by name, on
            the CPU.
        state: What is no tensor, as JSON holds it: counters, names, lists. Tuples come
            back as lists, and keys as strings.
    """

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, by the rest of their names."""
        named = self.tensors.items()
        return {name[len(prefix) :]: t for name, t in named if name.startswith(prefix)}


def pack_lists(
    name: str,
    lists: Iterable[Sequence[float]],
    *,
    dtype: torch.dtype = torch.int64,
) -> dict[str, Tensor]:
    """N lists of unlike length as tensors of a checkpoint: ``unpack_lists`` undoes it.

    Returns:
        All numbers one after the other under ``name``, and under ``name`` with
        ``.length`` how many of them belong to each list, (N,).
    """
    lists = list(lists)
    return {
        name: torch.tensor([x for values in lists for x in values], dtype=dtype),
        f"{name}.length": torch.tensor([len(v) for v in lists], dtype=torch.int64),
    }


def unpack_lists(name: str, tensors: Mapping[str, Tensor]) -> list[tuple]:
    """The lists that ``pack_lists`` put under ``name``, as tuples of numbers."""
    lengths = tensors[f"{name}.length"].tolist()
    return [tuple(part.tolist()) for part in tensors[name].split(lengths)]


class Recorder:
    """Where a run writes to, seen from the algorithm. This one keeps nothing: for
    notebooks and tests that call an algorithm directly."""

    def log(self, kind: str, **metrics: Any) -> None:
        """Append one row: what kind of row it is, and numbers or strings."""

    def clock(self, stage: str) -> AbstractContextManager[None]:
        """Count the seconds of the block under the name of a stage."""
        return nullcontext()

    def due(self) -> bool:
        """True when so much time has passed that losing it would hurt: time to save."""
        return False

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep ``tensors`` and ``state``, wholly or not at all."""

    def restore(self) -> Checkpoint | None:
        """Return what was saved last, or None where a run starts from nothing."""
        return None

    def keep_groups(
        self, asked: Asked, draw: Draw, own: Sequence[int]
    ) -> Iterator[Group]:
        """Be the ``keeper`` of ``policy.sampler.sample``: keep groups as they finish.

        A run that is stopped before its next ``save`` draws only what it lacks.
        """
        yield from draw(own)


def last_checkpoint(recorder: Recorder, unit: str, saved: int) -> str:
    """What is left of a training that has broken off, in words.

    Args:
        unit: What is counted, e.g. ``"phase"``.
        saved: How many were done at the last checkpoint; 0 where there was none.
    """
    if not saved:
        return "no checkpoint of this training had been taken yet"
    return f"the last good checkpoint, after {unit} {saved}, is kept in {recorder!r}"


class MemoryRecorder(Recorder):
    """Keeps rows in memory.

    Attributes:
        rows: What was logged, each with its ``kind``.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, kind: str, **metrics: Any) -> None:
        """Append the row."""
        self.rows.append({"kind": kind, **metrics})


class NestedRecorder:
    """What a part of an algorithm writes to: it goes on into the recorder of the whole.

    Args:
        outer: The recorder of the whole.
        saved: Where the part goes on from; None: it begins.
        tensors: What the whole needs to go on, added to each checkpoint of the part.
        state: The same, of what is no tensor.
        labels: Added to each row, e.g. ``round=2``.
    """

    def __init__(
        self,
        outer: Recorder,
        *,
        saved: Checkpoint | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        state: Mapping[str, Any] | None = None,
        **labels: Any,
    ) -> None:
        self.outer, self.saved, self.labels = outer, saved, labels
        self.tensors, self.state = dict(tensors or {}), dict(state or {})
        self.clock, self.due = outer.clock, outer.due

    def __repr__(self) -> str:
        return repr(self.outer)

    def log(self, kind: str, **metrics: Any) -> None:
        """Append the row, with its labels, to those of the whole."""
        self.outer.log(kind, **self.labels, **metrics)

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep part and whole together."""
        self.outer.save(self.tensors | tensors, self.state | state)

    def restore(self) -> Checkpoint | None:
        """Return where the part goes on from, with what the whole had added."""
        return self.saved

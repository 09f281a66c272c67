"""What an algorithm asks of the place it is run in: log, save, restore.

Algorithms know this protocol and nothing of folders, so that they can be called bare
in a notebook (``NullRecorder``) and be stopped and taken up again in a batch
(``rlreason.runs.folder.RunFolder``).

The contract of a resumable algorithm, which is what makes a killed run equal an
undisturbed one to the bit:

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
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


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


@runtime_checkable
class Recorder(Protocol):
    """Where a run writes to, seen from the algorithm."""

    def log(self, kind: str, **metrics: Any) -> None:
        """Append one row: what kind of row it is, and numbers or strings."""

    def clock(self, stage: str) -> AbstractContextManager[None]:
        """Count the seconds of the block under the name of a stage."""

    def due(self) -> bool:
        """True when so much time has passed that losing it would hurt: time to save."""

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep ``tensors`` and ``state``, wholly or not at all."""

    def restore(self) -> Checkpoint | None:
        """Return what was saved last, or None where a run starts from nothing."""


class NullRecorder:
    """Keeps nothing: for notebooks and tests that call an algorithm directly."""

    def log(self, kind: str, **metrics: Any) -> None:
        """Drop the row."""

    def clock(self, stage: str) -> AbstractContextManager[None]:
        """Count nothing."""
        return nullcontext()

    def due(self) -> bool:
        """Return False, since there is nowhere to save to."""
        return False

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Drop the checkpoint."""

    def restore(self) -> Checkpoint | None:
        """Return None: every run starts from nothing."""
        return None

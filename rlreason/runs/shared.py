"""The run folder of several processes: the first writes, all read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlreason.policy.parallel import agreed, rank, wait
from rlreason.runs.folder import RunFolder


class SharedRun(RunFolder):
    """A run that several processes make together, in a folder that all can read.

    Each call is made by all of them, except for what is read.
    """

    def __enter__(self) -> SharedRun:
        """The first process takes the folder; then all go on."""
        if rank() == 0:
            super().__enter__()
        wait()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        """The first process lets it go; after an error nobody waits for the others."""
        if rank() == 0:
            super().__exit__(kind, error, _)
        if error is None:
            wait()

    def log(self, kind: str, **metrics: Any) -> None:
        """Only the first process writes."""
        if rank() == 0:
            super().log(kind, **metrics)

    def due(self) -> bool:
        """When the first process's is."""
        return agreed(rank() == 0 and super().due())

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Only the first process writes."""
        if rank() == 0:
            super().save(tensors, state)

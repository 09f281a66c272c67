"""The run folder of several processes: the first writes, all read.

What each of them samples it keeps there itself.
"""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from rlreason.policy.parallel import gathered, rank, wait
from rlreason.runs.folder import RunFolder
from rlreason.runs.stopping import heeding


class SharedRun(RunFolder):
    """A run that several processes make together, in a folder that all can read.

    Each call is made by all of them, except for what is read. Where one is asked to
    end, all end at the same checkpoint.
    """

    def __enter__(self) -> SharedRun:
        """The first process takes the folder; then all go on."""
        self._heeding = heeding()
        self._stop = self._heeding.__enter__()
        self._start_clock()
        if rank() == 0:
            super().__enter__()
        wait()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        """The first process lets it go; after an error nobody waits for the others."""
        self._heeding.__exit__(kind, error, _)
        if rank() == 0:
            super().__exit__(kind, error, _)
        if error is None:
            wait()

    def _require_open(self) -> None:
        if rank() == 0:
            super()._require_open()

    def log(self, kind: str, **metrics: Any) -> None:
        """Only the first process writes."""
        if rank() == 0:
            super().log(kind, **metrics)

    def due(self) -> bool:
        """When the first process's is, or one is asked to end."""
        found = gathered([self._stop.asked, rank() == 0 and super().due()])
        self._stop.asked = any(asked for asked, _ in found)
        return self._stop.asked or any(due for _, due in found)

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Only the first process writes, and drops what all have sampled before."""
        if rank() == 0:
            super().save(tensors, state)
        self._stop.obey()
        wait()
        self._saved_at = time.monotonic()  # of all of them

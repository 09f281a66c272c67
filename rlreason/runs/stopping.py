"""A run that is asked to end (SIGTERM) takes a checkpoint first.

Schedulers send SIGTERM when a job's time is over, or when its machine is wanted for
another, and kill it some seconds later. A second SIGTERM is not waited for.

The work between two moments at which what is done can be kept (an update, a phase of
PPO, the samples of one question in a round of expert iteration) is not cut: where it
takes longer than the scheduler waits, it is lost, as after any kill.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM  # as shells have it: 143


class Stopped(SystemExit):
    """Ends this process since it was asked to."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)

    def __str__(self) -> str:
        return "asked to end by SIGTERM"


class Stop:
    """What is done at SIGTERM: it is noted, and the second one ends the process.

    Attributes:
        asked: Whether one has come.
    """

    asked = False

    def __call__(self, number: int, frame: object) -> None:
        """Be the handler of the signal."""
        if self.asked:
            raise Stopped
        self.asked = True

    def obey(self) -> None:
        """End the process, where it was asked to."""
        if self.asked:
            raise Stopped


@contextmanager
def heeding() -> Iterator[Stop]:
    """Note a SIGTERM within the block; leave it to whoever handles it already.

    Blocks within blocks share what they know. Threads other than the main one are not
    told of signals.
    """
    before = signal.getsignal(signal.SIGTERM)
    here = threading.current_thread() is threading.main_thread()
    if isinstance(before, Stop):
        yield before
    elif before is not signal.SIG_DFL or not here:
        yield Stop()
    else:
        stop = Stop()
        signal.signal(signal.SIGTERM, stop)
        try:
            yield stop
        finally:
            signal.signal(signal.SIGTERM, before)

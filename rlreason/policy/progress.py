"""Progress with rate and time left: a bar where somebody watches, lines in a log.

``progress_bar`` shows a bar in a terminal and in Jupyter. Where the output is no
terminal (logs, pipes, batch systems) it writes a line at the start, at most one a
minute, and one at the end, to stderr. Work inside other work has a bar of its own but
no lines. Under ``RLREASON_QUIET=1``, which the papermill runner sets, there is neither:
a notebook's output would fill with frames of a bar that nobody saw move.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm.auto import tqdm

SECONDS_BETWEEN_LINES = 60.0

_depth: ContextVar[int] = ContextVar("depth", default=0)  # of work inside work


def is_watched() -> bool:
    """Whether a person sees the output as it comes.

    ``RLREASON_QUIET=1`` in the environment says no, whatever the surroundings; the
    papermill runner sets it, since a kernel cannot tell who drives it.
    """
    if os.environ.get("RLREASON_QUIET"):
        return False
    return sys.stderr.isatty() or in_notebook()


def tell(line: str) -> None:
    """Write a line to stderr, also where it is a log; not with ``RLREASON_QUIET=1``."""
    if not os.environ.get("RLREASON_QUIET"):
        print(line, file=sys.stderr, flush=True)


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


class Progress:
    """Counts units of work; ``update`` moves its bar, and writes a line when due."""

    def __init__(
        self,
        bar: tqdm,
        name: str,
        unit: str,
        *,
        write: Callable[[str], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self.bar, self.name, self.unit = bar, name, unit
        self.write, self.clock = write, clock
        self.total, self.done, self.first = bar.total, bar.n, bar.n
        self.numbers: dict[str, float] = {}
        self.start = clock()
        self.tell()

    def update(self, n: int = 1, **numbers: float) -> None:
        """Count ``n`` more units, and show ``numbers`` (a loss, an accuracy) beside."""
        self.done += n
        self.numbers.update(numbers)
        self.bar.set_postfix(self.numbers, refresh=False)
        self.bar.update(n)
        if (
            self.done < self.total
            and self.clock() - self.last_line >= SECONDS_BETWEEN_LINES
        ):
            self.tell()

    def tell(self) -> None:
        """Write where the work stands, where there are lines."""
        self.last_line = self.clock()
        if self.write is not None:
            self.write(self.line())

    def line(self) -> str:
        """Where the work stands: done, numbers, rate, and time left or taken."""
        parts = [f"{self.name}: {self.done:,} of {self.total:,} {self.unit}s"]
        parts += [f"{name} {value:.4g}" for name, value in self.numbers.items()]
        seconds, made = self.clock() - self.start, self.done - self.first
        if made and seconds > 0:
            parts.append(f"{made / seconds:.3g} {self.unit}s/s")
        if self.done >= self.total:
            parts.append(f"done in {tqdm.format_interval(seconds)}")
        elif made:
            left = seconds * (self.total - self.done) / made
            parts.append(f"{tqdm.format_interval(left)} left")
        return ", ".join(parts)


@contextmanager
def progress_bar(
    total: int,
    description: str,
    *,
    unit: str,
    done: int = 0,
    show: bool | None = None,
    write: Callable[[str], None] = tell,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Show how work gets on; ``progress.update(n, loss=...)`` moves it on.

    Args:
        total: Number of units of work.
        description: What is being done.
        unit: Name of one unit, e.g. ``"sample"``; the rate is in units a second.
        done: Units that were done before, of a run that is taken up again.
        show: True shows the bar, False nothing; None the bar where somebody watches,
            and lines elsewhere.
        write: Gets the lines.
        clock: Seconds, from any start.
    """
    lines = show is None and not is_watched() and _depth.get() <= 0
    with tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=f" {unit}",
        disable=not (is_watched() if show is None else show),
        dynamic_ncols=True,
        leave=False,
    ) as bar:
        _depth.set(_depth.get() + 1)
        try:
            to = write if lines else None
            progress = Progress(bar, description, unit, write=to, clock=clock)
            yield progress
        finally:
            _depth.set(_depth.get() - 1)
        if progress.done > progress.first:
            progress.tell()

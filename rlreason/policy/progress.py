"""Progress with rate and time left, where somebody is watching.

A bar is shown in a terminal and in Jupyter. It is left out when the output is not a
terminal (logs, pipes, tests) and when papermill executes a notebook, whose output
would otherwise fill with frames of a bar that nobody saw move.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


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


@contextmanager
def progress_bar(
    total: int, description: str, *, unit: str, show: bool | None = None
) -> Iterator[tqdm]:
    """A bar that counts to ``total``; ``bar.update(n)`` moves it on.

    Args:
        total: Number of units of work.
        description: What is being done.
        unit: Name of one unit, e.g. ``"sample"``; the rate is in units a second.
        show: True or False decides; None shows the bar where somebody watches.
    """
    show = is_watched() if show is None else show
    with tqdm(
        total=total,
        desc=description,
        unit=f" {unit}",
        disable=not show,
        dynamic_ncols=True,
        leave=False,
    ) as bar:
        yield bar

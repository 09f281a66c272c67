"""What an executor is given, and what it gives back.

A ``Job`` is a command line with what it needs: other jobs, cores, GPUs. An executor
starts each when its needs are met and there is room, and tells what became of it. It
knows nothing of notebooks or training runs; the book, seeds and grids are all jobs.

What a job makes lies on the disk, so a job says by itself whether there is anything to
do (``fresh``), and a failure or an interruption loses no other job's work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal, Protocol

_OURS = re.compile(r"^rlreason: ", re.M)  # how our commands begin what is to be mended

State = Literal["fresh", "done", "failed", "blocked"]


class JobError(ValueError):
    """Jobs that cannot be carried out as given, or that failed."""


@dataclass(frozen=True)
class Job:
    """A command with what it needs.

    Attributes:
        name: By which other jobs need it, and under which it is reported.
        command: Program and arguments.
        needs: Names of the jobs that are to be done before.
        cores: CPU cores, which is also the number of threads that it may use.
        gpus: GPUs; it sees no others.
        memory: Megabytes that it asks for where memory is given out; 0: not said.
        fresh: Whether what it makes is already there; asked when it would be started.
            JobError: it is not, and is not to be made.
        there: The same, asked once it has ended well: a program may end with 0 and
            leave nothing.
        environment: Variables over those of this process.
        log: File that takes all that it prints; without one, only the end of its
            standard error is kept.
        lock: File; no two processes that name it carry out the job at a time.
        reads: Files and folders without which it cannot be carried out elsewhere.
        writes: Those that it makes, where it may be carried out elsewhere.
    """

    name: str
    command: Sequence[str]
    needs: tuple[str, ...] = ()
    cores: int = 1
    gpus: int = 0
    memory: int = 0
    fresh: Callable[[], bool] = lambda: False
    there: Callable[[], bool] = lambda: True
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    lock: Path | None = None
    reads: tuple[Path, ...] = ()
    writes: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        name: The job's.
        state: ``fresh`` (there was nothing to do), ``done``, ``failed`` (its exit code
            was not 0, or its result is missing) or ``blocked`` (what it needs failed).
        told: What it wrote to its standard error, or which need failed.
        seconds: Of wall-clock time.
    """

    name: str
    state: State
    told: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether what the job makes is there."""
        return self.state in ("fresh", "done")

    @property
    def is_worded(self) -> bool:
        """Whether what it told is something to mend, as our commands tell it."""
        return self.state == "blocked" or len(_OURS.split(self.told)) > 1

    @property
    def message(self) -> str:
        """Why what it makes is not there: our command's own words where it had some."""
        if self.state == "blocked":
            return f"{self.name} was not begun: {self.told}"
        words = _OURS.split(self.told)[-1].strip()
        return words if self.is_worded else f"{self.name} failed:\n{words}"


class Executor(Protocol):
    """Carries out jobs somewhere: on this machine, or on others."""

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Carry out jobs, each once, after those that it needs.

        One that fails keeps only those from running that need it. An interruption ends
        all that is running before it is raised.

        Returns:
            Name to outcome, in the order in which they came to their end.

        Raises:
            JobError: Two jobs of one name, a need that is no job, or a circle of needs.
        """
        ...


def check_jobs(jobs: Iterable[Job]) -> None:
    """Refuse jobs whose names or needs do not fit together; see ``Executor.run``."""
    jobs = list(jobs)
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise JobError(f"more than one job is named {', '.join(twice)}")
    for job in jobs:
        if missing := [need for need in job.needs if need not in names]:
            raise JobError(f"{job.name} needs {', '.join(missing)}, which is no job")
    try:
        TopologicalSorter({job.name: job.needs for job in jobs}).prepare()
    except CycleError as error:
        raise JobError(f"jobs need each other: {' -> '.join(error.args[1])}") from None

"""The order of jobs, the same wherever they run: needs first, failures kept apart.

``run_jobs`` asks each job whether there is anything to do, and gives those that there
is room for to a ``Place``: processes of this machine, tasks of a Ray cluster, array
jobs of Slurm. The order is that of the list: of the jobs whose needs are met, the first
that finds room is started. An interruption (Ctrl-C, or a signal that asks this process
to end) stops the place and starts nothing more.

Two processes may carry out the same jobs: a job that says where its lock lies is
carried out by the one that holds it, and the other asks again when it is let go.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from filelock import FileLock, Timeout

from rlreason.execution.jobs import Job, Outcome, check_jobs

LOOK_EVERY = 0.05  # seconds
SHARED_LAG = 60.0  # seconds for which NFS may keep what it knows of a folder
GRACE = 20.0  # seconds, less than the 30 that Slurm gives by default


class AskedToEndError(KeyboardInterrupt):
    """A SIGTERM or a hang-up: jobs may take a checkpoint, as at Ctrl-C they may not."""


def most_held() -> int:
    """How many locks this process may hold; a half of its files are for all else."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 256
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10_000 if files == resource.RLIM_INFINITY else max(1, files // 2)


class Place(Protocol):
    """Where jobs run.

    Attributes:
        lag: Seconds in which what a job wrote there is to be seen here.
    """

    lag: float

    def has_room(self, job: Job) -> bool:
        """Whether a job could be started now."""
        ...

    def start(self, job: Job) -> None:
        """Start a job and return; OSError or ValueError where it cannot be."""
        ...

    def ended(self) -> list[Outcome]:
        """Those that came to their end since this was last asked; does not wait."""
        ...

    def stop(self, grace: float) -> None:
        """End all that is running, and leave.

        Args:
            grace: Seconds for a checkpoint, from asking a job to end to killing it.
        """
        ...


def run_jobs(
    jobs: Sequence[Job],
    place: Place,
    *,
    report: Callable[[Job], object],
    finished: Callable[[Outcome], object],
) -> dict[str, Outcome]:
    """Carry out jobs at a place; see ``Executor.run``.

    Args:
        report: Called with each job when it is started.
        finished: Called with each outcome when it is there, before the job is let go.
    """
    check_jobs(jobs)
    by_name = {job.name: job for job in jobs}
    queue = _Queue(place, report, finished, by_name, list(jobs))
    grace = 0.0
    with signals_interrupt():
        try:
            while queue.waiting or queue.held:
                if not queue.move():
                    time.sleep(LOOK_EVERY)
        except AskedToEndError:
            grace = GRACE
            raise
        finally:
            place.stop(grace)
            for name in list(queue.held):
                queue.let_go(name)
    return queue.outcomes


@dataclass
class _Queue:
    """Jobs on their way.

    Attributes:
        jobs: All, by name.
        held: Those that are running, each with its lock where it has one.
        arriving: Outcomes of those whose result is waited for, each with until when.
    """

    place: Place
    report: Callable[[Job], object]
    finished: Callable[[Outcome], object]
    jobs: dict[str, Job]
    waiting: list[Job]
    held: dict[str, FileLock | None] = field(default_factory=dict)
    arriving: list[tuple[Outcome, float]] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def move(self) -> bool:
        """Start what can be, and note what has ended; whether anything happened."""
        before = len(self.waiting), len(self.outcomes)
        for job in list(self.waiting):
            needed = [self.outcomes.get(name) for name in job.needs]
            if failed := [n.name for n in needed if n is not None and not n.ok]:
                self.waiting.remove(job)
                told = f"it needs {' and '.join(failed)}"
                self._note(Outcome(job.name, "blocked", told))
            elif None not in needed and self._has_room(job) and self._take(job):
                self._start(job)
        until = time.monotonic() + self.place.lag
        self.arriving += [(outcome, until) for outcome in self.place.ended()]
        self.arriving = [
            (o, end) for o, end in self.arriving if not self._judge(o, end)
        ]
        return before != (len(self.waiting), len(self.outcomes))

    def _has_room(self, job: Job) -> bool:
        """Each lock is an open file, of which a process may have so many."""
        return len(self.held) < most_held() and self.place.has_room(job)

    def _take(self, job: Job) -> bool:
        """Hold a job; False where another process holds it."""
        lock = FileLock(job.lock) if job.lock else None
        try:
            if lock:
                lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            self.waiting.remove(job)
            self._note(Outcome(job.name, "failed", str(error)))
            return False
        self.waiting.remove(job)
        self.held[job.name] = lock
        return True

    def _start(self, job: Job) -> None:
        try:
            if job.fresh():
                self._note(Outcome(job.name, "fresh"))
            else:
                self.report(job)
                self.place.start(job)
        except (OSError, ValueError) as error:  # no other job's fault
            self._note(Outcome(job.name, "failed", str(error)))

    def _judge(self, outcome: Outcome, until: float) -> bool:
        """Note an outcome, unless the result of what ended well may yet be seen."""
        if outcome.state == "done" and not self._is_there(self.jobs[outcome.name]):
            if time.monotonic() < until:
                return False
            told = f"{outcome.told}\nended with 0, but its result is not there"
            told += ", or what decides it has changed since it began"
            outcome = replace(outcome, state="failed", told=told.strip())
        self._note(outcome)
        return True

    def _is_there(self, job: Job) -> bool:
        try:
            return job.there()
        except (OSError, ValueError):  # what is there cannot be read
            return False

    def _note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        self.finished(outcome)
        self.let_go(outcome.name)

    def let_go(self, name: str) -> None:
        """Let another process ask for a job."""
        if lock := self.held.pop(name, None):
            lock.release()


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let a request to end this process be an interruption: jobs would outlive it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise AskedToEndError

    names = [n for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
    numbers = [getattr(signal, name) for name in names]
    before = {n: signal.getsignal(n) for n in numbers}
    ours = [n for n in numbers if before[n] == signal.SIG_DFL]  # not those of nohup
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])

"""Jobs as processes of this machine, each on cores, or GPUs, of its own.

The order is that of the list: of the jobs whose needs are met, the first that finds
room is started. An interruption (Ctrl-C, or a signal that asks this process to end)
kills what is running, with all that it has started, and starts nothing more.

What this leaves out: other machines, and a memory limit. Jobs share the memory.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from tempfile import TemporaryFile
from typing import IO

import psutil

from rlreason.execution.jobs import Job, Outcome, check_jobs
from rlreason.runs.environment import cores, gpus

LOOK_EVERY = 0.05  # seconds
TOLD = 20_000  # characters of a job's standard error that are kept


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(len(gpus()))]
    return [name.strip() for name in named.split(",") if name.strip()]


@dataclass(frozen=True)
class LocalExecutor:
    """Carries out jobs as processes of this machine; see ``Executor``.

    Attributes:
        cores: How many may be in use at a time. A job that wants more runs alone.
        gpus: Those that may be in use, as CUDA_VISIBLE_DEVICES names them.
        report: Called with each job when it is started.
        finished: Called with each outcome when it is there.
    """

    cores: int = field(default_factory=cores)
    gpus: Sequence[str] = field(default_factory=visible_gpus)
    report: Callable[[Job], None] = lambda job: None
    finished: Callable[[Outcome], None] = lambda outcome: None

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Carry out jobs, each once, after those that it needs; see ``Executor``."""
        check_jobs(jobs)
        waiting = list(jobs)
        running: list[_Process] = []
        outcomes: dict[str, Outcome] = {}

        def note(outcome: Outcome) -> None:
            outcomes[outcome.name] = outcome
            self.finished(outcome)

        with _signals_interrupt():
            try:
                while waiting or running:
                    for outcome in self._start(waiting, running, outcomes):
                        note(outcome)
                    ended = [p for p in running if p.popen.poll() is not None]
                    for process in ended:
                        running.remove(process)
                        note(process.outcome())
                    if not ended and running:
                        time.sleep(LOOK_EVERY)
            finally:
                for process in running:
                    kill_tree(process.popen.pid)
                for process in running:
                    process.popen.wait()
        return outcomes

    def _start(
        self,
        waiting: list[Job],
        running: list[_Process],
        outcomes: dict[str, Outcome],
    ) -> Iterator[Outcome]:
        """Start what can be; yield what came to its end without being started."""
        for job in list(waiting):
            needed = [outcomes.get(name) for name in job.needs]
            if failed := [n.name for n in needed if n is not None and not n.ok]:
                waiting.remove(job)
                yield Outcome(job.name, "blocked", f"it needs {' and '.join(failed)}")
            elif None in needed:
                continue
            elif (known := self._known(job)) is not None:
                waiting.remove(job)
                yield known
            elif (places := self._room(job, running)) is not None:
                waiting.remove(job)
                self.report(job)
                try:
                    running.append(_Process.start(job, places))
                except (OSError, ValueError) as error:
                    yield Outcome(job.name, "failed", f"{job.command[0]}: {error}")

    def _known(self, job: Job) -> Outcome | None:
        """What is known of a job before it runs: its output is there, or cannot be."""
        try:
            return Outcome(job.name, "fresh") if job.fresh() else None
        except (OSError, ValueError) as error:  # no other job's fault
            return Outcome(job.name, "failed", str(error))

    def _room(self, job: Job, running: list[_Process]) -> list[str] | None:
        """Return free GPUs for a job, None where there is no room for it now."""
        used = sum(process.job.cores for process in running)
        taken = {gpu for process in running for gpu in process.gpus}
        free = [gpu for gpu in self.gpus if gpu not in taken]
        wanted = min(job.gpus, len(self.gpus))
        fits = used + job.cores <= self.cores and wanted <= len(free)
        return free[:wanted] if fits or not running else None


@dataclass(frozen=True)
class _Process:
    """A job that is running."""

    job: Job
    gpus: list[str]
    popen: subprocess.Popen
    errors: IO[bytes]
    started: float

    @classmethod
    def start(cls, job: Job, places: list[str]) -> _Process:
        """Start a job in a session of its own, which Ctrl-C does not reach."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.cores)}
        if places:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(places)
        # A pipe could fill up and block the job; closed by `outcome`
        errors = TemporaryFile()  # noqa: SIM115
        popen = subprocess.Popen(
            job.command,
            env={**environment, **job.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        return cls(job, places, popen, errors, time.monotonic())

    def outcome(self) -> Outcome:
        """What became of it, once it has ended."""
        self.errors.seek(0)
        told = self.errors.read().decode(errors="replace")[-TOLD:].strip()
        self.errors.close()
        code = self.popen.returncode
        if code < 0:  # it had no time to say so itself
            told = f"{told}\nended by signal {-code}, {_signal_name(-code)}".strip()
        seconds = time.monotonic() - self.started
        return Outcome(self.job.name, "failed" if code else "done", told, seconds)


def _signal_name(number: int) -> str:
    out_of_memory = " (out of memory?)" if number == signal.SIGKILL else ""
    try:
        return signal.Signals(number).name + out_of_memory
    except ValueError:  # one of those for real time has no name
        return "of real time"


def kill_tree(pid: int) -> None:
    """Kill a process, its group, and all that it has started in whichever group.

    A Jupyter kernel has a session of its own, so the group alone would leave it.
    """
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # gone already
            os.killpg(pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let a request to end this process be an interruption: jobs would outlive it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

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

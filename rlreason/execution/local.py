"""Jobs as processes of this machine, each on cores, or GPUs, of its own.

An interruption kills what is running, with all that it has started; a SIGTERM is
passed on first, so that a run can take its checkpoint. On Linux a job also ends with
the process that started it, however that ends.

What this leaves out: other machines, and a memory limit. Jobs share the memory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import psutil

from rlreason.execution.jobs import Job, Outcome
from rlreason.execution.schedule import run_jobs
from rlreason.runs.environment import cores, gpus

TOLD = 20_000  # characters of a job's standard error that are kept
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(len(gpus()))]
    names = (name.strip() for name in named.split(","))
    return list(takewhile(lambda name: name and name != "-1", names))  # as CUDA does


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
    report: Callable[[Job], object] = lambda job: None
    finished: Callable[[Outcome], object] = lambda outcome: None

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Carry out jobs, each once, after those that it needs; see ``Executor``."""
        place = _Here(self.cores, self.gpus)
        return run_jobs(jobs, place, report=self.report, finished=self.finished)


class _Here:
    """This machine, as a ``Place``."""

    lag = 0.0

    def __init__(self, cores: int, gpus: Sequence[str]) -> None:
        self._cores = cores
        self._gpus = gpus
        self._running: list[Process] = []

    def has_room(self, job: Job) -> bool:
        used = sum(process.job.cores for process in self._running)
        wanted = min(job.gpus, len(self._gpus))
        fits = used + job.cores <= self._cores and wanted <= len(self._free())
        return fits or not self._running

    def _free(self) -> list[str]:
        taken = {gpu for process in self._running for gpu in process.gpus}
        return [gpu for gpu in self._gpus if gpu not in taken]

    def start(self, job: Job) -> None:
        self._running.append(Process.start(job, self._free()[: job.gpus]))

    def ended(self) -> list[Outcome]:
        ended = [p for p in self._running if p.popen.poll() is not None]
        self._running = [p for p in self._running if p not in ended]
        return [process.outcome() for process in ended]

    def stop(self, grace: float) -> None:
        end_processes([process.popen for process in self._running], grace)


@dataclass(frozen=True)
class Process:
    """A job that is running here."""

    job: Job
    gpus: list[str]
    popen: subprocess.Popen
    errors: IO[bytes]
    started: float

    @classmethod
    def start(cls, job: Job, gpus: list[str], folder: Path | None = None) -> Process:
        """Start a job in a session of its own, which Ctrl-C does not reach.

        Args:
            folder: That it works in; that of this process where not given.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.cores)}
        if gpus or not job.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # A pipe could fill up and block the job; closed by `outcome`
        errors = job.log.open("w+b") if job.log else TemporaryFile()  # noqa: SIM115
        popen = subprocess.Popen(
            job.command,
            env={**environment, **job.environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=errors if job.log else subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            preexec_fn=_end_with_parent if _LIBC else None,
        )
        return cls(job, gpus, popen, errors, time.monotonic())

    def outcome(self) -> Outcome:
        """What became of it, once it has ended."""
        self.errors.seek(0)
        told = self.errors.read().decode(errors="replace")[-TOLD:].strip()
        self.errors.close()
        code = self.popen.returncode
        if code < 0:  # it had no time to say so itself
            told = f"{told}\nended by signal {-code}, {_signal_name(-code)}".strip()
        if code and not told:
            told = f"it ended with {code}, and its log is empty: is the disk full?"
        state = "failed" if code else "done"
        return Outcome(self.job.name, state, told, time.monotonic() - self.started)


def _end_with_parent() -> None:
    """Let the system kill this process when the one that started it is killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_name(number: int) -> str:
    out_of_memory = " (out of memory?)" if number == signal.SIGKILL else ""
    try:
        return signal.Signals(number).name + out_of_memory
    except ValueError:  # one of those for real time has no name
        return "of real time"


def family_of(pid: int) -> list[psutil.Process]:
    """A process and all that it has started; nothing where it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def end_processes(processes: Sequence[subprocess.Popen], grace: float) -> None:
    """Kill processes with all that they have started, and wait for their end.

    Args:
        grace: Seconds from asking them to end to that; 0: they are not asked.
    """
    families = [family_of(process.pid) for process in processes]
    end = time.monotonic() + grace
    if grace:
        for process in processes:
            process.terminate()
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    for process, family in zip(processes, families, strict=True):
        kill_tree(process.pid, family)
        process.wait()


def kill_tree(pid: int, before: Sequence[psutil.Process] = ()) -> None:
    """Kill a process, its group, and all that it has started in whichever group.

    A Jupyter kernel has a session of its own, so the group alone would leave it.

    Args:
        before: Its family, seen earlier; who has ended since no longer tells of it.
    """
    family = {*before, *family_of(pid)}
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # gone already
            os.killpg(pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()

"""Jobs as tasks of a Ray cluster, each with its cores, GPUs and memory.

Ray is the extra ``cluster``. The cluster is that which RAY_ADDRESS names, or that runs
on this machine; where there is none, Ray starts one of this machine. A task whose
worker dies, with its machine or alone, is started again, and its job ends with it.

Every machine must hold the same version of this package, which is checked. Where the
folder of runs is on a file system that all machines see, nothing is copied, and a job
that is started again goes on where it was. Where it is not, a job takes what it reads
with it and brings back what it writes; one that does not say what it writes is refused.

Where this process is asked to end, or interrupted, a job may take its checkpoint.

What this leaves out: installing the package on the machines, and clusters that grow.
"""

from __future__ import annotations

import io
import os
import platform
import secrets
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlreason.execution.jobs import Job, JobError, Outcome
from rlreason.execution.local import Process, end_processes
from rlreason.execution.schedule import GRACE, LOOK_EVERY, SHARED_LAG, run_jobs
from rlreason.runs.environment import (
    folders,
    make_folder,
    runs_root,
    source_digest,
)

STARTED_AGAIN = 3  # times, where a worker dies
TO_CLEAN_UP = 10.0  # seconds, at most, for workers that are told to stop
MEGABYTE = 2**20


@dataclass(frozen=True)
class RayExecutor:
    """Carries out jobs as tasks of a Ray cluster; see ``Executor``.

    Attributes:
        report: Called with each job when it is given to Ray.
        finished: Called with each outcome when it is there.
    """

    report: Callable[[Job], object] = lambda job: None
    finished: Callable[[Outcome], object] = lambda outcome: None

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Carry out jobs, each once, after those that it needs; see ``Executor``.

        Raises:
            JobError: Ray is not installed, or no machine has a job's memory.
        """
        place = _Cluster(_ray(), jobs)
        return run_jobs(jobs, place, report=self.report, finished=self.finished)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
    except ImportError:
        raise JobError(
            "Ray is not installed: `make cluster`, or pip install 'rlreason[cluster]'"
        ) from None
    return ray


@contextmanager
def _own_handler() -> Iterator[None]:
    """Keep what this process does at SIGTERM: Ray takes it over, and keeps it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


class _Cluster:
    """A Ray cluster, as a ``Place``."""

    def __init__(self, ray: Any, jobs: Sequence[Job]) -> None:
        self._ray = ray
        self._ours = not ray.is_initialized()
        if self._ours:
            with _own_handler():
                ray.init(log_to_driver=False, logging_level="ERROR")
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
        self._most = _largest(nodes)
        self._total = ray.cluster_resources()
        self._running: dict[Any, Job] = {}
        self._mark = make_folder(runs_root().absolute()) / f".{secrets.token_hex(8)}"
        self._mark.touch()
        try:
            self._shared = self._look(jobs)
            self.lag = SHARED_LAG if self._shared else 0.0
        except BaseException:
            self.stop(grace=0)
            raise

    def _look(self, jobs: Sequence[Job]) -> bool:
        """Whether all machines see the folder of runs; refuse what cannot be run."""
        largest = self._most["memory"] / MEGABYTE
        for job in jobs:
            if job.memory > largest:
                raise JobError(
                    f"{job.name} asks for {job.memory} MB of memory; the largest "
                    f"machine of the cluster has {largest:.0f}"
                )
        looks = [
            self._ray.remote(_look_around)
            .options(num_cpus=0, label_selector={"ray.io/node-id": node["NodeID"]})
            .remote(self._mark)
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        found = self._ray.get(looks)
        for machine, _, source in found:
            if source != source_digest():
                raise JobError(
                    f"{machine} has another version of rlreason: install this one"
                )
        apart = [machine for machine, sees_mark, _ in found if not sees_mark]
        if apart and (dumb := [job.name for job in jobs if not job.writes]):
            raise JobError(
                f"{apart[0]} does not see {runs_root()}, and {dumb[0]} does not say "
                "what it writes: point RLREASON_RUNS to a folder that all machines "
                "of the cluster share"
            )
        return not apart

    def has_room(self, job: Job) -> bool:
        wanted = self._wanted(job)
        for other in self._running.values():
            for name, amount in self._wanted(other).items():
                wanted[name] += amount
        fits = all(wanted[name] <= self._total.get(name, 0) for name in wanted)
        return fits or not self._running

    def _wanted(self, job: Job) -> dict[str, float]:
        """What is asked of Ray, no more than its largest machine has."""
        asked = {"CPU": job.cores, "GPU": job.gpus, "memory": job.memory * MEGABYTE}
        return {name: min(value, self._most[name]) for name, value in asked.items()}

    def start(self, job: Job) -> None:
        wanted = self._wanted(job)
        task = self._ray.remote(carry_out_on_worker).options(
            name=job.name,
            num_cpus=wanted["CPU"],
            num_gpus=wanted["GPU"],
            memory=wanted["memory"],
            max_retries=STARTED_AGAIN,
        )
        environment = {**folders(), **job.environment}
        # What only this process can ask or hold stays here
        bare = replace(job, fresh=bool, there=bool, lock=None, environment=environment)
        reads = () if self._shared else (path for path in job.reads if path.exists())
        here = {"python": sys.executable, "folder": Path.cwd()}
        reference = task.remote(bare, pack(reads), self._mark, **here)
        self._running[reference] = job

    def ended(self) -> list[Outcome]:
        if not self._running:
            return []
        references = list(self._running)
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return [self._outcome(each, self._running.pop(each)) for each in ready]

    def _outcome(self, reference: Any, job: Job) -> Outcome:
        try:
            outcome, files, log = self._ray.get(reference)
            if files is not None:
                unpack(files, job.writes, whole=outcome.state == "done")
                if job.log:
                    job.log.write_bytes(log)
        except (self._ray.exceptions.RayError, JobError, OSError) as error:
            return Outcome(job.name, "failed", f"Ray: {error}")
        return outcome

    def stop(self, grace: float) -> None:
        self._mark.unlink(missing_ok=True)
        for reference in self._running:
            self._ray.cancel(reference)
        if self._running:  # each ends what it has started
            references = list(self._running)
            patience = grace + TO_CLEAN_UP
            self._ray.wait(references, num_returns=len(references), timeout=patience)
        if self._ours:
            self._ray.shutdown()


def _largest(nodes: Iterable[dict[str, float]]) -> dict[str, float]:
    """The most of each resource that one machine has."""
    nodes = list(nodes)
    names = ("CPU", "GPU", "memory")
    return {name: max(node.get(name, 0.0) for node in nodes) for name in names}


# --- On a worker ---------------------------------------------------------------------


def _look_around(mark: Path) -> tuple[str, bool, str]:
    """The machine's name, whether it sees a file, and the digest of its source."""
    return platform.node(), mark.exists(), source_digest()


def carry_out_on_worker(
    job: Job, files: bytes, mark: Path, *, python: str, folder: Path
) -> tuple[Outcome, bytes | None, bytes]:
    """Carry out a job on a worker.

    Args:
        files: What the job reads, for a worker that does not see it.
        mark: A file in the folder of runs, by which one sees whether it is shared.
        python: The interpreter of whoever asked; here it may lie elsewhere.
        folder: That whoever asked works in, and the job too where it is seen.

    Returns:
        The outcome; where the folder of runs is not shared, what the job wrote and its
        log.
    """
    shared = mark.exists()
    if not shared:
        unpack(files, job.reads, whole=True)
        for path in (job.log, *job.writes):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable if word == python else word for word in job.command]
    there = folder if folder.is_dir() else None
    process = Process.start(replace(job, command=command), [], there)
    try:
        while process.popen.poll() is None:
            time.sleep(LOOK_EVERY)  # a wait would not be ended when Ray cancels
    finally:
        end_processes([process.popen], GRACE)
    outcome = process.outcome()
    if shared:
        return outcome, None, b""
    log = job.log.read_bytes() if job.log else b""
    return outcome, pack(path for path in job.writes if path.exists()), log


def pack(paths: Iterable[Path]) -> bytes:
    """Return files and folders, each with its whole path, as one archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in paths:
            archive.add(path.absolute(), filter=_no_lock)
    return buffer.getvalue()


def _no_lock(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(member.name).name == "lock" else member


def unpack(files: bytes, places: Sequence[Path], *, whole: bool) -> None:
    """Put files where they came from, if that is one of some places or under it.

    Written out by hand: the filters of ``tarfile`` came with Python 3.10.12 and 3.11.4.

    Args:
        whole: Whether they are all of a place, so that what it holds besides goes:
            checkpoints of a session that was killed here may have higher numbers than
            those of the run that was finished elsewhere.

    Raises:
        JobError: The archive holds something else.
    """
    allowed, brought = [path.absolute() for path in places], set()
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        for member in archive:
            path = Path("/", member.name)
            named = any(place in (path, *path.parents) for place in allowed)
            if not named or ".." in path.parts:
                raise JobError(f"a job brought back {path}, which it has not named")
            brought.add(path)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif member.isfile():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
            else:
                raise JobError(f"a job brought back {path}, which is no plain file")
    for place in brought.intersection(allowed) if whole else ():
        for path in sorted(place.rglob("*"), reverse=True):  # what lies in one first
            if path not in brought and path != place / "lock":
                with suppress(FileNotFoundError):  # another job wants the same
                    is_folder = path.is_dir() and not path.is_symlink()
                    path.rmdir() if is_folder else path.unlink()

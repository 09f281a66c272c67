"""Jobs as array jobs of Slurm: one script for all that can run, submitted by sbatch.

Jobs whose needs are met are submitted together, those that need them when they are
done, so the process that asked stays and looks at what ``sacct`` tells (or ``squeue``,
where nothing is accounted). If it is killed, the jobs go on; asked for again with the
same folder, they are found there and not submitted again. Where there is no ``sbatch``,
the scripts are written and printed with the commands that submit them.

Account, partition and time limit are sbatch's own to say, by SBATCH_ACCOUNT,
SBATCH_PARTITION, SBATCH_TIMELIMIT. The folders of runs and of this package must be on a
file system that all machines see.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

from filelock import FileLock

from rlreason.execution.jobs import Job, JobError, Outcome, check_jobs
from rlreason.execution.local import TOLD
from rlreason.execution.schedule import SHARED_LAG, run_jobs
from rlreason.runs.environment import folders, make_folder
from rlreason.runs.files import write_atomically, write_json

# Those from which a job does not come back
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
)
GONE = "GONE"  # squeue no longer knows it
LARGEST = 1001  # jobs of an array, where Slurm's MaxArraySize is as it comes

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=rlreason
#SBATCH --array=0-{last}
#SBATCH --cpus-per-task={cores}
#SBATCH --output=/dev/null
#SBATCH --signal=B:TERM@60
{more}export OMP_NUM_THREADS={cores} {folders}
cd {here}
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
"$@" > "$log" 2>&1 &
job=$!
trap 'kill -TERM $job' TERM
wait $job
code=$?
if [ $code -gt 128 ]; then  # a signal came to this shell, or ended the job
  wait $job
  code=$?
fi
echo $code > "$log.exit"
exit $code
"""


@dataclass(frozen=True)
class SlurmExecutor:
    """Carries out jobs as array jobs of Slurm; see ``Executor``.

    Attributes:
        folder: Takes scripts, logs of jobs that name none, and what was submitted.
        report: Called with each job when it is submitted.
        finished: Called with each outcome when it is there.
        every: Seconds from one look at the queue to the next.
        show: Called with the scripts where they cannot be submitted.
    """

    folder: Path
    report: Callable[[Job], object] = lambda job: None
    finished: Callable[[Outcome], object] = lambda outcome: None
    every: float = 10.0
    show: Callable[[str], object] = print

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Carry out jobs, each once, after those that it needs; see ``Executor``.

        Raises:
            JobError: There is no sbatch here; says what is to be submitted elsewhere.
        """
        make_folder(self.folder)
        if shutil.which("sbatch") is None:
            self._print(jobs)
        place = _Queue(self.folder.absolute(), self.every)
        return run_jobs(jobs, place, report=self.report, finished=self.finished)

    def _print(self, jobs: Sequence[Job]) -> None:
        check_jobs(jobs)
        commands, before = [], ""
        for level in levels([job for job in jobs if self._is_to_run(job)]):
            names = []
            for group in arrays(level, LARGEST):
                path, text = write_script(self.folder.absolute(), group, gpus=True)
                self.show(f"# {path}\n{text}")
                name = f"job{len(commands)}"
                commands.append(
                    f"{name}=$(sbatch --parsable {before}{shlex.quote(str(path))})"
                )
                names.append(f"${name}")
            before = f"--dependency=afterany:{':'.join(names)} "
        raise JobError(
            "there is no sbatch here; where it is, with the same folders, submit "
            "(where it has no GPUs, without the lines --gpus):\n" + "\n".join(commands)
        )

    def _is_to_run(self, job: Job) -> bool:
        """Whether a job has anything to do; what is not to be made is told and left."""
        try:
            return not job.fresh()
        except JobError as error:
            self.finished(Outcome(job.name, "failed", f"rlreason: {error}"))
            return False


def levels(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs in groups, each of which needs only those before."""
    known = {job.name: job for job in jobs}
    graph = {j.name: [need for need in j.needs if need in known] for j in jobs}
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    while names := sorter.get_ready():
        yield [known[name] for name in names]
        sorter.done(*names)


def arrays(jobs: Iterable[Job], most: int) -> Iterator[list[Job]]:
    """Jobs in groups that ask for the same, as all of an array do, of a size each."""
    groups: dict[tuple[int, int, int], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.cores, job.gpus, job.memory), []).append(job)
    for alike in groups.values():
        yield from (alike[i : i + most] for i in range(0, len(alike), most))


def _largest_array() -> int:
    told = re.search(
        r"MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config") or ""
    )
    return max(1, int(told[1])) if told else LARGEST


def write_script(folder: Path, jobs: Sequence[Job], *, gpus: bool) -> tuple[Path, str]:
    """Write the script of an array of jobs that ask for the same.

    Args:
        gpus: Whether the cluster has any.

    Returns:
        Its path, and what it holds.
    """
    job = jobs[0]
    more = [f"--gpus={job.gpus}"] if job.gpus and gpus else []
    more += [f"--mem={job.memory}M"] if job.memory else []
    text = SCRIPT.format(
        last=len(jobs) - 1,
        cores=job.cores,
        more="".join(f"#SBATCH {option}\n" for option in more),
        folders=_assignments(folders()),
        here=shlex.quote(os.getcwd()),
        cases="\n".join(_case(n, each, folder) for n, each in enumerate(jobs)),
    )
    number = sum(1 for _ in folder.glob("array-*.sh"))
    path = folder / f"array-{number}.sh"
    write_atomically(path, text.encode())
    return path, text


def _case(number: int, job: Job, folder: Path) -> str:
    log = shlex.quote(str(log_of(job, folder)))
    exports = _assignments(job.environment)
    lines = [f"log={log}", *([f"export {exports}"] if exports else [])]
    return f"{number}) " + "\n  ".join([*lines, f"set -- {shlex.join(job.command)};;"])


def _assignments(environment: dict[str, str]) -> str:
    return " ".join(f"{name}={shlex.quote(v)}" for name, v in environment.items())


def log_of(job: Job, folder: Path) -> Path:
    """The file that takes all that a job prints."""
    return (job.log or folder / f"{job.name}.log").absolute()


@dataclass
class _Queue:
    """Slurm's queue, as a ``Place``.

    Attributes:
        running: Slurm's number to job, time of submission.
    """

    folder: Path
    every: float
    lag: float = SHARED_LAG
    running: dict[str, tuple[Job, float]] = field(default_factory=dict)
    fresh: list[Job] = field(default_factory=list)
    looked: float = 0.0

    def has_room(self, job: Job) -> bool:
        return True  # waiting is Slurm's

    def start(self, job: Job) -> None:
        known = self._submitted().get(job.name)
        if known and known["command"] == list(job.command):
            number = known["number"]
            if _states([number]).get(number, GONE) not in (*ENDED, GONE):
                self.running[number] = (job, time.monotonic())
                return
        self.fresh.append(job)

    def _submitted(self) -> dict[str, dict]:
        try:
            return json.loads((self.folder / "submitted.json").read_text())
        except FileNotFoundError:
            return {}

    def _submit(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Submit an array; what came of its jobs if that cannot be done.

        One process at a time: scripts are numbered, and one file says what was sent.
        """
        try:
            with FileLock(self.folder / "slurm.lock"):
                return self._submit_alone(jobs)
        except OSError as error:  # no fault of those that run
            return [Outcome(job.name, "failed", f"rlreason: {error}") for job in jobs]

    def _submit_alone(self, jobs: Sequence[Job]) -> list[Outcome]:
        gpus = "gpu" in (_ask("sinfo", "-h", "-o", "%G") or "")
        path, _ = write_script(self.folder, jobs, gpus=gpus)
        for job in jobs:
            log = log_of(job, self.folder)
            log.with_name(f"{log.name}.exit").unlink(missing_ok=True)
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            told = f"rlreason: sbatch refuses {path}: {done.stderr.strip()}"
            return [Outcome(job.name, "failed", told) for job in jobs]
        array = done.stdout.strip().split(";")[0]
        submitted = self._submitted()
        for index, job in enumerate(jobs):
            number = f"{array}_{index}"
            self.running[number] = (job, time.monotonic())
            submitted[job.name] = {"number": number, "command": list(job.command)}
        # Where it cannot be: they run, and locks keep them from running twice
        with suppress(OSError):
            write_json(self.folder / "submitted.json", submitted)
        return []

    def ended(self) -> list[Outcome]:
        outcomes = []
        if self.fresh:
            for jobs in arrays(self.fresh, _largest_array()):
                outcomes += self._submit(jobs)
            self.fresh.clear()
        if self.running and time.monotonic() - self.looked >= self.every:
            for number, state in _states(list(self.running)).items():
                if number in self.running and state in (*ENDED, GONE):
                    outcomes.append(self._outcome(*self.running.pop(number), state))
            self.looked = time.monotonic()
        return outcomes

    def _outcome(self, job: Job, since: float, state: str) -> Outcome:
        log = log_of(job, self.folder)
        if state == GONE:  # nothing is accounted: the script wrote its exit code
            exit_file = log.with_name(f"{log.name}.exit")
            code = exit_file.read_text().strip() if exit_file.is_file() else ""
            state = {"0": "COMPLETED", "": GONE}.get(code, "FAILED")
        told = log.read_text("utf8", "replace")[-TOLD:].strip() if log.is_file() else ""
        seconds = time.monotonic() - since
        if state == "COMPLETED":
            return Outcome(job.name, "done", told, seconds)
        told = told if state == "FAILED" else f"{told}\nended by Slurm: {state}".strip()
        return Outcome(job.name, "failed", told, seconds)

    def stop(self, grace: float) -> None:
        if self.running:  # Slurm asks first, and kills after its KillWait
            _ask("scancel", *self.running)


def _states(numbers: Sequence[str]) -> dict[str, str]:
    """Number to state: empty where it waits or nothing was to be learned.

    Jobs of an array that wait, or never began, may be one line. ``GONE`` is what squeue
    no longer lists.
    """
    arrays = ",".join(sorted({number.split("_")[0] for number in numbers}))
    told, found = _ask("sacct", "-XnP", "-j", arrays, "-o", "JobID,State"), ""
    if not told:  # nothing is accounted, or not yet
        told = _ask("squeue", "-hr", "-t", "all", "--me", "-o", "%i|%T")
        found = "" if told is None else GONE
    states = dict.fromkeys(numbers, found)
    for line in (told or "").splitlines():
        number, _, state = line.partition("|")
        word = state.split()[0].rstrip("+")
        states |= dict.fromkeys(_members(number), word)
    return states


def _members(number: str) -> list[str]:
    """The jobs that a line names: ``7_3``, or of an array ``7_[0-2,5,8-12:2%2]``."""
    array, bracket, parts = number.partition("_[")
    if not bracket:
        return [number]
    members = []
    for part in parts.partition("%")[0].rstrip("]").split(","):
        numbers, _, step = part.partition(":")
        first, _, last = numbers.partition("-")
        ends = (first, last or first, step or "1")
        if all(map(str.isdecimal, ends)):  # "..." where it is cut short
            first, last, step = map(int, ends)
            members += [f"{array}_{n}" for n in range(first, last + 1, step)]
    return members


def _ask(*command: str) -> str | None:
    """What a program of Slurm prints; None where it is not there, or refuses."""
    whole = {**os.environ, "SLURM_BITSTR_LEN": "0"}  # else lists end at 64 characters
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=whole)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout

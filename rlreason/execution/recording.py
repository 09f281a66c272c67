"""Recording as jobs: runs are trained and measured by one process a core.

What is recorded is a row a run and measurement (``experiments.rows``), so the work is
what lacks a row of the present recipe, and a recording that was stopped goes on where
it was. A run is measured as soon as it is trained; a failure keeps only those from
being measured that need it.
"""

from __future__ import annotations

import signal
import sys
import tarfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from rlreason.execution.executors import executor_named
from rlreason.execution.jobs import Job, Outcome
from rlreason.execution.seeds import QUIET, missing, raise_faults, training_jobs
from rlreason.experiments.catalogue import CatalogueError
from rlreason.experiments.measures import (
    MEASURES,
    Context,
    Subject,
    identity,
    measure,
    plans_needed,
)
from rlreason.experiments.rows import (
    FILE,
    RecordError,
    Row,
    read_rows,
    rows_path,
    took,
    write_rows,
)
from rlreason.runs.environment import cores as all_cores
from rlreason.runs.environment import runs_root
from rlreason.runs.plans import Plan, folder_of
from rlreason.runs.profiles import load_recipe

Report = Callable[[str], object]
ARCHIVE_LIMIT = 8, 64_000_000  # files, and bytes of each, in an archive of rows


class TimeIsUpError(BaseException):
    """The minutes of a recording are over. No fault, so nothing but it catches it."""


@contextmanager
def time_limit(minutes: float | None) -> Iterator[float]:
    """End the block after some minutes of real time, wherever it is.

    A checkpoint and a file of rows are there wholly or not at all, so this loses no
    more than a kill would: what came after the last checkpoint.

    Args:
        minutes: None: no limit.

    Yields:
        When time is up, by ``time.monotonic``.

    Raises:
        TimeIsUpError: It is.
        RecordError: The system has no alarms (Windows).
    """
    if minutes is None:
        yield float("inf")
        return
    if not hasattr(signal, "SIGALRM"):
        raise RecordError("a time limit needs a system with alarms, Linux or macOS")

    def stop(number: int, frame: object) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield time.monotonic() + 60 * minutes
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Work:
    """What lacks a row.

    Attributes:
        subjects: Runs, with the measures that are to be taken.
        recorded: Rows that are there already, by arm.
        rows: All that are there, of whatever arm.
        training: Runs to be trained, by the name of their folder, needs first.
    """

    subjects: list[tuple[Subject, list[str]]]
    recorded: Counter[str]
    rows: Sequence[Row]
    training: dict[str, Plan]

    def lines(self) -> Iterator[str]:
        """What is there and what is to be done, an arm a line, for the terminal."""
        todo = Counter(
            {s.arm.name: 0 for s, _ in self.subjects} | dict.fromkeys(self.recorded, 0)
        )
        for subject, measures in self.subjects:
            todo[subject.arm.name] += len(measures)
        width = max(map(len, todo), default=0)
        for name, count in todo.items():
            done = self.recorded[name]
            yield f"{name:<{width}}  {done} of {done + count} rows recorded"
        measuring = sum(1 for _, measures in self.subjects if measures)
        yield f"runs to train: {len(self.training)}; to measure: {measuring}"
        if self.rows:
            yield took(self.rows)
        if self.rows and measuring:
            yield (
                f"about {self.hours_left():.1f} hours are left, of one core or GPU; "
                f"{self.hours_left(min):.1f} where all are as quick as their quickest"
            )

    def hours_left(self, of: Callable[[list[float]], float] = fmean) -> float:
        """By what the same arm took, else the same step, and the same measure, so far.

        Nothing is counted for what has no like yet, nor for runs that no row is of.

        Args:
            of: What is taken of several that are alike: their mean, or the least.
        """
        trained, measured = defaultdict(list), defaultdict(list)
        for row in self.rows:
            step, begun, size = row.step, row.start, row.size
            for like in ((row.arm, size), (step, begun, size), (step, begun), (step,)):
                trained[like].append(row.spent.seconds)
            for like in ((row.measure, row.size), (row.measure,)):
                measured[like].append(row.measuring)

        def each(known: Mapping[tuple, list[float]], *likes: tuple) -> float:
            return of(next((known[like] for like in likes if like in known), [0.0]))

        seconds, counted = 0.0, set()
        for subject, measures in self.subjects:
            arm, size, begun = subject.arm, subject.size, subject.recipe.start
            run = folder_of(subject.plan).path.name if subject.plan else ""
            if run in self.training and run not in counted:
                counted.add(run)
                step = arm.step
                likes = (arm.name, size), (step, begun, size), (step, begun), (step,)
                seconds += each(trained, *likes)
            for name in measures:
                seconds += each(measured, (name, size), (name,))
        return seconds / 3600


@dataclass(frozen=True)
class Recorder:
    """Brings the rows of a profile up to date.

    Attributes:
        path: The file of rows that is written.
        known: A further file, whose rows are not made again.
        measures: Those to take; all of each arm where none is named.
        options: By which a process of its own is told the same.
    """

    context: Context
    path: Path
    known: Path
    measures: tuple[str, ...]
    options: tuple[str, ...]

    def work(
        self, names: Sequence[str], *, size: str | None = None, seed: int | None = None
    ) -> Work:
        """What is to be done for some arms or tables; all where none is named.

        Args:
            size, seed: Of these alone, and of the named arms alone.

        Raises:
            CatalogueError: There is no such arm, table, size or seed.
        """
        alone = size is not None or seed is not None
        arms = {arm.name for arm in self.context.catalogue.find(names)}
        every = self.context.subjects(names)
        own = [subject for subject in every if subject.arm.name in arms]
        for asked, there in (
            (size, {subject.size for subject in own}),
            (seed, {subject.seed for subject in own}),
        ):
            if asked is not None and asked not in there:
                known = ", ".join(map(str, sorted(there)))
                raise CatalogueError(f"no run of {asked}; there are those of {known}")
        subjects = [
            subject
            for subject in (own if alone else every)
            if size in (None, subject.size) and seed in (None, subject.seed)
        ]
        rows = {
            row.identity: row for row in [*read_rows(self.known), *read_rows(self.path)]
        }
        found, recorded, plans = [], Counter(), []
        for subject in subjects:
            asked = [
                name
                for name in subject.arm.measures
                if name in self.measures or not self.measures
            ]
            lacking = [
                name
                for name in asked
                if identity(self.context, subject, name) not in rows
            ]
            recorded[subject.arm.name] += len(asked) - len(lacking)
            if lacking:
                found.append((subject, lacking))
                plans += plans_needed(self.context, subject, lacking)
        return Work(found, recorded, list(rows.values()), missing(plans))

    def carry_out_here(
        self, work: Work, report: Report, *, until: float = float("inf")
    ) -> None:
        """Train and measure in this process, one after the other.

        What fails is told and left; the first fault is raised when all had their turn.

        Args:
            until: No measurement is begun that took longer, of another run, than there
                is time till then, by ``time.monotonic``: what is cut is lost.

        Raises:
            TimeIsUpError: There is too little time left.
        """
        took = {row.measure: row.measuring for row in read_rows(self.path)}
        faults: list[Exception] = []
        for subject, measures in work.subjects:
            try:
                for name in measures:
                    if time.monotonic() + took.get(name, 0.0) > until:
                        raise TimeIsUpError
                    for row in measure(self.context, subject, [name]):
                        write_rows([row], self.path)
                        took[name] = row.measuring
                        report(f"{' '.join(map(str, row.key))}: {row.measuring:.0f} s")
            except Exception as fault:
                report(f"{subject.arm.name} seed {subject.seed} failed: {fault}")
                faults.append(fault)
        if faults:
            raise faults[0]

    def carry_out(
        self,
        work: Work,
        *,
        cores: int | None = None,
        report: Report = print,
        executor: str = "local",
    ) -> None:
        """Train and measure by a process a core, or a GPU.

        Args:
            executor: Who does: local, ray or slurm.

        Raises:
            JobError, RuntimeError: See ``seeds.raise_faults``; all else is done before.
        """
        jobs, kinds = self._jobs(work, training_jobs(work.training))
        progress = Progress(kinds, cores or all_cores(), report)
        there = executor_named(
            executor,
            folder=runs_root() / "record" / self.path.parent.name,
            cores=cores,
            finished=progress.finished,
        )
        raise_faults(there.run(jobs).values())

    def _jobs(
        self, work: Work, training: Mapping[str, Job]
    ) -> tuple[list[Job], dict[str, str]]:
        """All jobs, each run measured soon after it is trained; and what kind each is.

        Rows shall come early, so that what is stopped leaves something.
        """
        jobs: dict[str, Job] = {}
        kinds: dict[str, str] = {}
        for subject, measures in work.subjects:
            needed = missing(plans_needed(self.context, subject, measures))
            for name, plan in needed.items():
                jobs.setdefault(name, training[name])
                kinds.setdefault(name, plan.step)
            name = f"{subject.arm.name} {subject.size} seed {subject.seed}"
            jobs[name] = self._measuring_job(subject, name, tuple(needed))
            kinds[name] = " ".join(["measure", *measures])
        # Another process may have come to the end of a run meanwhile
        there = [
            replace(job, needs=tuple(need for need in job.needs if need in jobs))
            for job in jobs.values()
        ]
        return there, kinds

    def _measuring_job(self, subject: Subject, name: str, needs: tuple) -> Job:
        return Job(
            name=name,
            command=[
                *(sys.executable, "-m", "rlreason.cli", "record", subject.arm.name),
                *("--size", subject.size, "--seed", str(subject.seed), "--here"),
                *self.options,
            ],
            needs=needs,
            gpus=1,
            environment=QUIET,
        )

    def take_over(self, source: Path) -> str:
        """Put rows from elsewhere into the file, and say how many there were.

        Args:
            source: Folder of ``--out``, or a .tgz of it.

        Raises:
            RecordError: Rows of other plans than those of the recipe here; the others
                are taken over before.
        """
        with TemporaryDirectory() as scratch:
            folder = source if source.is_dir() else unpack(source, Path(scratch))
            rows = read_rows(folder / FILE)
        if not rows:
            raise RecordError(
                f"{source} holds no rows; give the folder of --out, or a .tgz of it"
            )
        arms = [row.arm for row in rows if row.arm in self.context.catalogue.arms]
        current = {
            identity(self.context, subject, name)
            for subject in self.context.subjects(list(dict.fromkeys(arms)))
            for name in subject.arm.measures
        }
        good = [row for row in rows if row.identity in current]
        write_rows(good, self.path)
        if refused := [row for row in rows if row.identity not in current]:
            names = ", ".join(" ".join(map(str, row.key)) for row in refused[:3])
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            raise RecordError(
                f"{len(refused)} of {len(rows)} rows of {source} are refused: their "
                f"plans, or seeds, are not those of the recipe here ({names}{more}); "
                f"the others are in {self.path}"
            )
        return f"{len(good)} rows are in {self.path}"


def unpack(archive: Path, folder: Path) -> Path:
    """Put the rows of a .tgz into a folder, and nothing else of it; returns the folder.

    The archive may come from anywhere: only plain files without a path are accepted, a
    few of bounded size, and what is written is named here.

    Raises:
        RecordError: It is no such archive, or holds something else.
    """
    most, largest = ARCHIVE_LIMIT
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for number, member in enumerate(tar):
                plain = member.isfile() and Path(member.name).name == member.name
                if not plain or member.size > largest or number >= most:
                    raise RecordError(
                        f"{archive} is refused for {member.name!r}: an archive of rows "
                        f"holds up to {most} plain files of up to {largest:,} bytes, "
                        "without folders; make it with `make gpu-smol`"
                    )
                if member.name == FILE:
                    (folder / FILE).write_bytes(tar.extractfile(member).read())
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise RecordError(
            f"{archive} is no whole .tgz ({error}): fetch it anew"
        ) from None
    return folder


def recorder(
    profile: str,
    *,
    seeds: int | None = None,
    out: Path | None = None,
    measures: Sequence[str] = (),
) -> Recorder:
    """A recorder of a profile.

    Args:
        seeds: In place of the profile's.
        out: Folder in place of the profile's own.
        measures: Those to take; all where none is named.

    Raises:
        RecordError: There is no such measure.
    """
    if unknown := [name for name in measures if name not in MEASURES]:
        raise RecordError(f"no measure {unknown[0]!r}; there are {', '.join(MEASURES)}")
    changes = {"seeds": seeds} if seeds else {}
    own = rows_path(profile)
    path = (out / FILE).absolute() if out else own
    options = ["--profile", profile, "--out", str(path.parent)]
    options += ["--seeds", str(seeds)] if seeds else []
    options += [word for name in measures for word in ("--measure", name)]
    context = Context(load_recipe(profile, changes))
    return Recorder(context, path, own, tuple(measures), tuple(options))


@dataclass
class Progress:
    """Tells of each job that comes to its end, and how long the rest may take.

    Attributes:
        kinds: Job to its kind; those of one kind take about as long.
        cores: How many jobs run at once.
    """

    kinds: dict[str, str]
    cores: int
    report: Report
    seconds: dict[str, list[float]] = field(default_factory=dict)
    left: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.left = dict(self.kinds)

    def finished(self, outcome: Outcome, label: str = "") -> None:
        """Write a line; under another name than the job's, if one is given."""
        kind = self.left.pop(outcome.name)
        if outcome.state == "done":
            self.seconds.setdefault(kind, []).append(outcome.seconds)
        done, total = len(self.kinds) - len(self.left), len(self.kinds)
        self.report(
            f"{done}/{total} {label or outcome.name}: {outcome.state}, "
            f"{outcome.seconds:.0f} s; {in_words(self.time_left())} left"
        )

    def time_left(self) -> float | None:
        """Seconds, from those that were measured; None where none was."""
        known = [s for seconds in self.seconds.values() for s in seconds]
        if not known:
            return None
        each = (fmean(self.seconds.get(kind, known)) for kind in self.left.values())
        return sum(each) / self.cores


def in_words(seconds: float | None) -> str:
    """A time as people say it.

    >>> in_words(4000.0)
    'about 1 h 7 min'
    """
    if seconds is None:
        return "unknown time"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"about {hours} h {rest} min" if hours else f"about {minutes} min"

"""Jobs: needs, room, failures, and what is left after an interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from rlreason.execution.jobs import Job, JobError, Outcome
from rlreason.execution.local import LocalExecutor, kill_tree, visible_gpus
from rlreason.execution.schedule import run_jobs


def python(name: str, program: str = "", **options) -> Job:
    """A job that runs a Python program."""
    return Job(name, [sys.executable, "-c", program], **options)


def writes(folder: Path, name: str, **options) -> Job:
    """A job that leaves a file, which holds the names of those that were there."""
    program = (
        "import os, sys\n"
        f"there = sorted(os.listdir({str(folder)!r}))\n"
        f"open({str(folder / name)!r}, 'w').write(' '.join(there))"
    )
    return python(name, program, **options)


def test_a_job_is_started_when_what_it_needs_is_there(tmp_path):
    jobs = [
        writes(tmp_path, "a", needs=("b", "c")),
        writes(tmp_path, "b", needs=("c",)),
        writes(tmp_path, "c"),
    ]
    outcomes = LocalExecutor(cores=3, gpus=()).run(jobs)
    assert list(outcomes) == ["c", "b", "a"]
    assert {outcome.state for outcome in outcomes.values()} == {"done"}
    assert (tmp_path / "b").read_text() == "c"
    assert (tmp_path / "a").read_text() == "b c"


def test_what_is_there_is_not_made_again_and_is_asked_for_when_its_turn_comes(tmp_path):
    made = writes(tmp_path, "a")
    above = python("b", "1 / 0", needs=("a",), fresh=lambda: (tmp_path / "a").is_file())
    outcomes = LocalExecutor(cores=1, gpus=()).run([above, made])
    assert [(o.name, o.state) for o in outcomes.values()] == [
        ("a", "done"),
        ("b", "fresh"),
    ]


def test_a_failure_keeps_only_those_from_running_that_need_it():
    jobs = [
        python("a", "1 / 0"),
        python("b", needs=("a",)),
        python("c", needs=("b",)),
        python("d", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        Job("e", ["/no/such/program"]),
        python("f"),
    ]
    outcomes = LocalExecutor(cores=2, gpus=()).run(jobs)
    states = {name: outcome.state for name, outcome in outcomes.items()}
    blocked, failed = {"b", "c"}, {"a", "d", "e"}
    assert {name for name, state in states.items() if state == "blocked"} == blocked
    assert {name for name, state in states.items() if state == "failed"} == failed
    assert states["f"] == "done"
    assert outcomes["a"].told.endswith("ZeroDivisionError: division by zero")
    assert outcomes["b"].told == "it needs a"
    assert outcomes["c"].told == "it needs b"
    assert "SIGKILL (out of memory?)" in outcomes["d"].told
    assert "/no/such/program" in outcomes["e"].told


def test_much_on_standard_error_does_not_block_a_job_and_its_end_is_kept():
    program = "import sys; sys.stderr.write('x' * 500_000 + 'last'); sys.exit(3)"
    (outcome,) = LocalExecutor(cores=1, gpus=()).run([python("a", program)]).values()
    assert outcome.state == "failed"
    assert outcome.told.endswith("last")
    assert len(outcome.told) < 50_000


def test_jobs_run_at_the_same_time_each_with_its_cores_as_threads(tmp_path):
    # Each waits for the other's file: one at a time, neither would end
    wait = (
        "import os, pathlib, time\nassert os.environ['OMP_NUM_THREADS'] == '1'\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n(folder / '{{}}').touch()\n"
        "while not (folder / '{}').exists():\n    time.sleep(0.02)"
    )
    jobs = [python("a", wait.format("a", "b")), python("b", wait.format("b", "a"))]
    outcomes = LocalExecutor(cores=2, gpus=()).run(jobs)
    assert all(outcome.state == "done" for outcome in outcomes.values())


def most_at_a_time(executor: LocalExecutor, jobs: list[Job]) -> int:
    """How many jobs an executor had running at most."""
    running, most = set(), 0

    def begin(job):
        nonlocal most
        running.add(job.name)
        most = max(most, len(running))

    LocalExecutor(
        executor.cores, executor.gpus, begin, lambda o: running.discard(o.name)
    ).run(jobs)
    return most


def test_no_more_run_than_there_is_room_for():
    short = "import time; time.sleep(0.1)"
    jobs = [python(name, short) for name in "abcd"]
    assert most_at_a_time(LocalExecutor(cores=2, gpus=()), jobs) == 2
    wide = [python(name, short, cores=2) for name in "abc"]
    assert most_at_a_time(LocalExecutor(cores=3, gpus=()), wide) == 1
    # One that wants more than there is runs alone
    assert most_at_a_time(LocalExecutor(cores=1, gpus=()), wide) == 1
    on_gpus = [python(name, short, gpus=1) for name in "abc"]
    assert most_at_a_time(LocalExecutor(cores=8, gpus=["0", "1"]), on_gpus) == 2
    assert most_at_a_time(LocalExecutor(cores=8, gpus=()), on_gpus) == 3


def test_each_job_sees_gpus_of_its_own(tmp_path):
    program = (
        "import os, pathlib, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / os.environ['CUDA_VISIBLE_DEVICES']).touch()\n"
        "while len(list(folder.iterdir())) < 2:\n    time.sleep(0.02)"
    )
    jobs = [python(name, program, gpus=1) for name in "ab"]
    LocalExecutor(cores=2, gpus=["3", "5"]).run(jobs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5"]


def test_the_gpus_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-7")
    assert visible_gpus() == ["4", "GPU-7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([python("a"), python("a")], "more than one job is named a"),
        ([python("a", needs=("b",))], "a needs b, which is no job"),
        ([python("a", needs=("b",)), python("b", needs=("a",))], "need each other"),
    ],
)
def test_jobs_that_do_not_fit_together_are_refused_before_one_is_started(jobs, message):
    started = []
    with pytest.raises(JobError, match=message):
        LocalExecutor(cores=1, gpus=(), report=started.append).run(jobs)
    assert started == []


# Ending


# A job that starts a process in a session of its own, as a Jupyter kernel has
FAMILY = """
import subprocess, sys, pathlib, time
child = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
)
draft = pathlib.Path("{pid}.partial")
draft.write_text(str(child.pid))
draft.rename("{pid}")
time.sleep(600)
"""


def wait_for(path: Path) -> int:
    """The process id in a file, once it is there."""
    for _ in range(600):
        if path.is_file():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"no {path}")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ends(pid: int) -> bool:
    """Whether a process comes to its end; killing takes the system a moment."""
    limit = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < limit:
        time.sleep(0.02)
    return not is_running(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_ends_all_that_was_started_and_starts_nothing(tmp_path, number):
    file = tmp_path / "pid"
    start = f"open({str(tmp_path / 'started')!r}, 'w')"
    jobs = [
        python("a", FAMILY.format(pid=file)),
        python("b", start, needs=("a",)),
        python("c", start),
    ]

    def interrupt():
        wait_for(file)
        os.kill(os.getpid(), number)

    before, others = signal.getsignal(number), set(psutil.Process().children())
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        LocalExecutor(cores=1, gpus=()).run(jobs)
    assert ends(wait_for(file))
    assert set(psutil.Process().children()) <= others  # such as a server of kernels
    assert not (tmp_path / "started").exists()
    assert signal.getsignal(number) is before


CHECKPOINT = """
import pathlib, signal, sys, time
folder = pathlib.Path({folder!r})
def save(number, frame):
    time.sleep(0.3)
    (folder / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(folder / "pid.partial").write_text("1")
(folder / "pid.partial").rename(folder / "pid")
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("number", "saved"), [(signal.SIGTERM, True), (signal.SIGINT, False)]
)
def test_who_is_asked_to_end_lets_its_jobs_take_a_checkpoint(tmp_path, number, saved):
    def interrupt():
        wait_for(tmp_path / "pid")
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    job = python("a", CHECKPOINT.format(folder=str(tmp_path)))
    with pytest.raises(KeyboardInterrupt):
        LocalExecutor(cores=1, gpus=()).run([job])
    assert (tmp_path / "saved").exists() == saved


def test_a_job_without_gpus_sees_none(tmp_path):
    told = "import os; open({!r}, 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [
        python(name, told.format(str(tmp_path / name)), gpus=n)
        for name, n in (("none", 0), ("one", 1))
    ]
    LocalExecutor(cores=1, gpus=("4", "5")).run(jobs)
    assert (tmp_path / "none").read_text() == ""
    assert (tmp_path / "one").read_text() == "4"


KILLED = """
import sys
from rlreason.execution.jobs import Job
from rlreason.execution.local import LocalExecutor
LocalExecutor(cores=1, gpus=()).run([Job("a", [sys.executable, "-c", sys.argv[1]])])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells of a parent")
def test_a_job_does_not_outlive_the_process_that_started_it_however_it_ends(tmp_path):
    program = (
        f"import os, pathlib, time; file = pathlib.Path({str(tmp_path / 'pid')!r})\n"
        "file.with_suffix('.partial').write_text(str(os.getpid()))\n"
        "file.with_suffix('.partial').rename(file); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", KILLED, program])
    job = wait_for(tmp_path / "pid")
    process.kill()
    process.wait()
    assert ends(job)


def test_a_job_whose_lock_another_process_holds_is_asked_for_again_later(tmp_path):
    lock, held = tmp_path / "lock", FileLock(tmp_path / "lock", thread_local=False)
    done = tmp_path / "done"

    def finish_elsewhere(outcome):
        if outcome.name == "b":
            done.touch()
            held.release()

    held.acquire()
    jobs = [python("a", "1 / 0", lock=lock, fresh=done.is_file), python("b")]
    outcomes = LocalExecutor(cores=1, gpus=(), finished=finish_elsewhere).run(jobs)
    assert [(o.name, o.state) for o in outcomes.values()] == [
        ("b", "done"),
        ("a", "fresh"),
    ]
    FileLock(lock).acquire(timeout=0)  # and let go


def test_no_more_jobs_are_held_than_there_may_be_open_files(tmp_path, monkeypatch):
    """With a thousand jobs in Slurm's queue, their locks were more than that."""
    held, most = [], []

    class Queue:
        lag = 0.0

        def has_room(self, job):
            return True

        def start(self, job):
            held.append(job.name)
            most.append(len(held))

        def ended(self):
            return [Outcome(held.pop(), "done")] if held else []

        def stop(self, grace):
            assert not held

    monkeypatch.setattr("rlreason.execution.schedule.most_held", lambda: 2)
    jobs = [python(name, lock=tmp_path / name) for name in "abcde"]
    outcomes = run_jobs(jobs, Queue(), report=most.count, finished=most.count)
    assert {outcome.state for outcome in outcomes.values()} == {"done"}
    assert max(most) == 2


def test_all_that_a_job_prints_is_in_its_log_and_the_end_is_told(tmp_path):
    log = tmp_path / "log.txt"
    program = "import sys; print('out', flush=True); sys.exit('rlreason: mend it')"
    executor = LocalExecutor(cores=1, gpus=())
    (outcome,) = executor.run([python("a", program, log=log)]).values()
    assert outcome.message == "mend it"
    assert log.read_text() == "out\nrlreason: mend it\n"


def test_a_killed_tree_is_gone_and_one_that_has_ended_is_no_fault(tmp_path):
    program = FAMILY.format(pid=tmp_path / "pid")
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    child = wait_for(tmp_path / "pid")
    kill_tree(process.pid)
    assert process.wait() == -signal.SIGKILL
    assert ends(child)
    kill_tree(process.pid)


def test_an_odd_job_fails_alone(tmp_path):
    """One that a signal without a name ends, one whose freshness cannot be told."""

    def unreadable() -> bool:
        raise ValueError("status.json is damaged")

    def job(name: str, code: str, **more) -> Job:
        return Job(name, [sys.executable, "-c", code], **more)

    jobs = [
        job("signal", "import os; os.kill(os.getpid(), 40)"),
        job("unreadable", "", fresh=unreadable),
        Job("nul", [sys.executable, "a\0b"]),
        job("right", "print(1)"),
    ]
    outcomes = LocalExecutor(cores=2, gpus=()).run(jobs)
    assert [outcomes[j.name].state for j in jobs] == ["failed"] * 3 + ["done"]
    assert outcomes["unreadable"].told == "status.json is damaged"


class Elsewhere:
    """A place where all goes well; its files are seen here after a while, or never."""

    def __init__(self, lag: float) -> None:
        self.lag = lag
        self.jobs: list[Job] = []

    def has_room(self, job: Job) -> bool:
        return True

    def start(self, job: Job) -> None:
        self.jobs.append(job)

    def ended(self) -> list[Outcome]:
        ended, self.jobs = self.jobs, []
        return [Outcome(job.name, "done") for job in ended]

    def stop(self, grace: float) -> None:
        pass


@pytest.mark.parametrize(
    ("lag", "looks", "states"),
    [
        (600.0, [False, False, True], ["done", "done"]),
        (0.0, [False, False, True], ["failed", "blocked"]),
        (0.0, [OSError("stale"), True], ["failed", "blocked"]),
    ],
)
def test_what_ended_well_elsewhere_has_left_its_result(lag, looks, states):
    said = iter(looks)

    def there() -> bool:
        look = next(said)
        if isinstance(look, OSError):
            raise look
        return look

    jobs = [Job("a", (), there=there), Job("b", (), needs=("a",))]
    noted: list[Outcome] = []
    outcomes = run_jobs(
        jobs, Elsewhere(lag), report=lambda job: None, finished=noted.append
    )
    assert [outcomes[name].state for name in "ab"] == states
    assert list(outcomes.values()) == noted
    if states[0] == "failed":
        assert "its result is not there" in outcomes["a"].told

"""Jobs as array jobs of Slurm, whose programs are played by one of ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlreason.execution.jobs import Job, JobError
from rlreason.execution.slurm import SlurmExecutor, log_of, write_script
from rlreason.runs.environment import make_folder

# Carries out an array when it is submitted, and tells of it in the next look but one
PROGRAM = """
import json, os, pathlib, re, subprocess, sys
here = pathlib.Path(__file__).parent
state = here / "state.json"
jobs = json.loads(state.read_text()) if state.is_file() else {}
name = pathlib.Path(sys.argv[0]).name
with (here / "asked").open("a") as file:
    file.write(" ".join([name, *sys.argv[1:]]) + "\\n")
if name == "sbatch":
    script = pathlib.Path(sys.argv[-1]).read_text()
    array = 100 + len(list(here.glob("array-*")))
    (here / f"array-{array}.sh").write_text(script)
    for index in range(int(re.search(r"--array=0-(\\d+)", script)[1]) + 1):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(index)}
        done = subprocess.run(["bash", sys.argv[-1]], env=environment)
        words = {0: "COMPLETED", 9: "TIMEOUT", 7: "RUNNING"}
        word = words.get(done.returncode, "FAILED")
        jobs[f"{array}_{index}"] = {"state": word, "looks": 0}
    print(f"{array};cluster")
elif name == "sinfo":
    print("(null)")
elif name == "scancel":
    pass
elif name == "scontrol":
    print("MaxArraySize            = 2")
else:
    for number, job in jobs.items():
        job["looks"] += 1
        word = "PENDING" if job["looks"] == 1 else job["state"]
        if name == "sacct":
            print(f"{number}|{word}")
        elif word == "PENDING":  # squeue forgets what has ended
            print(f"{number}|{word}")
state.write_text(json.dumps(jobs))
"""


class Slurm:
    """A folder of Slurm's programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "play.py").write_text(f"#!{sys.executable}\n{PROGRAM}")
        (folder / "play.py").chmod(0o755)

    def have(self, *names: str) -> None:
        for name in names:
            (self.folder / name).symlink_to("play.py")

    def asked(self, name: str) -> list[str]:
        lines = (self.folder / "asked").read_text().splitlines()
        return [line for line in lines if line.split()[0] == name]

    def scripts(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("array-*"))]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm with accounts; a test takes away what it does without."""
    slurm = Slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(slurm.folder), prepend=os.pathsep)
    slurm.have("sbatch", "sacct", "squeue", "sinfo", "scancel")
    return slurm


def python(name: str, program: str = "", **options) -> Job:
    return Job(name, [sys.executable, "-c", program], **options)


def executor(tmp_path: Path, **more) -> SlurmExecutor:
    return SlurmExecutor(tmp_path / "slurm", every=0.0, **more)


def mixed() -> list[Job]:
    """Jobs of every end."""
    return [
        python("a", "import os; print(os.environ['X'])", environment={"X": "it's"}),
        python("b", "1 / 0"),
        python("c", needs=("a",), cores=2, memory=300, gpus=1),
        python("d", needs=("b",)),
        python("e", "import sys; sys.exit(9)"),
        python("f", needs=("a",), cores=2, memory=300, gpus=1),
    ]


@pytest.mark.parametrize("accounted", [True, False])
def test_what_can_run_is_one_array_and_states_are_read_back(slurm, tmp_path, accounted):
    if not accounted:
        (slurm.folder / "sacct").unlink()
    outcomes = executor(tmp_path).run(mixed())
    states = {name: outcome.state for name, outcome in outcomes.items()}
    done, failed = dict.fromkeys("acf", "done"), dict.fromkeys("be", "failed")
    assert states == done | failed | {"d": "blocked"}
    assert outcomes["a"].told == "it's"
    assert outcomes["b"].told.endswith("ZeroDivisionError: division by zero")
    if accounted:
        assert outcomes["e"].told == "ended by Slurm: TIMEOUT"
    first, second = slurm.scripts()
    assert "#SBATCH --array=0-2\n" in first
    assert "#SBATCH --cpus-per-task=1\n" in first
    assert "#SBATCH --array=0-1\n" in second
    assert "#SBATCH --cpus-per-task=2\n" in second
    assert "#SBATCH --mem=300M\n" in second
    assert "--gpus" not in second  # sinfo tells of none


def test_a_job_sees_the_folders_of_whoever_asked_wherever_it_begins(
    tmp_path, monkeypatch, runs
):
    here = make_folder(tmp_path / "it's here")
    monkeypatch.chdir(here)
    monkeypatch.setenv("RLREASON_DATA", "data")
    monkeypatch.setenv("RLREASON_MODELS", "/models")
    show = (
        "import os; print(os.getcwd(), *(os.environ.get(f'RLREASON_{n}') for n in N))"
    )
    show = f"N = 'RUNS', 'DATA', 'MODELS'; {show}"
    path, _ = write_script(tmp_path, [job := python("a", show)], gpus=False)
    bare = {"PATH": os.defpath, "SLURM_ARRAY_TASK_ID": "0"}
    subprocess.run(["bash", path], cwd="/", env=bare, check=True)
    told = log_of(job, tmp_path).read_text()
    assert told == f"{here} {runs} {here / 'data'} /models\n"


def test_more_jobs_than_an_array_may_have_are_several_arrays(
    slurm, tmp_path, monkeypatch
):
    slurm.have("scontrol")  # which says that it may have two
    jobs = [python(name) for name in "abcde"]
    outcomes = executor(tmp_path).run(jobs)
    assert {outcome.state for outcome in outcomes.values()} == {"done"}
    ends = [re.search(r"--array=0-(\d+)", script)[1] for script in slurm.scripts()]
    assert ends == ["1", "1", "0"]
    # Where it is not known, as many as Slurm takes unless told otherwise
    monkeypatch.setenv("PATH", str(tmp_path))
    shown, jobs = [], [python(str(n)) for n in range(1002)]
    with pytest.raises(JobError, match="there is no sbatch"):
        executor(tmp_path, show=shown.append).run(jobs)
    ends = [re.search(r"--array=0-(\d+)", script)[1] for script in shown]
    assert ends == ["1000", "0"]


def test_a_job_that_still_runs_is_found_again_and_not_submitted_twice(slurm, tmp_path):
    class KilledError(Exception):
        """What ends the process that asked."""

    def kill(job):
        raise KilledError

    running = python("a", "import sys; sys.exit(7)")  # Slurm tells that it runs
    place = executor(tmp_path, finished=kill)
    with pytest.raises(KilledError):
        place.run([running, python("b")])
    state = slurm.folder / "state.json"
    state.write_text(state.read_text().replace("RUNNING", "COMPLETED", 1))
    state.write_text(state.read_text().replace('"looks": 2', '"looks": 0'))
    assert executor(tmp_path).run([running])["a"].state == "done"
    assert len(slurm.asked("sbatch")) == 1
    assert slurm.asked("scancel") == ["scancel 100_0"]


@pytest.mark.parametrize("line", ["100_[0-1]", "100_[0,1%1]", "100_[0-1:1]"])
def test_an_array_that_is_cancelled_before_it_begins_is_one_line(slurm, tmp_path, line):
    """None of its jobs was known by it, and the batch waited for ever."""
    (slurm.folder / "sacct").unlink()
    (slurm.folder / "sacct").write_text(f"#!/bin/sh\necho '{line}|CANCELLED by 0'")
    (slurm.folder / "sacct").chmod(0o755)
    outcomes = executor(tmp_path).run([python("a"), python("b")])
    for name in "ab":
        assert outcomes[name].told.endswith("ended by Slurm: CANCELLED")


def test_a_job_that_slurm_refuses_fails_with_its_words(slurm, tmp_path):
    (slurm.folder / "sbatch").unlink()
    (slurm.folder / "sbatch").write_text("#!/bin/sh\necho no such account >&2; exit 1")
    (slurm.folder / "sbatch").chmod(0o755)
    outcomes = executor(tmp_path).run([python("a"), python("b", needs=("a",))])
    assert outcomes["a"].message.endswith("no such account")
    assert outcomes["b"].state == "blocked"


def test_where_there_is_no_sbatch_the_scripts_are_printed_in_their_order(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    shown = []
    jobs = [*mixed(), python("g", fresh=lambda: True)]
    with pytest.raises(JobError) as caught:
        executor(tmp_path, show=shown.append).run(jobs)
    commands = str(caught.value).splitlines()[1:]
    assert len(commands) == len(shown) == 3
    assert commands[0].startswith("job0=$(sbatch --parsable /")
    for command in commands[1:]:
        assert "--dependency=afterany:$job0 /" in command
    assert "-c" in shown[0]
    assert "ZeroDivisionError" not in "".join(shown)
    assert sum("--gpus=1" in script for script in shown) == 1
    assert not list(tmp_path.glob("**/*.log"))


def test_a_job_that_is_asked_to_end_saves_before_its_script_does(tmp_path):
    saving = (
        "import pathlib, signal, sys, time\n"
        "def save(number, frame):\n"
        "    time.sleep(0.3)\n"
        "    print('saved', flush=True)\n"
        "    sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(600)"
    )
    job = python("a", saving)
    path, _ = write_script(make_folder(tmp_path / "slurm"), [job], gpus=False)
    script = subprocess.Popen(
        ["bash", path],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"},
        start_new_session=True,
    )
    while not (tmp_path / "up").exists():
        assert script.poll() is None
        time.sleep(0.02)
    os.killpg(script.pid, signal.SIGTERM)  # all of it, as slurmd does
    assert script.wait() == 7
    log = log_of(job, tmp_path / "slurm")
    assert log.read_text() == "saved\n"
    assert log.with_name(log.name + ".exit").read_text() == "7\n"


def test_what_is_not_to_be_made_keeps_no_other_script_from_being_printed(
    tmp_path, monkeypatch
):
    def refuse():
        raise JobError("it failed before")

    monkeypatch.setenv("PATH", str(tmp_path))
    shown, ended = [], []
    jobs = [python("a", fresh=refuse), python("b")]
    with pytest.raises(JobError, match="there is no sbatch"):
        executor(tmp_path, show=shown.append, finished=ended.append).run(jobs)
    assert len(shown) == 1
    assert [(one.name, one.state) for one in ended] == [("a", "failed")]

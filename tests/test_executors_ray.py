"""Jobs on a Ray cluster: a worker that is killed costs no job, and none runs twice."""

from __future__ import annotations

import functools
import inspect
import io
import os
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from rlreason.execution.jobs import Job, JobError
from rlreason.execution.on_ray import RayExecutor, carry_out_on_worker, pack, unpack


def be_patient(monkeypatch) -> None:
    """Let Ray start on a busy machine: it awaits its helpers' ports 15 s, fixed.

    The dashboard's, which are none here, are written down before it asks.
    """
    services = pytest.importorskip("ray._private.services")
    start = services.start_raylet

    @functools.wraps(start)
    def patient(*args, **kwargs):
        given = inspect.signature(start).bind(*args, **kwargs).arguments
        for kind in ("metrics_agent", "metrics_export", "dashboard_agent_listen"):
            file = Path(given["session_dir"], f"{kind}_port_{given['node_id']}")
            file.write_text("-1")
        return start(*args, **kwargs)

    monkeypatch.setattr(services, "start_raylet", patient)


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


@pytest.fixture
def cluster(monkeypatch):
    """A head that runs no jobs, and two workers."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    be_patient(monkeypatch)
    # A worker's death is soon noticed
    config = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": config}
    head["runtime_env_agent_port"] = free_port()
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(
            num_cpus=1, memory=500 * 2**20, runtime_env_agent_port=free_port()
        )
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    before = signal.getsignal(signal.SIGTERM)
    yield cluster
    cluster.shutdown()
    signal.signal(signal.SIGTERM, before)  # Ray takes it over, and keeps it


# Where it is to be killed: says by whom it was started, and waits for it
PROGRAM = """
import os, time
folder, name, wait = {folder!r}, {name!r}, {wait}
with open(folder + "/begun", "a") as file:
    file.write(f"{{name}} {{os.getpid()}} {{os.environ['RAY_RAYLET_PID']}}\\n")
while wait and open(folder + "/begun").read().count(name) == 1:
    time.sleep(0.01)
with open(folder + "/ended", "a") as file:
    file.write(name + "\\n")
"""


def job(folder: Path, name: str, *, wait: bool = False, **more) -> Job:
    program = PROGRAM.format(folder=str(folder), name=name, wait=wait)
    return Job(name, [sys.executable, "-c", program], **more)


def begun(folder: Path, name: str) -> list[tuple[int, int]]:
    """Process and raylet of every time that a job was begun."""
    file = folder / "begun"
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [line.split() for line in lines if line.endswith(tuple("0123456789"))]
    return [(int(pid), int(raylet)) for word, pid, raylet in found if word == name]


def kill_worker_of(cluster, folder: Path, name: str) -> None:
    """Kill the machine on which a job runs, by SIGKILL."""
    while not (found := begun(folder, name)):
        time.sleep(0.05)
    for node in cluster.worker_nodes:
        if node.all_processes["raylet"][0].process.pid == found[0][1]:
            node.kill_raylet()


def test_a_killed_worker_costs_no_job_and_each_is_counted_once(cluster, tmp_path):
    jobs = [
        job(tmp_path, "before"),
        job(tmp_path, "killed", wait=True, needs=("before",)),
        job(tmp_path, "beside", needs=("before",)),
        job(tmp_path, "after", needs=("killed",)),
        Job("wrong", [sys.executable, "-c", "1 / 0"]),
        job(tmp_path, "blocked", needs=("wrong",)),
    ]
    counted = []
    killer = threading.Thread(
        target=kill_worker_of, args=(cluster, tmp_path, "killed"), daemon=True
    )
    killer.start()
    outcomes = RayExecutor(finished=lambda o: counted.append(o.name)).run(jobs)
    states = {name: outcome.state for name, outcome in outcomes.items()}
    assert states == {
        **dict.fromkeys(["before", "killed", "beside", "after"], "done"),
        "wrong": "failed",
        "blocked": "blocked",
    }
    assert outcomes["wrong"].told.endswith("ZeroDivisionError: division by zero")
    assert sorted(counted) == sorted(states)
    ended = (tmp_path / "ended").read_text().split()
    assert sorted(ended) == ["after", "before", "beside", "killed"]
    (first, its_worker), (second, another) = begun(tmp_path, "killed")
    assert its_worker != another
    assert second != first
    with pytest.raises(ProcessLookupError):  # it went with its worker
        os.kill(first, 0)
    big = job(tmp_path, "big", memory=10**6)
    with pytest.raises(JobError, match="big asks for 1000000 MB"):
        RayExecutor().run([big])


def test_without_ray_one_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(JobError, match=r"pip install 'rlreason\[cluster\]'"):
        RayExecutor().run([])


def test_where_the_folder_of_runs_is_not_shared_files_travel_with_the_job(tmp_path):
    plan, need, run = (tmp_path / name for name in ("plan.json", "sft-1", "ppo-2"))
    plan.write_text("the plan")
    need.mkdir()
    (need / "weights").write_text("the weights")
    program = (
        "import pathlib, sys\nplan, need, run = map(pathlib.Path, sys.argv[1:])\n"
        "run.mkdir(); (run / 'lock').touch(); print('begun')\n"
        "text = plan.read_text() + (need / 'weights').read_text()\n"
        "(run / 'result').write_text(text)"
    )
    there = Job(
        "ppo",
        ["python of whoever asked", "-c", program, *map(str, (plan, need, run))],
        log=tmp_path / "logs" / "log.txt",
        reads=(plan, need),
        writes=(run,),
    )
    files = pack(there.reads)
    plan.unlink()
    shutil.rmtree(need)  # another machine has neither, nor the mark
    outcome, back, log = carry_out_on_worker(
        there,
        files,
        tmp_path / "mark",
        python="python of whoever asked",
        folder=tmp_path / "not there",
    )
    assert outcome.state == "done"
    assert log == b"begun\n"
    shutil.rmtree(run)
    with pytest.raises(JobError, match="ppo-2, which it has not named"):
        # The beginning of a name is not its folder
        unpack(back, (tmp_path / "ppo",), whole=True)
    assert not run.exists()
    unpack(back, there.writes, whole=True)
    assert (run / "result").read_text() == "the planthe weights"
    assert not (run / "lock").exists()
    # What a session that was killed here had left is not taken for a part of it
    later = run / "checkpoints" / "9" / "state.json"
    later.parent.mkdir(parents=True)
    later.touch()
    (run / "lock").touch()  # whoever holds it goes on holding it
    unpack(back, there.writes, whole=False)  # of a job that failed: it may go on
    assert later.is_file()
    unpack(back, there.writes, whole=True)
    assert sorted(path.name for path in run.iterdir()) == ["lock", "result"]


def test_a_job_whose_task_is_cancelled_may_take_its_checkpoint(tmp_path):
    saving = (
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "def save(number, frame):\n"
        "    (here / 'saved').touch()\n"
        "    sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(here / 'up').touch()\n"
        "time.sleep(600)"
    )
    there = Job("a", [sys.executable, "-c", saving, str(tmp_path)])

    def cancel():  # as Ray does
        while not (tmp_path / "up").exists():
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        carry_out_on_worker(
            there, b"", tmp_path, python=sys.executable, folder=tmp_path
        )
    assert (tmp_path / "saved").exists()


def test_an_archive_cannot_lead_out_of_what_a_job_has_named(tmp_path):
    run, outside = tmp_path / "ppo-2", tmp_path / "outside"
    run.mkdir()
    up = tarfile.TarInfo(f"{run}/../outside"[1:])
    link = tarfile.TarInfo(f"{run}/link"[1:])
    link.type, link.linkname = tarfile.SYMTYPE, str(outside)
    for member, said in ((up, "has not named"), (link, "no plain file")):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(member, io.BytesIO())
        with pytest.raises(JobError, match=said):
            unpack(buffer.getvalue(), (run,), whole=True)
    assert not outside.exists()
    assert not list(run.iterdir())

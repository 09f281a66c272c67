"""Jobs on a Ray cluster: a worker that is killed costs no job, and none runs twice."""

from __future__ import annotations

import functools
import inspect
import os
import socket
import sys
from pathlib import Path

import pytest

from rlreason.execution.jobs import Job, JobError
from rlreason.execution.on_ray import RayExecutor

ray = pytest.importorskip("ray")
services = pytest.importorskip("ray._private.services")
Cluster = pytest.importorskip("ray.cluster_utils").Cluster


def be_patient(monkeypatch) -> None:
    """Let Ray start on a busy machine: it awaits its helpers' ports 15 s, fixed.

    The dashboard's, which are none here, are written down before it asks.
    """
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
    be_patient(monkeypatch)
    # A worker's death is soon noticed
    config = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": config}
    head["runtime_env_agent_port"] = free_port()
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(
            num_cpus=1, memory=500 * 2**20, runtime_env_agent_port=free_port()
        )
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


# Ends its worker's machine when it is run for the first time, and waits to be ended
PROGRAM = """
import os, signal, time
folder, name, kills = {folder!r}, {name!r}, {kills}
with open(folder + "/begun", "a") as file:
    file.write(f"{{name}} {{os.getpid()}}\\n")
if kills and open(folder + "/begun").read().count(name) == 1:
    os.kill(int(os.environ["RAY_RAYLET_PID"]), signal.SIGKILL)
    while True:
        time.sleep(0.01)
with open(folder + "/ended", "a") as file:
    file.write(name + "\\n")
"""


def job(folder: Path, name: str, *, kills: bool = False, **more) -> Job:
    program = PROGRAM.format(folder=str(folder), name=name, kills=kills)
    return Job(name, [sys.executable, "-c", program], **more)


def test_a_killed_worker_costs_no_job_and_each_is_counted_once(cluster, tmp_path):
    jobs = [
        job(tmp_path, "before"),
        job(tmp_path, "killed", kills=True, needs=("before",)),
        job(tmp_path, "beside", needs=("before",)),
        job(tmp_path, "after", needs=("killed",)),
        Job("wrong", [sys.executable, "-c", "1 / 0"]),
        job(tmp_path, "blocked", needs=("wrong",)),
    ]
    counted = []
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
    begun = [line.split() for line in (tmp_path / "begun").read_text().splitlines()]
    first, second = [int(pid) for name, pid in begun if name == "killed"]
    assert first != second
    with pytest.raises(ProcessLookupError):  # it went with its worker
        os.kill(first, 0)
    big = job(tmp_path, "big", memory=10**6)
    with pytest.raises(JobError, match="big asks for 1000000 MB"):
        RayExecutor().run([big])

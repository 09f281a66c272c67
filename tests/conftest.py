"""What tests share: no hub, runs in a folder of their own, and a cut network."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

# A slow machine is no fault of the code, and a run that fails must fail again
settings.register_profile(
    "seeded",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("seeded")

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported anywhere
sys.modules.setdefault("rfc3987_syntax", None)  # two seconds: see run_notebook


# What starts the suite in the background may have told it to ignore Ctrl-C, and nohup
# a hang-up; its children would too, and tests of interruptions would never end
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (getattr(signal, "SIGHUP", signal.SIGINT), signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


# Tests that take long, each of which may run in another process than its file's others
SPREAD = (
    "test_a_chapter_runs_and_asks_the_network_for_nothing",
    "test_a_dry_run_of_paper_goes_through_all_that_its_tables_need",
    "test_a_grid_of_steps_and_a_notebook_from_the_command_line",
    "test_an_executed_chapter_reads_as_prose_without_myst",
    "test_chapters_in_jupyterlab_read_as_prose_with_their_plumbing_folded",
    "test_gpu_smol_runs_its_stages_and_its_archive_is_taken_over",
)


def is_spread(nodeid: str) -> bool:
    return nodeid.split("::")[1].partition("[")[0] in SPREAD


class ByFile(LoadScopeScheduling):
    """A file's tests share a process, and so its fixtures; those of SPREAD do not.

    Not by xdist's groups, which have no effect with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if is_spread(nodeid) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)  # where xdist is switched off
def pytest_xdist_make_scheduler(config, log):
    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """What is spread takes longest, so it comes first."""
    items.sort(key=lambda item: not is_spread(item.nodeid))


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> Path:
    """Keep the runs of a test out of the checkout."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("RLREASON_RUNS", str(folder))
    return folder


# Python imports sitecustomize by itself at every start, so this reaches the processes
# that a process starts, Jupyter kernels among them
CUT = """
import os, socket

def note_and_refuse(address):
    with open(os.environ["CUT_NETWORK_LOG"], "a") as file:
        file.write(f"{address}\\n")
    raise OSError(f"the network is cut off: {address}")

def is_here(host):
    return host in (None, "", "localhost", "::1") or str(host).startswith("127.")

def guarded(whole):
    def method(self, *args):
        address = args[-1]
        if self.family != getattr(socket, "AF_UNIX", None) and not is_here(address[0]):
            note_and_refuse(address)
        return whole(self, *args)
    return method

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name)))

look_up = socket.getaddrinfo

def getaddrinfo(host, *args, **kwargs):
    host_name = host.decode() if isinstance(host, bytes) else host
    if not is_here(host_name) and host_name != socket.gethostname():
        note_and_refuse(host_name)
    return look_up(host, *args, **kwargs)

socket.getaddrinfo = getaddrinfo
"""


@dataclass(frozen=True)
class CutNetwork:
    """An environment for processes in which only this machine can be reached.

    Attributes:
        environment: Environment variables.
        log: File with a line for every address that was asked for.
    """

    environment: dict[str, str]
    log: Path

    @property
    def attempts(self) -> list[str]:
        """The addresses outside this machine that were asked for."""
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture(scope="session")
def cut_network(tmp_path_factory) -> CutNetwork:
    """Cut the network off: every connection outside this machine fails and is noted."""
    folder = tmp_path_factory.mktemp("cut_network")
    (folder / "sitecustomize.py").write_text(CUT)
    log = folder / "attempts"
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUT_NETWORK_LOG": str(log),
    }
    return CutNetwork(environment, log)

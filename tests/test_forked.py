"""Forked programs are as programs that Python starts, and end with the tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
from forked import begin, ended, run, run_all

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

TELLS = """
import atexit, json, os, sys, threading

atexit.register(print, "bye")
print(json.dumps([
    *(__name__, sys.argv, sys.path[0], os.getcwd(), dict(os.environ)),
    threading.active_count(),
]))
print("torch" in sys.modules, hash("a"), file=sys.stderr)
sys.exit(int(os.environ["CODE"]))
"""
# The end is told by a file, so that what takes long takes no longer than it must
WAITS = """
import os, pathlib, sys, time

child = os.fork()
if child == 0:
    time.sleep(600)
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child} ")
time.sleep(600)
"""


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("code", [0, 3])
def test_it_is_told_what_a_program_is_told_and_says_how_it_ended(
    code, write, tmp_path, monkeypatch
):
    program, environment = write("tells.py", TELLS), {"CODE": str(code), "A": "b"}
    monkeypatch.setenv("NOT_GIVEN", "1")
    monkeypatch.chdir(tmp_path)
    said = []
    for fresh in (False, True):
        streams = tmp_path / "out", tmp_path / "err"
        arguments = [program, "one", "--two"]
        with ended() as started:
            started.append(begin(arguments, environment, streams=streams, fresh=fresh))
            assert started[0].wait() == code
        first, bye = streams[0].read_text().splitlines()
        told = json.loads(first)
        # What Python itself, or the machine's, puts there at a start
        told[4] = {name: told[4].get(name) for name in (*environment, "NOT_GIVEN")}
        said.append([told, bye, *streams[1].read_text().split()])
    (forked, *_, imported, own), (fresh, *_, not_yet, other) = said
    assert forked == fresh
    assert forked[0] == "__main__"
    assert forked[-1] == 1  # threads: whatever it is, it may fork
    assert (imported, not_yet) == ("True", "False")
    assert own != other  # what is begun fresh has hashes of its own


def test_a_module_is_carried_out_as_a_command():
    assert run(["-m", "rlreason.cli", "--version"], os.environ).startswith("rlreason, ")


def test_an_error_is_told_with_its_traceback(write):
    with pytest.raises(AssertionError, match=r"1 / 0\n(.*\n)*ZeroDivisionError"):
        run([write("fails.py", "1 / 0")], os.environ)


def pids(path, count: int) -> list[int]:
    """Numbers that a program wrote into a file, once they are there."""
    for _ in range(6000):
        with suppress(FileNotFoundError):
            found = path.read_text().split()
            if len(found) == count:
                return [int(each) for each in found]
        time.sleep(0.01)
    raise AssertionError("the program did not start")


def are_gone(found: list[int]) -> bool:
    """Whether none of the processes is left in 60 seconds."""
    for _ in range(6000):
        left = []
        for pid in found:
            with suppress(psutil.NoSuchProcess):
                left.append(psutil.Process(pid).status())
        if set(left) <= {psutil.STATUS_ZOMBIE}:  # of whom a killed parent had to know
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_it_and_nothing_of_it_is_left(number, write, tmp_path):
    streams = tmp_path / "out", tmp_path / "err"
    arguments = [write("waits.py", WAITS), tmp_path / "pids"]
    with ended() as started:
        started.append(begin(arguments, os.environ, streams=streams))
        found = pids(tmp_path / "pids", 2)
        assert found[0] == started[0].pid
        assert started[0].poll() is None
        started[0].send_signal(number)
        interrupted = number == signal.SIGINT
        assert started[0].wait() == (1 if interrupted else -number)
        assert ("KeyboardInterrupt" in streams[1].read_text()) == interrupted
    assert are_gone(found)


def test_where_one_fails_the_others_are_ended(write, tmp_path):
    waits = [write("waits.py", WAITS), tmp_path / "pids"]
    fails = [write("fails.py", "1 / 0")]
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_all([waits, fails], [os.environ] * 2)
    found = pids(tmp_path / "pids", 2)
    assert are_gone(found)


BEGINS = """
import os, sys, time
import forked
forked.IMPORTED = []
forked.begin(sys.argv[1:], os.environ, streams=[])
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends it")
def test_it_ends_with_the_process_that_began_it_however_that_ends(write, tmp_path):
    waits = [write("waits.py", WAITS), tmp_path / "pids"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", BEGINS, *waits]
    with subprocess.Popen(command, env=environment) as process:
        try:
            found = pids(tmp_path / "pids", 2)
            assert not {psutil.STATUS_ZOMBIE} & {
                psutil.Process(pid).status() for pid in found
            }
        finally:
            process.kill()
    assert are_gone(found)


def test_the_network_is_cut_off_for_what_is_forked_after_another(
    write, cut_network, tmp_path
):
    ask = "import socket; socket.getaddrinfo('example.org', 80)"
    program, log = write("asks.py", ask), tmp_path / "attempts"
    run([write("first.py", "print(1)")], os.environ)  # whose network is whole
    with pytest.raises(AssertionError, match="the network is cut off"):
        run([program], {**cut_network.environment, "CUT_NETWORK_LOG": str(log)})
    assert log.read_text() == "example.org\n"

"""The tests' own programs, in processes forked from one that has imported what is slow.

``run`` and ``begin`` stand in for ``subprocess``: a program of Python, its arguments,
environment, output and end are as there, in a twentieth of the time. One server for
each test process imports torch and the library; it starts with the first program.

What Python and its libraries read only when they start is the server's: the seed of
hashes, the processor's abilities, the memory allocator. Programs that are about those
are begun ``fresh``, and so are all where a process cannot fork.

On Linux a program, with what it has forked, ends with the process that began it,
however that ends.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

IMPORTED = ["rlreason.runs.steps", "torch._dynamo", "toys"]  # of programs
IMPORTED += ["ipykernel.kernelapp", "rlreason.publishing.chapter"]  # of kernels
IMPORTED += ["rlreason.publishing.figures", "smoke_book"]
INLINE = "module://matplotlib_inline.backend_inline"  # as a kernel sets it, but sooner


class Forked:
    """A process of the server's, with the methods of ``subprocess.Popen``.

    Args:
        work: What it does, with ``given``: a function of a module.
        environment: All of it.
        cwd: The folder it works in.
        streams: Files for its standard output and error; those of the server if none.
    """

    stdin = stdout = stderr = None

    def __init__(
        self,
        work: Callable[..., None],
        given: Sequence[Any],
        environment: Mapping[str, str],
        cwd: str | Path,
        streams: Sequence[Path] = (),
    ) -> None:
        fork = multiprocessing.get_context("forkserver")
        fork.set_forkserver_preload(IMPORTED)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MPLBACKEND", INLINE)
            # The server finds the tests' own modules by nothing else
            here = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, here)))
            forkserver.ensure_running()
        ready, tell = fork.Pipe(duplex=False)
        all_given = (work, given, dict(environment), str(cwd), streams, tell)
        self.process = fork.Process(target=_work, args=all_given, daemon=True)
        self.process.start()
        tell.close()
        ready.recv()  # only then is it the group of its own that will be killed
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def begin(
    arguments: Sequence[str | Path],
    environment: Mapping[str, str],
    *,
    streams: Sequence[Path],
    fresh: bool = False,
) -> Forked | subprocess.Popen:
    """Start a program as ``python *arguments`` would be: a file, or "-m" and a module.

    Args:
        streams: Files for its standard output and error.
        fresh: As a process that imports everything itself.
    """
    arguments = [str(each) for each in arguments]
    if hasattr(os, "fork") and not fresh:
        return Forked(_be_python, (arguments,), environment, os.getcwd(), streams)
    with ExitStack() as opened:
        out, err = (opened.enter_context(path.open("wb")) for path in streams)
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, env=environment, stdout=out, stderr=err)


def run(arguments: Sequence[str | Path], environment: Mapping[str, str]) -> str:
    """Carry out one program, which must come to a good end, and return its output."""
    (said,) = run_all([arguments], [environment])
    return said


def run_all(
    programs: Sequence[Sequence[str | Path]],
    environments: Sequence[Mapping[str, str]],
    *,
    fresh: Sequence[int] = (),
) -> list[str]:
    """Carry out programs beside each other, of which some may be begun ``fresh``.

    Where one fails the others are ended.
    """
    with TemporaryDirectory() as place:
        files = [
            (Path(place, f"{i}.out"), Path(place, f"{i}.err"))
            for i in range(len(programs))
        ]
        with ended() as started:
            for i, (arguments, environment) in enumerate(
                zip(programs, environments, strict=True)
            ):
                options = {"streams": files[i], "fresh": i in fresh}
                started.append(begin(arguments, environment, **options))
            while None in (codes := [each.poll() for each in started]):
                if any(codes):  # a rank would wait for one that failed, for days
                    break
                time.sleep(0.02)
        errors = "".join(err.read_text() for _, err in files)
        assert codes == [0] * len(codes), errors
        return [out.read_text() for out, _ in files]


@contextmanager
def ended():
    """A list whose processes are no more when the block is left, however that is."""
    started: list[Forked | subprocess.Popen] = []
    try:
        yield started
    finally:
        for each in started:
            # What a program has forked may be there when the program is no more
            end = os.killpg if isinstance(each, Forked) else os.kill
            if end is os.killpg or each.poll() is None:
                with suppress(ProcessLookupError, PermissionError):  # gone already
                    end(each.pid, signal.SIGKILL)
            each.wait()


# In the process that is forked


def _work(
    work: Callable[..., None],
    given: Sequence[Any],
    environment: Mapping[str, str],
    cwd: str,
    streams: Sequence[Path],
    tell: Connection,
) -> None:
    import torch

    os.setsid()
    _end_with_the_one_that_began_it()
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    tell.send(True)
    tell.close()
    os.environ.clear()
    os.environ.update(environment)
    _see_to_the_path()
    threads = int(environment.get("OMP_NUM_THREADS", torch.get_num_threads()))
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    os.chdir(cwd)
    try:
        work(*given)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def _end_with_the_one_that_began_it() -> None:
    """Be killed, with all of this group, where a pipe to it is closed."""
    if sys.platform != "linux":
        return
    import fcntl
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process().sentinel
    fcntl.fcntl(parent, fcntl.F_SETOWN, -os.getpgid(0))
    fcntl.fcntl(parent, 10, signal.SIGKILL)  # F_SETSIG, which fcntl does not name
    flags = fcntl.fcntl(parent, fcntl.F_GETFL)
    fcntl.fcntl(parent, fcntl.F_SETFL, flags | os.O_ASYNC)
    if wait([parent], 0):  # it was closed before
        os.killpg(0, signal.SIGKILL)


def _see_to_the_path() -> None:
    """What Python does with PYTHONPATH, ``sitecustomize`` included."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    new = [folder for folder in named if folder and folder not in sys.path]
    sys.path[:0] = new
    for folder in new:
        if (file := Path(folder, "sitecustomize.py")).exists():
            runpy.run_path(str(file), run_name="sitecustomize")


def _be_python(arguments: list[str]) -> None:
    """What ``python *arguments`` does."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent.absolute()))
        runpy.run_path(arguments[0], run_name="__main__")

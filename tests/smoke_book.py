"""The repository's book at the profile smoke, shared by all test processes.

Its notebooks are executed once, wherever they are first asked for; who asks meanwhile
waits. ``RLREASON_RUNS`` must be ``runs`` in the root. The first one has a kernel as
readers have it; the others' are forked from a process that has imported what takes
long, which halves their time.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from forked import INLINE, Forked
from jupyter_client.provisioning import local_provisioner
from toys import Here

from rlreason.publishing.notebooks import (
    Notebook,
    Record,
    notebook_digest,
    read_record,
    run_notebook,
)
from rlreason.runs.environment import results_folder, runs_root, source_digest
from rlreason.runs.profiles import load_profile

REPOSITORY = Path(__file__).parents[1]
FRESH = "00_tour"


class ForkedKernel(Forked):
    """The process of a kernel, in place of what ``subprocess.Popen`` would start."""

    def __init__(self, command: list[str], **options: Any) -> None:
        folder = options.get("cwd") or os.getcwd()
        super().__init__(be_a_kernel, (command[3:],), options["env"], folder)


def be_a_kernel(arguments: list[str]) -> None:
    """What ``python -m ipykernel_launcher`` does."""
    from ipykernel import kernelapp

    from rlreason.execution import seeds

    # What a chapter trains on other seeds needs no processes that load torch; that a
    # seed is trained by one is for test_seeds
    seeds.LocalExecutor = Here
    os.environ["JPY_PARENT_PID"] = str(os.getppid())
    kernelapp.launch_new_instance(argv=arguments)


def smoke_root(tmp_path_factory) -> Path:
    """A copy of the book and the notebooks, the same for all test processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    root = folder / "smoke"
    with FileLock(folder / "smoke.lock"):
        if not root.is_dir():
            junk = shutil.ignore_patterns("_build", ".*")
            for name in ("book", "notebooks"):
                shutil.copytree(REPOSITORY / name, root / name, ignore=junk)
    return root


def run_chapter(notebook: Notebook) -> Record:
    """Execute a notebook where the book looks for it, unless that is done."""
    book = runs_root() / "book" / "smoke"
    outputs = book / "notebooks"
    outputs.mkdir(parents=True, exist_ok=True)
    results = results_folder("smoke")
    digest = notebook_digest(notebook, load_profile("smoke"), results=results)
    with FileLock(outputs / f"{notebook.name}.lock"), pytest.MonkeyPatch.context() as m:
        record = read_record(notebook.name, outputs)
        if record is not None and record.digest == digest:
            return record
        m.setenv("RLREASON_RUNS", str(book / source_digest()))
        if notebook.name != FRESH and hasattr(os, "fork"):
            m.setattr(local_provisioner, "launch_kernel", ForkedKernel)
            m.setenv("MPLBACKEND", INLINE)
        return run_notebook(notebook, profile_name="smoke", folder=outputs)

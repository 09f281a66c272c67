"""Executors by name, as the command line takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlreason.execution.jobs import Executor, Job, Outcome
from rlreason.execution.local import LocalExecutor

EXECUTORS = ("local", "ray", "slurm")


def executor_named(
    name: str,
    *,
    folder: Path,
    cores: int | None = None,
    report: Callable[[Job], object] = lambda job: None,
    finished: Callable[[Outcome], object] = lambda outcome: None,
) -> Executor:
    """Return an executor.

    Args:
        name: One of ``EXECUTORS``.
        folder: Takes what it has to write down, e.g. the scripts of Slurm.
        cores: How many of this machine may be in use; a cluster knows its own.
        report: Called with each job when it is started.
        finished: Called with each outcome when it is there.
    """
    calls = {"report": report, "finished": finished}
    if name == "ray":
        from rlreason.execution.on_ray import RayExecutor

        return RayExecutor(**calls)
    if name == "slurm":
        from rlreason.execution.slurm import SlurmExecutor

        return SlurmExecutor(folder / "slurm", **calls)
    return LocalExecutor(**({"cores": cores} if cores else {}), **calls)

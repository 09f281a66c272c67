"""Runs as jobs: several seeds, or any plans, at once, each trained once.

::

    runs = train_seeds(recipe, "ppo", seeds=range(4))
    runs = carry_out([plan_of("ppo", each, seed=0) for each in recipes])

A plan goes to its job as a file, so that ``rlreason train PLAN.json`` is all that a
job does, here or on another machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from rlreason.execution.jobs import Executor, Job, JobError, Outcome
from rlreason.execution.local import LocalExecutor
from rlreason.policy.progress import tell
from rlreason.runs.environment import make_folder, runs_root
from rlreason.runs.files import write_atomically
from rlreason.runs.plans import Plan, folder_of, obtain, plan_of
from rlreason.runs.recipes import Recipe
from rlreason.settings import canonical_json

QUIET = {"RLREASON_QUIET": "1"}  # whoever started a job tells of it


def train_seeds(recipe: Recipe, step: str, seeds: Iterable[int]) -> list[Any]:
    """Train several seeds at once, one single-threaded process a core, or a GPU.

    Those that are done are loaded.

    Args:
        recipe: What is trained.
        step: "sft", "expert-iteration", "ppo", "orm", "rcrl": as in ``rlreason train``.
        seeds: A run each.

    Returns:
        What ``obtain`` gives, a seed.
    """
    return carry_out([plan_of(step, recipe, seed) for seed in seeds])


def carry_out(plans: Sequence[Plan], executor: Executor | None = None) -> list[Any]:
    """Train what is not trained yet, each run once, and those it needs before it.

    Args:
        plans: Of any steps.
        executor: Processes of this machine where not given.

    Returns:
        What ``obtain`` gives, in the order of the plans.

    Raises:
        JobError: A run cannot be carried out; says what is to be mended.
        RuntimeError: A run failed; holds the end of what it printed.
    """
    todo = missing(plans)
    if todo:
        if torch.cuda.is_available():  # what this process does not use, others may
            torch.cuda.empty_cache()
        executor = executor or LocalExecutor(
            report=lambda job: tell(f"{job.name} is being trained ..."),
            finished=_tell,
        )
        outcomes = executor.run(list(training_jobs(todo).values()))
        raise_faults(outcomes.values())
    return [obtain(plan) for plan in plans]


def missing(plans: Iterable[Plan]) -> dict[str, Plan]:
    """The runs that are not done, by the name of their folder, needs first."""
    found: dict[str, Plan] = {}
    for plan in plans:
        run = folder_of(plan)
        if not run.done:
            found |= missing(plan.needs.values())
            found[run.path.name] = plan
    return found


def training_jobs(plans: Mapping[str, Plan]) -> dict[str, Job]:
    """A job for each plan, by its run folder's name.

    The plans are written where run folders lie, which other machines see too, and stay:
    a job may begin when this process is no more.
    """
    folder, jobs = make_folder(runs_root().absolute() / "plans"), {}
    with FileLock(folder / ".lock"):  # two processes may need the same run
        for name, plan in plans.items():
            file = folder / f"{name}.json"
            write_atomically(file, canonical_json(plan).encode())
            jobs[name] = training_job(plan, name, file)
    return jobs


def training_job(plan: Plan, name: str, file: Path) -> Job:
    """A process that carries out one plan, on a core, or a GPU.

    Args:
        name: Of the plan's run folder.
        file: Holds the plan, once the job is started.
    """
    done = folder_of(plan).done  # then what it began from may be gone
    needs = {} if done else missing(plan.needs.values())

    def there() -> bool:
        return folder_of(plan).done

    return Job(
        name=name,
        command=[sys.executable, "-m", "rlreason.cli", "train", str(file)],
        needs=tuple(needs),
        gpus=1,
        fresh=there,
        there=there,
        environment=QUIET,
        reads=(file, *(folder_of(need).path for need in plan.needs.values())),
        writes=(folder_of(plan).path,),
    )


def raise_faults(outcomes: Iterable[Outcome]) -> None:
    """Tell of the jobs that failed.

    Raises:
        JobError: All of them say what is to be mended.
        RuntimeError: A job failed; holds the end of what it printed.
    """
    if faults := [outcome for outcome in outcomes if not outcome.ok]:
        text = "\n\n".join(fault.message for fault in faults)
        if all(fault.is_worded for fault in faults):
            raise JobError(text)
        raise RuntimeError(text)


def _tell(outcome: Outcome) -> None:
    if outcome.state == "done":
        tell(f"{outcome.name} took {outcome.seconds:.0f} s")

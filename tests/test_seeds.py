"""Runs as jobs: each once, needs first, and what is done is loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from toys import Here, toy_recipe

from rlreason.execution.jobs import JobError, Outcome
from rlreason.execution.seeds import carry_out, train_seeds, training_job
from rlreason.runs.plans import folder_of, plan_of


@pytest.fixture
def recipe(tmp_path):
    return toy_recipe(tmp_path)


def test_each_run_is_a_job_once_after_those_that_it_needs(recipe):
    plans = [plan_of(step, recipe, seed) for seed in (7, 3) for step in ("rcrl", "orm")]
    here = Here()
    runs = carry_out(plans, here)
    names = [job.name for job in here.jobs]
    assert len(set(names)) == len(names) == 8  # SFT and expert iteration of each seed
    for job in here.jobs:
        assert all(names.index(need) < names.index(job.name) for need in job.needs)
        assert (job.cores, job.gpus) == (1, 1)
    assert [run.run.path.name for run in runs] == [
        folder_of(plan).path.name for plan in plans
    ]
    assert [run.run.settings.algorithm.seed for run in runs] == [7, 7, 3, 3]
    # What is done is loaded, and nothing is started
    again = Here()
    assert carry_out(plans, again)[0].run.path == runs[0].run.path
    assert again.jobs == []


def test_what_a_done_run_started_from_is_not_trained_again(recipe, runs):
    plan = plan_of("ppo", recipe, 0)
    carry_out([plan], Here())
    for path in runs.glob("sft-*"):
        path.rename(path.with_name(f"moved-{path.name}"))
    again = Here()
    carry_out([plan], again)
    assert again.jobs == []


def test_a_seed_is_trained_by_a_process_on_one_thread(recipe):
    (trained,) = train_seeds(recipe, "sft", [7])
    assert trained.run.settings.algorithm.seed == 7
    assert trained.run.status["pid"] != os.getpid()
    (session,) = json.loads((trained.run.path / "environment.json").read_text())
    assert session["threads"] == 1


class Broken:
    """An executor whose jobs end with what it is made with."""

    def __init__(self, *told: str) -> None:
        self.told = told

    def run(self, jobs):
        return {
            job.name: Outcome(job.name, "failed", told)
            for job, told in zip(jobs, self.told, strict=True)
        }


def test_a_run_that_fails_says_why_and_whose_fault_it_is(recipe):
    plans = [plan_of("sft", recipe, seed) for seed in (0, 1)]
    worded = "a warning\nrlreason: no right solution; draw more"
    with pytest.raises(JobError) as caught:
        carry_out(plans[:1], Broken(worded))
    assert str(caught.value) == "no right solution; draw more"
    name = folder_of(plans[1]).path.name
    with pytest.raises(RuntimeError, match=f"{name} failed:\nTraceback: KeyError"):
        carry_out(plans, Broken(worded, "Traceback: KeyError"))


def test_a_done_run_whose_start_is_gone_needs_nothing(recipe):
    """A batch refused it: its start was no job of it."""
    plan = plan_of("ppo", recipe, 0)
    carry_out([plan], Here())
    shutil.rmtree(folder_of(plan.start).path)
    job = training_job(plan, folder_of(plan).path.name, Path("plan.json"))
    assert job.fresh()
    assert job.needs == ()

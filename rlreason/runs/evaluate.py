"""Judging a policy as a recipe says, with answers that are sampled once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlreason.evaluation.evaluate import Report, Sampler, Scorer, evaluate
from rlreason.policy.load import Policy
from rlreason.runs.folder import read_settings
from rlreason.runs.kept_rollouts import kept_answers
from rlreason.runs.plans import idle_changes, not_shown
from rlreason.runs.recipes import Recipe
from rlreason.tasks.loaders import lasting_name


def evaluate_recipe(
    recipe: Recipe,
    policy: Policy,
    *,
    split: str = "test",
    seed: int = 0,
    greedy_only: bool = False,
    prompted: bool = False,
    label: str | None = None,
    orm: Scorer | None = None,
    sampler: Sampler = kept_answers,
) -> Report:
    """Judge a policy as the recipe says: maj@1 alone, or with K samples a problem.

    The answers are kept in a run folder: asked for again, they are not sampled again.

    Args:
        prompted: Put the recipe's shots before each question (for the base).
        label: Force it before every step (for return-conditioned policies).
        orm: Scores the samples for rerank@K.
        sampler: As in ``evaluate``.
    """
    chosen = recipe.evaluation
    shots = recipe.shot_problems() if prompted else []
    limit = limit_of(greedy_only)
    return evaluate(
        policy,
        not_shown(recipe.task.load(split, getattr(chosen, limit)), shots, limit),
        k=0 if greedy_only else chosen.k,
        temperature=chosen.temperature,
        max_new_tokens=recipe.max_new_tokens,
        seed=seed,
        shots=shots,
        label=label,
        orm=orm,
        sampler=sampler,
    )


def limit_of(greedy_only: bool) -> str:
    """The field of ``evaluation`` that says how many problems are asked."""
    return "problems" if greedy_only else "sampled_problems"


def idle_settings(
    make: Callable[[Mapping[str, Any]], Recipe],
    changes: Mapping[str, Any],
    *,
    greedy: bool,
    prompted: bool,
) -> list[str]:
    """The changes of a recipe that change nothing of what ``evaluate_recipe`` does."""

    def taken(recipe: Recipe) -> tuple[Any, ...]:
        task, chosen = recipe.task, recipe.evaluation
        samples = () if greedy else (chosen.k, chosen.temperature)
        return (
            *(task.name, task.knobs, recipe.max_new_tokens),
            *(getattr(chosen, limit_of(greedy)), recipe.shots if prompted else 0),
            *samples,
        )

    return idle_changes(taken, make, [changes])


def differences_from_run(
    policy: str, recipe: Recipe, *, prompted: bool, label: str | None
) -> Iterator[str]:
    """What a policy is asked otherwise than its run was trained to be, in words.

    Args:
        policy: Nothing is said of one that is no run folder.
    """
    run = read_settings(Path(policy)) or {}
    task = run.get("task", {})
    asked = lasting_name(recipe.task.name), recipe.task.knobs
    if task and (task["name"], task["knobs"]) != asked:
        there, here = (
            " ".join([name, *knobs_in_words(knobs)])
            for name, knobs in ((task["name"], task["knobs"]), asked)
        )
        yield f"the run was trained on {there}, and is asked of {here}"
    shots = recipe.shots if prompted else 0
    if run.get("step") == "ppo" and run["shots"] != shots:  # others learn without
        yield (
            f"the run was trained with {run['shots']} solved examples in its prompt, "
            f"and is asked with {shots}; see --prompted, and shots"
        )
    if run.get("step") == "rcrl" and label is None:
        yield "the run was trained to answer after a label: give --label '[GOOD]'"


def knobs_in_words(knobs: Mapping[str, Any]) -> list[str]:
    """Settings of a procedural task as ``steps=[1, 2]``."""
    return [f"{name}={value}" for name, value in knobs.items()]

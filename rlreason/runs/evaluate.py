"""Judging a policy as a recipe says, with answers that are sampled once."""

from __future__ import annotations

from rlreason.evaluation.evaluate import Report, Sampler, Scorer, evaluate
from rlreason.policy.load import Policy
from rlreason.runs.kept_rollouts import kept_answers
from rlreason.runs.plans import not_shown
from rlreason.runs.recipes import Recipe


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
    limit = chosen.problems if greedy_only else chosen.sampled_problems
    return evaluate(
        policy,
        not_shown(recipe.task.load(split, limit), shots),
        k=0 if greedy_only else chosen.k,
        temperature=chosen.temperature,
        max_new_tokens=recipe.max_new_tokens,
        seed=seed,
        shots=shots,
        label=label,
        orm=orm,
        sampler=sampler,
    )

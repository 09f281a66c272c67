"""How the comparisons of the catalogue are measured, on the test split, over seeds.

=============  =======================================================================
greedy         maj@1 against ``before``, or against what training started from; of
               return-conditioned policies with [GOOD] before every step
labels         maj@1 with [GOOD] before every step against that with [BAD]
score          of the same answers: the score of the reward model that rewarded PPO,
               and their accuracy, each against what training started from
auc            how well the reward model ranks answers to held-out questions
reranking      rerank@K against maj@K of the same samples of SFT, and against
               rerank@K by the likelihood alone, which needs no training
=============  =======================================================================

What has to be trained is handed in (``Context.obtain_all``), so that the same measures
serve one process, several devices and a cluster. Pairs are of one seed and problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from rlreason.algorithms.rcrl import BAD, GOOD
from rlreason.evaluation.evaluate import Report, Scorer
from rlreason.evaluation.intervals import hierarchical_interval, seed_interval
from rlreason.experiments.catalogue import Comparison, Variant
from rlreason.experiments.records import Record, Row, TrainingRecord
from rlreason.policy.load import Policy
from rlreason.policy.sampler import sample
from rlreason.rewards.orm import OutcomeRewardModel, score_responses
from rlreason.rewards.sparse import sparse_rewards
from rlreason.runs.environment import commit, environment
from rlreason.runs.evaluate import evaluate_recipe
from rlreason.runs.plans import (
    Plan,
    TrainedRewardModel,
    folder_of,
    plan_of,
)
from rlreason.runs.recipes import Recipe
from rlreason.runs.steps import load_trained
from rlreason.settings import settings_hash
from rlreason.tasks.problem import Problem

ObtainAll = Callable[[Sequence[Plan]], Sequence[Any]]
"""Train what is not trained yet, and return it in the order of the plans."""

KEEP_THE_PROMPT = ("ppo",)
"""Steps that, from the base, learn with the solved examples in every prompt."""


class Policies(NamedTuple):
    """A policy a seed, and whether their questions come with solved examples."""

    each: list[Policy]
    prompted: bool = False


@dataclass(frozen=True)
class Context:
    """With what is measured.

    Attributes:
        recipe: Of the profile, with nothing changed.
        obtain_all: Trains.
        evaluate: As ``evaluate_recipe``.
    """

    recipe: Recipe
    obtain_all: ObtainAll
    evaluate: Callable[..., Report] = evaluate_recipe

    @property
    def seeds(self) -> range:
        """Of all training."""
        return range(self.recipe.seeds)

    def plans(self, variant: Variant, step: str | None = None) -> list[Plan]:
        """A plan a seed, of the variant's step or of another of its recipe."""
        recipe = variant.recipe(self.recipe)
        return [plan_of(step or variant.step, recipe, seed) for seed in self.seeds]

    def trained(self, variant: Variant) -> Policies:
        """What a variant trains."""
        start, step = variant.recipe(self.recipe).start, variant.step
        each = [run.policy for run in self.obtain_all(self.plans(variant))]
        return Policies(each, start == "base" and step in KEEP_THE_PROMPT)

    def starts(self, variant: Variant) -> Policies:
        """What a variant's training started from."""
        recipe = variant.recipe(self.recipe)
        if recipe.start == "sft":
            runs = self.obtain_all(self.plans(variant, "sft"))
            return Policies([run.policy for run in runs])
        policy = load_trained(recipe.policy if recipe.start == "base" else recipe.start)
        return Policies([policy] * recipe.seeds, recipe.start == "base")

    def reward_models(self, variant: Variant) -> Sequence[TrainedRewardModel]:
        """The reward models of a variant's recipe."""
        return self.obtain_all(self.plans(variant, "orm"))

    def greedy(self, policies: Policies, label: str | None = None) -> np.ndarray:
        """Which problems each seed's policy solves greedily: (seeds, problems)."""
        reports = [
            self.evaluate(
                self.recipe,
                policy,
                greedy_only=True,
                label=label,
                prompted=policies.prompted,
            )
            for policy in policies.each
        ]
        return np.stack([report.values("maj@1") for report in reports])


Measure = Callable[[Context, Comparison], list[Row]]


def measure(context: Context, comparison: Comparison) -> list[Record]:
    """Train what is not trained yet, and measure it: the rows of a comparison."""
    found = (MEASURES[name](context, comparison) for name in comparison.measures)
    rows = [row for rows in found for row in rows]
    plans = context.plans(comparison.after)
    seconds = fmean(folder_of(plan).status["seconds"] for plan in plans)
    where = {
        "seconds": seconds,
        "settings": settings_hash(plans[0]),
        "commit": commit() or "",
        "device": environment()["device"],
        "date": date.today().isoformat(),
    }
    return [Record(**vars(row), **where) for row in rows]


def measure_training(context: Context, comparison: Comparison) -> list[TrainingRecord]:
    """The phases of PPO of every seed, as the runs wrote them; none of other steps."""
    return [
        TrainingRecord(
            comparison=comparison.name,
            seed=seed,
            phase=row["phase"],
            reward=row["reward"],
            accuracy=row["accuracy"],
            kl=row.get("kl"),
            settings=settings_hash(plan),
        )
        for seed, plan in enumerate(context.plans(comparison.after))
        for row in folder_of(plan).metrics
        if row["kind"] == "phase"
    ]


def greedy(context: Context, comparison: Comparison) -> list[Row]:
    """See the table above."""
    variant, other = comparison.after, comparison.before
    label = GOOD if variant.step == "rcrl" else None
    metric = f"maj@1 with {label}" if label else "maj@1"
    held = context.trained(other) if other else context.starts(variant)
    against = other.name if other else variant.recipe(context.recipe).start
    before = context.greedy(held, label if other else None)
    after = context.greedy(context.trained(variant), label)
    return [paired(comparison, metric, against, before, after)]


def labels(context: Context, comparison: Comparison) -> list[Row]:
    """See the table above."""
    policies = context.trained(comparison.after)
    bad, good = (context.greedy(policies, label) for label in (BAD, GOOD))
    return [paired(comparison, f"maj@1 with {GOOD}", BAD, bad, good)]


def score_and_accuracy(context: Context, comparison: Comparison) -> list[Row]:
    """See the table above: did what was rewarded rise, and what it stands for?"""
    recipe, variant = context.recipe, comparison.after
    problems = recipe.task.load("test", recipe.evaluation.problems)
    models = [model.orm for model in context.reward_models(variant)]

    def found(policies: Policies) -> np.ndarray:
        shots = recipe.shot_problems() if policies.prompted else ()
        each = [
            reward_and_accuracy(recipe, policy, orm, problems, seed=seed, shots=shots)
            for policy, orm, seed in zip(
                policies.each, models, context.seeds, strict=True
            )
        ]
        return np.swapaxes(each, 0, 1)  # (2, seeds, problems)

    against = variant.recipe(recipe).start
    before, after = found(context.starts(variant)), found(context.trained(variant))
    return [
        paired(comparison, metric, against, *tables)
        for metric, *tables in zip((SCORE, ACCURACY), before, after, strict=True)
    ]


SCORE = "score by its reward model"
ACCURACY = "accuracy of the same answers"
AUC = "AUC on held-out questions"


def reward_and_accuracy(
    recipe: Recipe,
    policy: Policy,
    orm: OutcomeRewardModel,
    problems: Sequence[Problem],
    *,
    k: int = 1,
    seed: int = 0,
    shots: Sequence[Problem] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """What a reward model gives to ``k`` answers to each problem, and what is right.

    They are sampled as PPO samples, so that both are what its training would have made
    larger.

    Returns:
        The mean score and the share that is right by the answer key: (problems,) each.
    """
    rollouts = sample(
        policy,
        problems,
        k=k,
        temperature=recipe.ppo.temperature,
        max_new_tokens=recipe.max_new_tokens,
        seed=seed,
        shots=shots,
    )
    scores, right = score_responses(orm, rollouts), sparse_rewards(rollouts, problems)
    by_problem = len(problems), k
    return (
        np.reshape(scores, by_problem).mean(1),
        np.reshape(right, by_problem).mean(1),
    )


def auc(context: Context, comparison: Comparison) -> list[Row]:
    """See the table above: over seeds, in the last epoch of each."""
    models = context.reward_models(comparison.after)
    interval = seed_interval([model.held_out[-1]["auc"] for model in models])
    return [
        Row(
            comparison=comparison.name,
            metric=AUC,
            against="",
            before=None,
            after=interval.mean,
            difference=None,
            low=interval.low,
            high=interval.high,
            seeds=len(models),
            problems=0,
        )
    ]


def reranking(context: Context, comparison: Comparison) -> list[Row]:
    """See the table above: one report a seed and scorer, of the same samples."""
    recipe, chosen = context.recipe, context.recipe.evaluation
    size = chosen.recorded_problems or chosen.sampled_problems
    recipe = recipe.changed({"evaluation.sampled_problems": size})
    sampled = context.obtain_all(context.plans(comparison.after, "sft"))
    models = [model.orm for model in context.reward_models(comparison.after)]
    plans = context.plans(comparison.after, "orm")
    learned_from = context.obtain_all([plan.start for plan in plans])
    likelihoods = [
        OutcomeRewardModel(run.policy, likelihood=True) for run in learned_from
    ]

    def reports(scorers: Sequence[Scorer]) -> list[Report]:
        return [
            context.evaluate(recipe, run.policy, orm=scorer, seed=seed)
            for run, scorer, seed in zip(sampled, scorers, context.seeds, strict=True)
        ]

    def table(reports: Sequence[Report], metric: str) -> np.ndarray:
        return np.stack([report.values(metric) for report in reports])

    by_model, by_likelihood = reports(models), reports(likelihoods)
    rerank, vote = f"rerank@{by_model[0].k}", f"maj@{by_model[0].k}"
    after = table(by_model, rerank)
    return [
        paired(comparison, rerank, against, before, after)
        for against, before in (
            (vote, table(by_model, vote)),
            (f"{rerank} by the likelihood", table(by_likelihood, rerank)),
        )
    ]


def paired(
    comparison: Comparison,
    metric: str,
    against: str,
    before: np.ndarray,
    after: np.ndarray,
) -> Row:
    """The difference of two tables, (seeds, problems) each, pair by pair."""
    interval = hierarchical_interval(after - before)
    seeds, problems = before.shape
    return Row(
        comparison=comparison.name,
        metric=metric,
        against=against,
        before=float(before.mean()),
        after=float(after.mean()),
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        seeds=seeds,
        problems=problems,
    )


MEASURES: dict[str, Measure] = {
    "greedy": greedy,
    "labels": labels,
    "score": score_and_accuracy,
    "auc": auc,
    "reranking": reranking,
}

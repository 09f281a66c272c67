"""How a run is measured: a ``Row`` of raw values for each measure of its arm.

=============  =======================================================================
greedy         which test problems the greedy answer solves; of return-conditioned
               policies with [GOOD] before every step
samples        of K samples of each test problem: how many are right, the vote, the
               choice of the reward model, distinct right sequences of operations
curve          what the run wrote of each round or phase
solutions      which correct solutions many more samples hold (``coverage``)
labels         greedy answers with [BAD] before every step
earned         of an answer sampled as PPO samples: the score of the reward model that
               rewarded PPO and whether it is right, before training and after
auc            how well the reward model ranks answers to held-out questions
reranking      of K samples of SFT: the vote, the choice of the reward model, and that
               of the likelihood alone, which needs no training
=============  =======================================================================

A measure is a function of the context, the subject and what the subject trained (a
policy; of ``orm`` a reward model), and returns JSON values. To add one: put it into
``MEASURES`` and name it in an arm.

One reward model for each base, task and seed chooses among all samples, as in the
paper: it is trained on samples of expert iteration. It reads the plain question and the
answer, without solved examples and labels, as it was trained.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rlreason.algorithms.rcrl import BAD, GOOD
from rlreason.evaluation.evaluate import Report, answer_groups
from rlreason.experiments.catalogue import BASE, CATALOGUE, Arm, Catalogue
from rlreason.experiments.coverage import solutions
from rlreason.experiments.rows import Row, Spent
from rlreason.policy.load import Policy, load_policy
from rlreason.policy.rollout import Rollout
from rlreason.policy.sampler import sample
from rlreason.rewards.orm import OutcomeRewardModel, score_responses
from rlreason.rewards.sparse import sparse_rewards
from rlreason.runs.contents import Contents
from rlreason.runs.environment import commit, environment
from rlreason.runs.evaluate import evaluate_recipe
from rlreason.runs.plans import Plan, contents_of, folder_of, obtain, plan_of
from rlreason.runs.recipes import Recipe
from rlreason.settings import HASH_LENGTH, Settings, ours, settings_hash
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import end_of_response, format_prompt

KEEP_THE_PROMPT = (BASE, "ppo")
"""Steps after which, from the base, solved examples stand in every prompt."""


class PromptedBase(Settings):
    """What stands for a plan where nothing is trained."""

    contents: Contents
    shots: int
    stop: str = ours("", "Ends a response as EOS does.", neutral="")


@dataclass(frozen=True)
class Subject:
    """A run to be measured: an arm, trained from one base with one seed.

    Attributes:
        recipe: The arm's, of this base.
    """

    arm: Arm
    recipe: Recipe
    seed: int

    @property
    def size(self) -> str:
        """Name of the base."""
        return Path(self.recipe.policy).name

    @property
    def prompted(self) -> bool:
        """Whether its questions come with solved examples."""
        return self.recipe.start == "base" and self.arm.step in KEEP_THE_PROMPT

    @property
    def label(self) -> str | None:
        """What is forced before every step."""
        return GOOD if self.arm.step == "rcrl" else None

    @cached_property
    def plan(self) -> Plan | None:
        """Of its training; None for the base."""
        return self.plan_of(self.arm.step) if self.arm.step != BASE else None

    def plan_of(self, step: str) -> Plan:
        """The plan of a step of the same recipe and seed."""
        return plan_of(step, self.recipe, self.seed)

    @cached_property
    def plan_hash(self) -> str:
        """Of the plan, or of what the prompted base is."""
        recipe = self.recipe
        contents = contents_of(recipe.policy, recipe.task)
        base = PromptedBase(
            contents=contents, shots=recipe.shots, stop=end_of_response(recipe.shots)
        )
        return settings_hash(self.plan or base)

    def trained(self) -> Any:
        """What it trains: a policy, or a reward model. Trained first, if need be."""
        if self.plan is None:
            return load_policy(self.recipe.policy)
        run = obtain(self.plan)
        return run.orm if self.arm.step == "orm" else run.policy

    def began(self) -> Policy:
        """The policy that its training began from."""
        if self.recipe.start == "base":
            return load_policy(self.recipe.policy)
        return obtain(self.plan_of("sft")).policy


@dataclass(frozen=True)
class Context:
    """With what is measured.

    Attributes:
        recipe: Of the profile, with nothing changed.
        evaluate: As ``evaluate_recipe``.
    """

    recipe: Recipe
    catalogue: Catalogue = CATALOGUE
    evaluate: Callable[..., Report] = evaluate_recipe

    def subject(self, name: str, size: str, seed: int) -> Subject:
        """The run of an arm, by the path or name of its base."""
        (arm,) = self.catalogue.find([name])
        return Subject(arm, arm.recipe(self.recipe.changed({"policy": size})), seed)

    def subjects(self, names: Sequence[str] = ()) -> list[Subject]:
        """The runs of some arms, or tables, and of those that they are compared with.

        Raises:
            ValueError: No such name, or a recipe that an arm cannot use.
        """
        arms = self.catalogue.find(names)
        known, seeds = self.catalogue.arms, self.catalogue.seeds
        needed = [a for arm in arms for a in (arm.start, arm.compared, arm.name) if a]
        return [
            self.subject(name, size, seed)
            for name in dict.fromkeys(needed)
            for size in self.sizes(known[name])
            for seed in range(seeds(name, self.recipe.seeds))
        ]

    def sizes(self, arm: Arm) -> list[str]:
        """The bases that an arm is trained from, the smallest first."""
        more = self.recipe.sizes if self.catalogue.has_sizes(arm.name) else []
        return [*more, self.recipe.policy]

    def judge_plan(self, subject: Subject) -> Plan:
        """Of the reward model that chooses among the subject's samples.

        On the shifted task it must not know SFT, which has no solutions there.
        """
        recipe = subject.recipe
        changes: dict[str, Any] = {"policy": recipe.policy}
        if recipe.task != self.recipe.task:
            task = recipe.task.model_dump(mode="json")
            changes |= {"task": task, "start": "base"}
        changes |= {"orm_samples": "expert-iteration"}
        return plan_of("orm", self.recipe.changed(changes), subject.seed)

    def sampled_recipe(self, subject: Subject) -> Recipe:
        """The subject's recipe, with as many sampled problems as are recorded."""
        chosen = self.recipe.evaluation
        size = chosen.recorded_problems or chosen.sampled_problems
        return subject.recipe.changed({"evaluation.sampled_problems": size})


Values = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """A measure: its function, and what else has to be trained for it.

    Attributes:
        function: Of the context, the subject and what it trained; JSON values.
        needs: Plans of further runs, which it gets by ``obtain``.
        evaluation: Which settings of the evaluation decide it.
        version: Moved on where the same name measures something else.
    """

    function: Callable[[Context, Subject, Any], Values]
    needs: Callable[[Context, Subject], list[Plan]] = lambda context, subject: []
    evaluation: tuple[str, ...] = ()
    version: int = 1

    def how(self, context: Context, subject: Subject) -> str:
        """A hash of what decides its values beside the subject's plan."""
        chosen = context.sampled_recipe(subject).evaluation
        decides = {
            "version": self.version,
            "evaluation": {name: getattr(chosen, name) for name in self.evaluation},
            "length": subject.recipe.max_new_tokens if self.evaluation else None,
            "needs": [settings_hash(plan) for plan in self.needs(context, subject)],
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        return digest.hexdigest()[:HASH_LENGTH]


def identity(context: Context, subject: Subject, measure: str) -> tuple[str, ...]:
    """What the row of a subject and measure has as its ``identity``."""
    how = MEASURES[measure].how(context, subject)
    key = (subject.arm.name, subject.size, str(subject.seed), measure)
    return (*key, subject.plan_hash, how)


def plans_needed(
    context: Context, subject: Subject, measures: Sequence[str]
) -> list[Plan]:
    """What has to be trained before a subject can be measured."""
    own = [subject.plan] if subject.plan else []
    return [
        *own,
        *(p for name in measures for p in MEASURES[name].needs(context, subject)),
    ]


def measure(
    context: Context, subject: Subject, measures: Sequence[str]
) -> Iterator[Row]:
    """Train what is not trained yet, and measure it: a row each, as they come."""
    trained = subject.trained()
    needed = _all_needed(subject.plan)
    for name in measures:
        began = time.monotonic()
        values = MEASURES[name].function(context, subject, trained)
        arm, size, seed, _, plan, how = identity(context, subject, name)
        yield Row(
            arm=arm,
            size=size,
            seed=int(seed),
            measure=name,
            step=subject.arm.step,
            start=subject.arm.start,
            plan=plan,
            how=how,
            task=Path(subject.recipe.task.name).name,
            split="test",
            spent=spent(subject.plan),
            needed=sum(map(spent, needed.values()), NOTHING),
            measuring=round(time.monotonic() - began, 1),
            commit=commit() or "",
            device=environment()["device"],
            date=date.today().isoformat(),
            values=values,
        )


# --- What training took ---------------------------------------------------------------

NOTHING = Spent(seconds=0.0, rollouts=0, tokens=0)


def _all_needed(plan: Plan | None) -> dict[str, Plan]:
    """All runs below a run, each once."""
    found: dict[str, Plan] = {}
    for each in plan.needs.values() if plan else ():
        found |= {settings_hash(each): each, **_all_needed(each)}
    return found


def spent(plan: Plan | None) -> Spent:
    """What the run of a plan took by itself."""
    if plan is None:
        return NOTHING
    run, rollouts, tokens = folder_of(plan), 0, 0.0
    known = True
    for row in run.metrics:
        if "rollouts" not in row:
            continue
        new, rollouts = row["rollouts"] - rollouts, row["rollouts"]
        known = known and ("response_length" in row or not new)
        tokens += new * row.get("response_length", 0.0)
    return Spent(
        seconds=round(run.status["seconds"], 1),
        rollouts=rollouts,
        tokens=round(tokens) if known else None,
    )


# --- The measures ---------------------------------------------------------------------


def bits(right: Sequence[float]) -> str:
    """What is right and wrong, a character a problem."""
    return "".join("1" if value else "0" for value in right)


def shares(values: Sequence[float]) -> list[float]:
    """Values of problems, short: most of them are 0 or 1."""
    short = [round(float(value), 4) for value in values]
    return [int(value) if value == int(value) else value for value in short]


def greedy(context: Context, subject: Subject, policy: Policy) -> Values:
    """See the table above."""
    return {"right": bits(_greedy(context, subject, policy, subject.label))}


def labels(context: Context, subject: Subject, policy: Policy) -> Values:
    """See the table above."""
    return {"bad": bits(_greedy(context, subject, policy, BAD))}


def _greedy(
    context: Context, subject: Subject, policy: Policy, label: str | None
) -> np.ndarray:
    report = context.evaluate(
        subject.recipe,
        policy,
        greedy_only=True,
        label=label,
        prompted=subject.prompted,
    )
    return report.values("maj@1")


def samples(context: Context, subject: Subject, policy: Policy) -> Values:
    """See the table above; nothing of them is kept but what is counted."""
    model = obtain(context.judge_plan(subject)).orm
    report = context.evaluate(
        context.sampled_recipe(subject),
        policy,
        seed=subject.seed,
        label=subject.label,
        prompted=subject.prompted,
        orm=lambda problem, rollouts: model(
            problem, unadorned(rollouts, problem, policy)
        ),
        sampler=answer_groups,
    )
    k = report.k
    return {
        "k": k,
        "right": [sum(result.correct) for result in report.results],
        "vote": shares(report.values(f"maj@{k}")),
        "rerank": shares(report.values(f"rerank@{k}")),
        "distinct": [len(result.sequences) for result in report.results],
    }


def unadorned(
    rollouts: Sequence[Rollout], problem: Problem, policy: Policy
) -> list[Rollout]:
    """Rollouts as the reward model knows them: without examples and labels."""
    prompt = tuple(policy.encode_prompt(format_prompt(problem)))
    vocabulary = policy.tokenizer.get_vocab()
    forced = {vocabulary[label] for label in (GOOD, BAD) if label in vocabulary}

    def plain(rollout: Rollout) -> Rollout:
        pairs = zip(rollout.tokens, rollout.logprobs, strict=True)
        kept = [(token, x) for token, x in pairs if token not in forced]
        tokens, logprobs = zip(*kept, strict=True)
        return replace(rollout, prompt_tokens=prompt, tokens=tokens, logprobs=logprobs)

    return [plain(rollout) for rollout in rollouts]


def curve(context: Context, subject: Subject, policy: Any) -> Values:
    """See the table above."""
    kinds = ("round", "phase", "held_out")
    rows = folder_of(subject.plan).metrics if subject.plan else []
    return {"rows": [_shortened(row) for row in rows if row["kind"] in kinds]}


def _shortened(row: Mapping[str, Any]) -> Values:
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in row.items()
    }


def earned(context: Context, subject: Subject, policy: Policy) -> Values:
    """See the table above: did what was rewarded rise, and what it stands for?"""
    recipe = subject.recipe
    problems = recipe.task.load("test", recipe.evaluation.problems)
    orm = obtain(subject.plan_of("orm")).orm
    shots = recipe.shot_problems() if subject.prompted else ()
    found = {}
    for when, each in (("before", subject.began()), ("after", policy)):
        scores, right = reward_and_accuracy(
            recipe, each, orm, problems, seed=subject.seed, shots=shots
        )
        found |= {f"score_{when}": shares(scores), f"right_{when}": bits(right)}
    return found


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


def auc(context: Context, subject: Subject, policy: Any) -> Values:
    """See the table above: in the last epoch."""
    return {"auc": obtain(subject.plan_of("orm")).held_out[-1]["auc"]}


def reranking(context: Context, subject: Subject, orm: OutcomeRewardModel) -> Values:
    """See the table above: one report a scorer, of the same samples."""
    learned_from = obtain(subject.plan.start).policy
    likelihood = OutcomeRewardModel(learned_from, likelihood=True)
    policy = subject.began()
    by_model, by_likelihood = (
        context.evaluate(
            context.sampled_recipe(subject), policy, orm=scorer, seed=subject.seed
        )
        for scorer in (orm, likelihood)
    )
    k = by_model.k
    return {
        "k": k,
        "vote": shares(by_model.values(f"maj@{k}")),
        "rerank": shares(by_model.values(f"rerank@{k}")),
        "likelihood": shares(by_likelihood.values(f"rerank@{k}")),
    }


GREEDY = ("problems",)
SAMPLED = ("sampled_problems", "k", "temperature")

MEASURES: dict[str, Measure] = {
    "greedy": Measure(greedy, evaluation=GREEDY),
    "samples": Measure(samples, lambda c, s: [c.judge_plan(s)], SAMPLED),
    "solutions": Measure(solutions, evaluation=SAMPLED),
    "curve": Measure(curve),
    "labels": Measure(labels, evaluation=GREEDY),
    "earned": Measure(earned, lambda c, s: [s.plan_of("orm")], GREEDY),
    "auc": Measure(auc, lambda c, s: [s.plan_of("orm")]),
    "reranking": Measure(reranking, lambda c, s: [s.plan_of("sft")], SAMPLED),
}

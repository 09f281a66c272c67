"""Recipes: what a profile trains and how it is judged.

A profile's YAML file holds one recipe. From it, each step takes the settings that
decide its result, and nothing else, so that changing how a reward is plotted does not
train anything again, and two experiments that share a start share its run folder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from rlreason.algorithms.expert_iteration import ExpertIterationSettings
from rlreason.algorithms.finetune import FinetuneSettings
from rlreason.algorithms.ppo import PpoSettings
from rlreason.algorithms.rcrl import RcrlSettings
from rlreason.algorithms.reward_modelling import OrmSettings
from rlreason.policy.load import Policy, load_policy
from rlreason.settings import (
    Settings,
    SettingsError,
    load_settings,
    ours,
    paper,
    precursor,
)
from rlreason.tasks import DataError, load_problems
from rlreason.tasks.problem import Problem


class TaskSettings(Settings):
    """Which problems, and how many of them for what."""

    name: str = ours("gsm-mini", "As in load_problems.", placement=True)
    knobs: dict[str, Any] = ours(dict, "Of the procedural tasks, e.g. steps.")
    solutions: int | None = paper(
        None, "Training problems whose reference solution SFT learns; None: all.", ge=1
    )
    questions: int | None = paper(
        None, "Training problems whose answer RL may check; None: all.", ge=1
    )

    def load(self, split: str, limit: int | None = None) -> list[Problem]:
        """Problems of a split, the same ones for every seed of training."""
        if taken := sorted({"name", "split", "limit"} & self.knobs.keys()):
            raise DataError(
                f"task.knobs has {', '.join(taken)}, which is no knob: the recipe says "
                "which problems, and how many"
            )
        return load_problems(self.name, split, limit=limit, **self.knobs)

    def solved_problems(self) -> list[Problem]:
        """The training problems whose reference solutions may be read."""
        return self.load("train", self.solutions)

    def question_problems(self) -> list[Problem]:
        """The training problems whose answers may be checked; solved ones first."""
        return self.load("train", self.questions)

    def shot_problems(self, shots: int) -> Sequence[Problem]:
        """Solved examples for a prompt: validation problems, as in the paper."""
        return self.load("validation", shots) if shots else []


SIZED = ("dense", "shaped", "novel")  # rewards that have a size


class RewardSettings(Settings):
    """What PPO is rewarded for.

    - sparse: 1 for a right final answer;
    - dense: the same, and a share of ``size`` for each matched step of the reference;
    - shaped: the same, and the change of a potential worth ``size`` when complete;
    - novel: the same, and up to ``size`` where the way to it is new;
    - sparse-orm, dense-orm: the reward model's score, at the end or at each step;
    - own: what a function of yours says. ``kind`` is then its place, FILE.py:NAME.
    """

    kind: Literal[
        "sparse", "dense", "shaped", "novel", "sparse-orm", "dense-orm", "own"
    ] = paper("sparse", "Which of these, or FILE.py:NAME.")
    size: float | None = ours(
        None,
        "Most that steps, or a new way, can earn; 0.5 for dense, shaped and novel "
        "unless given.",
        neutral=None,
        gt=0,
    )
    function: str | None = ours(
        None, "FILE.py:NAME of your own reward.", placement=True
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Read FILE.py:NAME as one's own reward; say the size of those that have one.

        So the size that a run was made with stands in its plan, whatever the default.
        """
        if not isinstance(values, dict):
            return values
        kind = values.get("kind", "sparse")
        if isinstance(kind, str) and ".py:" in kind:
            values = {**values, "kind": "own", "function": kind}
        if kind in SIZED and values.get("size") is None:
            values = {**values, "size": 0.5}
        return values

    @model_validator(mode="after")
    def _fits(self) -> RewardSettings:
        if self.size is not None and self.kind not in SIZED:
            raise ValueError(
                f"size means nothing to a {self.kind} reward: leave it out"
            )
        if self.kind == "dense" and self.size is not None and self.size >= 1:
            raise ValueError(
                f"size={self.size}: the steps together must earn less than the final "
                "answer's 1"
            )
        if (self.kind == "own") != (self.function is not None):
            raise ValueError("a reward of your own is given as kind: FILE.py:NAME")
        return self

    @property
    def learned(self) -> bool:
        """Whether it comes from a reward model."""
        return self.kind.endswith("-orm")


class EvaluationSettings(Settings):
    """How a policy is judged."""

    problems: int | None = paper(
        None, "Problems for the greedy maj@1; None: the whole split.", ge=1
    )
    validation_problems: int | None = ours(
        None, "For validation during training; None: as many.", ge=1
    )
    sampled_problems: int | None = paper(
        None, "Problems for maj@k and pass@k; None: the whole split.", ge=1
    )
    recorded_problems: int | None = ours(
        None,
        "The same in `rlreason record`, which may take its time; None: as many as "
        "sampled_problems.",
        ge=1,
    )
    k: int = paper(96, "Samples a problem.", ge=1)
    temperature: float = paper(0.7, "Of these samples.", gt=0)

    @property
    def during_training(self) -> int | None:
        """Problems of a validation during training; None: the whole split."""
        return self.validation_problems or self.problems


class Recipe(Settings):
    """Everything a profile's experiments need. Defaults are the paper's."""

    policy: str = ours(..., "The pretrained base, as in load_policy.", min_length=1)
    sizes: list[str] = paper(
        list,
        "Further bases, smaller first, from which `rlreason record` trains the "
        "tables that compare sizes.",
    )
    task: TaskSettings = ours(..., "See TaskSettings.")
    start: str = paper(
        "sft",
        "What expert iteration, PPO and RCRL begin from: sft, base (prompted, without "
        "any reference solution but the prompt's), or the folder of another run.",
    )
    max_new_tokens: int = ours(256, "Length limit of a response, in tokens.", ge=1)
    shots: int = precursor(2, "Solved examples in the base's prompt.", ge=0)
    seeds: int = ours(3, "Seeds over which results are stated.", ge=1)
    sft: FinetuneSettings = paper(FinetuneSettings, "Supervised fine-tuning.")
    expert_iteration: ExpertIterationSettings = paper(
        ExpertIterationSettings, "Expert iteration."
    )
    ppo: PpoSettings = paper(PpoSettings, "PPO and its baselines.")
    reward: RewardSettings = paper(RewardSettings, "What PPO is rewarded for.")
    rounds_from_base: int | None = paper(
        None,
        "Rounds of expert iteration where it starts from the prompted base; None: "
        "expert_iteration.rounds.",
        ge=1,
    )
    first_k_from_base: int | None = paper(
        None,
        "Samples a question in the first of these rounds; None: expert_iteration.k.",
        ge=1,
    )
    ppo_temperature_from_base: float | None = paper(
        None,
        "PPO's temperature where it starts from the prompted base; None: "
        "ppo.temperature.",
        gt=0,
    )
    ppo_phases_from_base: int | None = paper(
        None,
        "Phases of PPO where it starts from the prompted base; None: ppo.phases.",
        ge=1,
    )
    validate_every: int = ours(
        10, "Phases of PPO from one validation to the next.", ge=1
    )
    orm: OrmSettings = paper(OrmSettings, "The reward model.")
    orm_samples: Literal["sft", "expert-iteration"] = paper(
        "expert-iteration", "Whose samples the reward model learns from."
    )
    rcrl: RcrlSettings = paper(RcrlSettings, "Return-conditioned RL.")
    rcrl_labels: Literal["rollouts", "orm"] = paper(
        "rollouts",
        "Who labels the steps: rcrl.k rollouts from each, or the reward model.",
    )
    evaluation: EvaluationSettings = paper(
        EvaluationSettings, "How a policy is judged."
    )
    more: dict[str, dict[str, Any]] = ours(
        dict,
        "Settings of steps that a package of your own registers, by the step's name.",
    )

    @model_validator(mode="after")
    def _what_holds_for_all_is_said_once(self) -> Recipe:
        """Every run takes its seed from outside, and the recipe's length limit."""
        for name in ("sft", "expert_iteration", "ppo", "orm", "rcrl"):
            part = getattr(self, name)
            for field, own in (
                ("seed", 0),
                ("max_new_tokens", self.max_new_tokens),
            ):
                default = type(part).model_fields.get(field)
                if default is None or getattr(part, field) in (own, default.default):
                    continue
                raise ValueError(_overwritten(name, field))
        if self.expert_iteration.first_round_shots:
            raise ValueError(
                "expert_iteration.first_round_shots would be overwritten: set the "
                "recipe's shots, which stand in the first round's prompt from start "
                "base; from SFT or another run none do"
            )
        return self

    @model_validator(mode="after")
    def _starts_somewhere(self) -> Recipe:
        folder = self.start and Path(self.start).is_dir()  # that of "" is where we are
        if self.start not in ("sft", "base") and not folder:
            raise ValueError(
                f"start={self.start!r}: give sft, base or the folder of a run"
            )
        return self

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other values, e.g. ``{"ppo.credit": {"kind": "rloo"}}``.

        Raises:
            SettingsError: No such field, or a value out of range.
        """
        values = self.model_dump(mode="json")
        for path, value in changes.items():
            put(values, path, value)
        return load_settings(Recipe, values)

    def base(self) -> Policy:
        """The pretrained policy."""
        return load_policy(self.policy)

    def solved_problems(self) -> list[Problem]:
        """The training problems whose reference solutions may be read."""
        return self.task.solved_problems()

    def questions(self) -> list[Problem]:
        """The training problems whose answers may be checked; solved ones first."""
        return self.task.question_problems()

    def shot_problems(self) -> Sequence[Problem]:
        """The solved examples of the prompt."""
        return self.task.shot_problems(self.shots)


def _overwritten(part: str, field: str) -> str:
    remedy = f"set the recipe's {field}, which holds for all"
    if field == "seed":
        remedy = "give the seed to the command"
    return f"{part}.{field} would be overwritten: {remedy}"


def check_length(recipe: Recipe, changes: Mapping[str, Any]) -> None:
    """Refuse a length that was asked for of a part, and is another than the recipe's.

    The recipe cannot see one that is the part's default, as if nobody had asked for it.

    Args:
        changes: That were made of the recipe, dotted path to value.

    Raises:
        SettingsError: There is one.
    """
    for path, value in changes.items():
        part, _, field = path.rpartition(".")
        if part and field == "max_new_tokens" and value != recipe.max_new_tokens:
            raise SettingsError(_overwritten(part, field))


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path of nested dicts; a part that is None is made.

    Raises:
        SettingsError: What is above it holds no fields.
    """
    *parents, last = path.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        if not isinstance(values[parent], dict):
            raise SettingsError(f"no field {path}: {parent} is {values[parent]!r}")
        values = values[parent]
    values[last] = copy.deepcopy(value)  # what is put in below it is not the caller's

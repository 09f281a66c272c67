"""Recipes: what a profile trains and how it is judged.

A profile's YAML file holds one recipe. From it, each experiment takes the settings that
decide its result, and nothing else, so that changing how the reward is plotted does not
train anything again, and two experiments that share a start share its run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from rlreason.algorithms.expert_iteration import ExpertIterationSettings
from rlreason.algorithms.finetune import FinetuneSettings
from rlreason.algorithms.orm import OrmSettings
from rlreason.algorithms.ppo import PpoSettings
from rlreason.algorithms.rcrl import RcrlSettings
from rlreason.policy.load import Policy, load_policy
from rlreason.settings import Settings
from rlreason.tasks import load_problems
from rlreason.tasks.problem import Problem


class TaskSettings(Settings):
    """Which problems, and how many of them for what."""

    name: str = Field("gsm-mini", description="As in load_problems.")
    knobs: dict[str, Any] = Field(
        default_factory=dict, description="Of the procedural tasks, e.g. steps."
    )
    solutions: int | None = Field(
        None,
        ge=1,
        description="Training problems whose reference solution SFT learns; None: all.",
    )
    questions: int | None = Field(
        None,
        ge=1,
        description="Training problems whose answer RL may check; None: all.",
    )

    def load(self, split: str, limit: int | None = None) -> list[Problem]:
        """Problems of a split, the same ones for every seed of training."""
        return load_problems(self.name, split, limit=limit, **self.knobs)


class RewardSettings(Settings):
    """What PPO is paid for.

    - sparse: 1 for a right final answer;
    - dense: the same, and a share of ``size`` for each matched step of the reference;
    - shaped: the same, and the change of a potential worth ``size`` when complete;
    - sparse-orm, dense-orm: the reward model's score, at the end or at each step.
    """

    kind: Literal["sparse", "dense", "shaped", "sparse-orm", "dense-orm"] = Field(
        "sparse", description="Which of these."
    )
    size: float | None = Field(
        None, gt=0, description="Most that steps can earn; 0.5 for dense and shaped."
    )

    @model_validator(mode="after")
    def _size_has_a_use(self) -> RewardSettings:
        if self.size is not None and self.kind not in ("dense", "shaped"):
            raise ValueError(
                f"size means nothing to a {self.kind} reward: leave it out"
            )
        if self.kind == "dense" and self.size is not None and self.size >= 1:
            raise ValueError(
                f"size={self.size}: the steps together must earn less than the final "
                "answer's 1"
            )
        return self

    @property
    def learned(self) -> bool:
        """Whether a reward model pays."""
        return self.kind.endswith("-orm")


class EvaluationSettings(Settings):
    """How a policy is judged."""

    problems: int | None = Field(
        None, ge=1, description="Problems for the greedy maj@1; None: the whole split."
    )
    validation_problems: int | None = Field(
        None, ge=1, description="For the looks during training; None: as many."
    )
    sampled_problems: int | None = Field(
        None, ge=1, description="Problems for maj@k and pass@k; None: the whole split."
    )
    recorded_problems: int | None = Field(
        None,
        ge=1,
        description="The same in `rlreason gains`, which may take its time; None: as "
        "many as sampled_problems.",
    )
    k: int = Field(96, ge=1, description="Samples a problem.")
    temperature: float = Field(0.7, gt=0, description="Of these samples.")

    @property
    def looks(self) -> int | None:
        """Validation problems of a look during training; None: the whole split."""
        return self.validation_problems or self.problems


class Recipe(Settings):
    """Everything a profile's experiments need. Defaults are the paper's."""

    policy: str = Field(description="The pretrained base, as in load_policy.")
    task: TaskSettings
    max_new_tokens: int = Field(256, ge=1, description="Length limit of a response.")
    shots: int = Field(2, ge=0, description="Solved examples in the base's prompt.")
    seeds: int = Field(3, ge=1, description="Seeds over which results are stated.")
    sft: FinetuneSettings = Field(default_factory=FinetuneSettings)
    expert_iteration: ExpertIterationSettings = Field(
        default_factory=ExpertIterationSettings
    )
    ppo: PpoSettings = Field(default_factory=PpoSettings)
    reward: RewardSettings = Field(default_factory=RewardSettings)
    ppo_temperature_from_base: float | None = Field(
        None,
        gt=0,
        description="PPO's temperature where it starts from the prompted base; None: "
        "ppo.temperature.",
    )
    validate_every: int = Field(
        10, ge=1, description="Phases of PPO from one look at validation to the next."
    )
    orm: OrmSettings = Field(default_factory=OrmSettings)
    orm_samples: Literal["sft", "expert-iteration"] = Field(
        "expert-iteration", description="Whose samples the reward model learns from."
    )
    rcrl: RcrlSettings = Field(default_factory=RcrlSettings)
    rcrl_labels: Literal["rollouts", "orm"] = Field(
        "rollouts",
        description="Who labels the steps: rcrl.k rollouts from each, or the reward "
        "model.",
    )
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)

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
                raise ValueError(
                    f"{name}.{field} would be overwritten: "
                    + (
                        "give the seed to the command"
                        if field == "seed"
                        else f"set the recipe's {field}, which holds for all"
                    )
                )
        return self

    def base(self) -> Policy:
        """The pretrained policy."""
        return load_policy(self.policy)

    def solved_problems(self) -> list[Problem]:
        """The training problems whose reference solutions may be read."""
        return self.task.load("train", self.task.solutions)

    def questions(self) -> list[Problem]:
        """The training problems whose answers may be checked; solved ones first."""
        return self.task.load("train", self.task.questions)

    def shot_problems(self) -> Sequence[Problem]:
        """The solved examples of the prompt: validation problems, as in the paper."""
        return self.task.load("validation", self.shots) if self.shots else []

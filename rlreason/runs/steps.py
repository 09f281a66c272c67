"""The steps: SFT, expert iteration, PPO, the reward model, return-conditioned RL.

Each class is a plan (``rlreason.runs.plans``): its fields are all that decides its run,
``of`` takes them from a recipe, ``needs`` are the runs that it starts from, ``make``
hands everything to the algorithm. Notebooks ask for what they need by ``train_sft`` and
the like: a run that is done is loaded, one that was killed goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator

from rlreason.algorithms.expert_iteration import (
    ExpertIterationSettings,
    expert_iteration,
)
from rlreason.algorithms.finetune import FinetuneSettings
from rlreason.algorithms.ppo import PpoSettings, ppo
from rlreason.algorithms.rcrl import BAD, GOOD, RcrlSettings, rcrl
from rlreason.algorithms.reward_modelling import OrmSettings, train_orm
from rlreason.algorithms.sft import sft
from rlreason.evaluation.classifier import classification_metrics
from rlreason.policy.load import Policy, load_policy
from rlreason.policy.reference import set_aside
from rlreason.policy.vocabulary import add_tokens
from rlreason.rewards.base import RewardFunction
from rlreason.rewards.dense import dense_reward, states_results
from rlreason.rewards.novelty import NoveltyReward
from rlreason.rewards.orm import (
    OutcomeRewardModel,
    dense_orm_reward,
    score_responses,
    score_tokens,
    sparse_orm_reward,
)
from rlreason.rewards.own import lasting_spec, load_reward
from rlreason.rewards.shaping import shaped_reward
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.runs.contents import Contents, policy_digest
from rlreason.runs.folder import RunFolder, RunFolderError, read_settings
from rlreason.runs.plans import (
    AnyPlan,
    Plan,
    Trained,
    TrainedRewardModel,
    check_room,
    contents_of,
    folder_of,
    load_run,
    obtain,
    plan_of,
    read_plan_file,
    register,
    validate,
    validation_problems,
    weights_of,
    with_weights,
)
from rlreason.runs.recipes import Recipe, RewardSettings
from rlreason.settings import SettingsError, ours
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import end_of_response


def common_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields that every plan has, from a recipe."""
    return {
        "policy": recipe.policy,
        "task": recipe.task,
        "contents": contents_of(recipe.policy, recipe.task),
    }


def _start(recipe: Recipe, seed: int) -> Plan | None:
    """The run whose policy samples first; None for the prompted base."""
    if recipe.start == "base":
        return None
    if recipe.start == "sft":
        return SftPlan.of(recipe, seed)
    plan = read_plan_file(Path(recipe.start) / "settings.json")
    remedy = "give another run to --start"
    if not plan.starts:
        raise SettingsError(
            f"{recipe.start} is of {plan.step}, whose model is no policy of the base's "
            f"shape; {remedy}"
        )
    if plan.contents.policy != policy_digest(recipe.policy):
        raise SettingsError(
            f"{recipe.start} was trained from {plan.policy!r}, and the recipe's policy "
            f"is {recipe.policy!r}; {remedy}, or set policy"
        )
    run = folder_of(plan)
    if run.path.resolve() != Path(recipe.start).resolve():
        raise SettingsError(
            f"{recipe.start} is not where its run is looked for, {run.path}; move it "
            "there, or point RLREASON_RUNS to its folder"
        )
    if not run.done:
        raise SettingsError(f"{recipe.start} is not finished; train it to the end")
    return plan


@register
class SftPlan(Plan):
    """Supervised fine-tuning on reference solutions."""

    step: Literal["sft"] = "sft"
    algorithm: FinetuneSettings

    about: ClassVar[str] = "Fine-tune the base on reference solutions."
    part: ClassVar[str] = "sft"

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> SftPlan:
        """The start and the number of questions do not matter to it."""
        task = recipe.task.model_copy(update={"questions": None})
        settings = recipe.sft.model_copy(update={"seed": seed})
        return cls(**common_fields(recipe) | {"task": task}, algorithm=settings)

    def make(self, base: Policy, needed: Mapping[str, Any], run: RunFolder) -> Policy:
        """See ``algorithms.sft``."""
        solved = self.task.solved_problems()
        warn_without_steps(solved, "SFT can learn answers alone")
        sft(base, solved, self.algorithm, run)
        return base


@register
class ExpertIterationPlan(Plan):
    """Expert iteration from SFT, from another run, or from the prompted base.

    From the base there is no reference solution but the shots of the first round's
    prompt. A reward model that filters is trained on samples of SFT, since its
    judgement is needed before there is more; from the base, where SFT is not to be
    known, on those of expert iteration that nothing filters.
    """

    step: Literal["expert-iteration"] = "expert-iteration"
    start: AnyPlan | None
    shots: int
    stop: str = ours("", "Ends a response as EOS does.", neutral="")
    reward_model: AnyPlan | None
    validation_problems: int | None
    algorithm: ExpertIterationSettings

    about: ClassVar[str] = "Sample, keep what is right, learn it, and again."
    part: ClassVar[str] = "expert_iteration"

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> ExpertIterationPlan:
        """See ``Recipe.start``."""
        from_base = recipe.start == "base"
        update: dict[str, Any] = {"seed": seed, "max_new_tokens": recipe.max_new_tokens}
        if from_base:
            update |= {"reference_solutions": False, "first_round_shots": recipe.shots}
            update |= {
                "rounds": recipe.rounds_from_base or recipe.expert_iteration.rounds
            }
            update |= {"first_round_k": recipe.first_k_from_base}
        filtered = recipe.expert_iteration.orm_threshold is not None
        unfiltered = recipe.changed(
            {
                "orm_samples": "expert-iteration" if from_base else "sft",
                "expert_iteration.orm_threshold": None,
            }
        )
        return cls(
            **common_fields(recipe),
            start=_start(recipe, seed),
            shots=recipe.shots if from_base else 0,
            stop=end_of_response(recipe.shots if from_base else 0),
            reward_model=RewardModelPlan.of(unfiltered, seed) if filtered else None,
            validation_problems=recipe.evaluation.during_training,
            algorithm=recipe.expert_iteration.model_copy(update=update),
        )

    @property
    def needs(self) -> dict[str, Plan]:
        """Where it starts, and what filters."""
        return _present(start=self.start, reward_model=self.reward_model)

    def make(self, base: Policy, needed: Mapping[str, Any], run: RunFolder) -> Policy:
        """See ``algorithms.expert_iteration``."""
        judged = needed.get("reward_model")
        later = validation_problems(self.task, self.validation_problems, 0)
        check_room(base, later, max_new_tokens=self.algorithm.max_new_tokens)
        look = partial(
            validate,
            self,
            problems=self.validation_problems,
            max_new_tokens=self.algorithm.max_new_tokens,
        )
        return expert_iteration(
            needed["start"].policy if self.start else base,
            base,
            self.task.question_problems(),
            self.algorithm,
            solved=self.task.solved_problems() if self.start else (),
            shots=self.task.shot_problems(self.shots),
            orm=partial(score_responses, judged.orm) if judged else None,
            recorder=run,
            on_round=lambda _, policy: look(policy),
        )

    @staticmethod
    def lines(row: Mapping[str, Any]) -> str:
        """A round."""
        if row["kind"] != "round":
            return ""
        return (
            f"round {row['round']}: {row['rollouts']} rollouts, "
            f"{row['accuracy']:.1%} right, {row['solutions']} solutions, "
            f"validation maj@1 {row['validation_maj_1']:.1%}"
        )


@register
class RewardModelPlan(Plan):
    """The outcome reward model, on labelled samples of SFT or of expert iteration."""

    step: Literal["orm"] = "orm"
    start: AnyPlan
    algorithm: OrmSettings

    about: ClassVar[str] = "Train the outcome reward model on labelled samples."
    starts: ClassVar[bool] = False
    part: ClassVar[str] = "orm"

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> RewardModelPlan:
        """See ``Recipe.orm_samples``."""
        update = {"seed": seed, "max_new_tokens": recipe.max_new_tokens}
        return cls(
            **common_fields(recipe),
            start=plan_of(recipe.orm_samples, recipe, seed),
            algorithm=recipe.orm.model_copy(update=update),
        )

    @property
    def needs(self) -> dict[str, Plan]:
        """Whose samples it learns from, and whose weights it starts from."""
        return {"start": self.start}

    def make(
        self, base: Policy, needed: Mapping[str, Any], run: RunFolder
    ) -> OutcomeRewardModel:
        """See ``algorithms.reward_modelling``; the base is not needed."""
        with set_aside(base):
            return train_orm(
                needed["start"].policy,
                self.task.question_problems(),
                self.algorithm,
                run,
                evaluator=classification_metrics,
            )

    def load(self, run: RunFolder) -> TrainedRewardModel:
        """A model is loaded into a base that has its shape."""
        orm = OutcomeRewardModel(
            load_policy(self.policy), likelihood=self.algorithm.likelihood
        )
        orm.load_tensors(weights_of(run))
        return TrainedRewardModel(run, orm)

    @staticmethod
    def lines(row: Mapping[str, Any]) -> str:
        """An epoch on held-out questions."""
        if row["kind"] != "held_out":
            return ""
        return (
            f"epoch {row['epoch'] + 1}: held-out loss {row['loss']:.3f}, "
            f"accuracy {row['accuracy']:.1%}, AUC {row['auc']:.3f}"
        )


def _lasting_reward(reward: RewardSettings) -> RewardSettings:
    if reward.function is None:
        return reward
    return reward.model_copy(update={"function": lasting_spec(reward.function)})


@register
class PpoPlan(Plan):
    """PPO or one of its baselines, from SFT, another run, or the prompted base."""

    step: Literal["ppo"] = "ppo"
    start: AnyPlan | None
    shots: int
    stop: str = ours("", "Ends a response as EOS does.", neutral="")
    reward: Annotated[RewardSettings, AfterValidator(_lasting_reward)]
    reward_model: AnyPlan | None
    validate_every: int
    validation_problems: int | None
    algorithm: PpoSettings

    about: ClassVar[str] = "Proximal policy optimisation, REINFORCE, RLOO or GRPO."
    part: ClassVar[str] = "ppo"

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> PpoPlan:
        """From the base, the shots stand in every prompt."""
        from_base = recipe.start == "base"
        update = {"seed": seed, "max_new_tokens": recipe.max_new_tokens}
        if from_base:
            update |= _present(
                temperature=recipe.ppo_temperature_from_base,
                phases=recipe.ppo_phases_from_base,
            )
        learned = recipe.reward.learned
        contents = contents_of(recipe.policy, recipe.task, recipe.reward.function)
        return cls(
            **common_fields(recipe) | {"contents": contents},
            start=_start(recipe, seed),
            shots=recipe.shots if from_base else 0,
            stop=end_of_response(recipe.shots if from_base else 0),
            reward=recipe.reward,
            reward_model=RewardModelPlan.of(recipe, seed) if learned else None,
            validate_every=recipe.validate_every,
            validation_problems=recipe.evaluation.during_training,
            algorithm=recipe.ppo.model_copy(update=update),
        )

    @property
    def needs(self) -> dict[str, Plan]:
        """Where it starts, and what rewards."""
        return _present(start=self.start, reward_model=self.reward_model)

    @property
    def reads(self) -> Contents:
        """A function of one's own besides."""
        return contents_of(self.policy, self.task, self.reward.function)

    def check(self) -> None:
        """Its reward is there, and can be earned, before anything is trained for it."""
        super().check()
        if self.shots:
            validation_problems(self.task, self.validation_problems, self.shots)
        if self.reward.function is not None:
            load_reward(self.reward.function)
        # One problem first: all of them take long to make
        if self.reward.kind in ("dense", "shaped") and not (
            any(map(states_results, self.task.load("train", 1)))
            or any(map(states_results, self.task.question_problems()))
        ):
            raise SettingsError(
                f"a {self.reward.kind} reward pays what a reference solution states, "
                f"<<2*3=6>>, and none of {self.task.name} states anything: train with "
                "reward.kind sparse"
            )

    def make(self, base: Policy, needed: Mapping[str, Any], run: RunFolder) -> Policy:
        """See ``algorithms.ppo``; of the base a reward may need the tokenizer."""
        model = needed.get("reward_model")
        start = needed["start"].policy if self.start else base
        questions = self.task.question_problems()
        shots = self.task.shot_problems(self.shots)
        if self.algorithm.curriculum.kind == "backtracking":
            warn_without_steps(questions, "backtracking has nothing to start from")
        later = validation_problems(self.task, self.validation_problems, self.shots)
        check_room(
            start,
            [*questions, *later],
            max_new_tokens=self.algorithm.max_new_tokens,
            shots=shots,
        )

        def look(phase: int, policy: Policy) -> dict[str, Any]:
            last = phase == self.algorithm.phases
            if phase % self.validate_every and not last:
                return {}
            return validate(
                self,
                policy,
                problems=self.validation_problems,
                max_new_tokens=self.algorithm.max_new_tokens,
                shots=self.shots,
            )

        with set_aside(*([base] if self.start else [])):
            return ppo(
                start,
                questions,
                self.algorithm,
                reward=reward_function(
                    self.reward, self.algorithm, base, orm=model and model.orm
                ),
                shots=shots,
                recorder=run,
                on_phase=look,
            )

    @staticmethod
    def lines(row: Mapping[str, Any]) -> str:
        """A phase."""
        if row["kind"] != "phase":
            return ""
        seen = row.get("validation_maj_1")
        return (
            f"phase {row['phase']}: {row['rollouts']} rollouts, "
            f"reward {row['reward']:.3f}, entropy {row['entropy']:.3f}"
            # Rounded first: -0.001 is 0.00
            + (f", KL {round(row['kl'], 2) + 0.0:.2f}" if "kl" in row else "")
            + (f", validation maj@1 {seen:.1%}" if seen is not None else "")
        )


@register
class RcrlPlan(Plan):
    """Return-conditioned RL on samples of expert iteration's policy."""

    step: Literal["rcrl"] = "rcrl"
    expert: AnyPlan
    reward_model: AnyPlan | None
    algorithm: RcrlSettings

    about: ClassVar[str] = "Return-conditioned RL: learn labels, ask for good steps."
    starts: ClassVar[bool] = False  # two tokens more
    part: ClassVar[str] = "rcrl"

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> RcrlPlan:
        """See ``Recipe.rcrl_labels``."""
        update = {"seed": seed, "max_new_tokens": recipe.max_new_tokens}
        learned = recipe.rcrl_labels == "orm"
        return cls(
            **common_fields(recipe),
            expert=ExpertIterationPlan.of(recipe, seed),
            reward_model=RewardModelPlan.of(recipe, seed) if learned else None,
            algorithm=recipe.rcrl.model_copy(update=update),
        )

    @property
    def needs(self) -> dict[str, Plan]:
        """Who samples, and who labels."""
        return _present(expert=self.expert, reward_model=self.reward_model)

    def make(self, base: Policy, needed: Mapping[str, Any], run: RunFolder) -> Policy:
        """See ``algorithms.rcrl``."""
        model = needed.get("reward_model")
        return rcrl(
            needed["expert"].policy,
            base,
            self.task.question_problems(),
            self.algorithm,
            orm=partial(score_tokens, model.orm) if model else None,
            recorder=run,
        )

    def load(self, run: RunFolder) -> Trained:
        """Its policy knows two tokens more than the base."""
        policy = add_tokens(load_policy(self.policy), [GOOD, BAD])
        return Trained(run, with_weights(policy, weights_of(run)))

    @staticmethod
    def lines(row: Mapping[str, Any]) -> str:
        """A batch of labels."""
        if row["kind"] != "label":
            return ""
        return (
            f"{row['questions']} questions: {row['rollouts']} rollouts, "
            f"{row['steps']} steps, {row['good_steps']:.1%} good"
        )


def warn_without_steps(problems: Sequence[Problem], then: str) -> None:
    """Warn where no reference solution holds more than its final answer."""
    if not any(p.solution.partition("####")[0].strip() for p in problems):
        warnings.warn(
            f"no solution of the {len(problems)} problems has a step before its final "
            f"answer, so {then}: add a field 'solution' to the data",
            stacklevel=2,
        )


def _present(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


# --- Rewards -------------------------------------------------------------------------


def reward_function(
    reward: RewardSettings,
    algorithm: PpoSettings,
    policy: Policy,
    *,
    orm: OutcomeRewardModel | None = None,
) -> RewardFunction:
    """The reward that the settings name.

    Args:
        policy: Whose tokenizer makes the responses' tokens.
        orm: The reward model of ``sparse-orm`` and ``dense-orm``.
    """
    if reward.kind == "sparse":
        return sparse_token_rewards
    if reward.kind == "dense":
        return dense_reward(policy, bound=reward.size)
    if reward.kind == "shaped":
        gae = algorithm.gae
        gamma, bootstrap = (gae.gamma, gae.bootstrap) if gae else (1.0, False)
        return shaped_reward(
            policy, gamma=gamma, scale=reward.size, bootstrap=bootstrap
        )
    if reward.kind == "novel":
        return NoveltyReward(bonus=reward.size)
    if reward.kind == "own":
        return load_reward(reward.function)
    from_model = {"sparse-orm": sparse_orm_reward, "dense-orm": dense_orm_reward}
    return from_model[reward.kind](orm)


# --- For notebooks -------------------------------------------------------------------


def train_sft(recipe: Recipe, seed: int = 0) -> Trained:
    """Fine-tune the recipe's base on its reference solutions, or load that run."""
    return obtain(SftPlan.of(recipe, seed))


def train_expert_iteration(recipe: Recipe, seed: int = 0) -> Trained:
    """Run the recipe's expert iteration, or load that run."""
    return obtain(ExpertIterationPlan.of(recipe, seed))


def train_reward_model(recipe: Recipe, seed: int = 0) -> TrainedRewardModel:
    """Train the recipe's outcome reward model, or load that run."""
    return obtain(RewardModelPlan.of(recipe, seed))


def train_ppo(recipe: Recipe, seed: int = 0) -> Trained:
    """Run the recipe's PPO, or load that run."""
    return obtain(PpoPlan.of(recipe, seed))


def train_rcrl(recipe: Recipe, seed: int = 0) -> Trained:
    """Run the recipe's return-conditioned RL, or load that run."""
    return obtain(RcrlPlan.of(recipe, seed))


def likelihood_judge(recipe: Recipe, seed: int = 0) -> OutcomeRewardModel:
    """Score by how likely the policy finds it from which the reward model learns.

    What a reward model has to beat, since it needs no training.
    """
    start = obtain(RewardModelPlan.of(recipe, seed).start)
    return OutcomeRewardModel(start.policy, likelihood=True)


def load_trained(name: str | Path) -> Policy:
    """A policy by its run folder, or by any name that ``load_policy`` takes.

    Raises:
        ValueError: The run has not come to its end, or holds no policy.
    """
    if read_settings(Path(name)) is None:
        return load_policy(name)
    found = load_run(Path(name))
    if not isinstance(found, Trained):
        raise RunFolderError(
            f"{name} holds a reward model, not a policy: it cannot answer"
        )
    return found.policy


def load_reward_model(name: str | Path) -> OutcomeRewardModel:
    """A reward model by its run folder.

    Raises:
        ValueError: It is no such run, or the run has not come to its end.
    """
    if (read_settings(Path(name)) or {}).get("step") != "orm":
        raise RunFolderError(f"{name} is no run folder of `rlreason train orm`")
    return load_run(Path(name)).orm

"""Training runs: an algorithm, its settings, and the folder it leaves.

``train_sft``, ``train_expert_iteration``, ``train_ppo`` and ``train_rcrl`` return the
trained policy with its run, ``train_reward_model`` a reward model with its. A run that
is done is loaded, one that was killed goes on, so notebooks simply ask for what they
need, and a run that starts from another one sees to it that it exists. ``train_seeds``
trains several seeds, a single-threaded process a core, or one a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from rlreason.algorithms.expert_iteration import (
    ExpertIterationSettings,
    expert_iteration,
)
from rlreason.algorithms.finetune import FinetuneSettings, load_model_tensors
from rlreason.algorithms.orm import OrmSettings, train_orm
from rlreason.algorithms.ppo import PpoSettings, ppo
from rlreason.algorithms.rcrl import BAD, GOOD, RcrlSettings, rcrl
from rlreason.algorithms.sft import sft
from rlreason.evaluation.classifier import judge_scores
from rlreason.evaluation.evaluate import (
    Report,
    Sampler,
    Scorer,
    answer_groups,
    evaluate,
)
from rlreason.runs.kept_rollouts import kept_answers
from rlreason.runs.environment import cores
from rlreason.runs.recipes import Recipe, RewardSettings, TaskSettings
from rlreason.runs.folder import (
    RunFolder,
    read_checkpoint,
    read_settings,
)
from rlreason.policy.load import Policy, load_policy
from rlreason.policy.vocabulary import add_tokens
from rlreason.rewards.base import RewardFunction
from rlreason.rewards.dense import dense_reward
from rlreason.rewards.orm import (
    OutcomeRewardModel,
    dense_orm_reward,
    score,
    score_tokens,
    sparse_orm_reward,
)
from rlreason.rewards.shaping import shaped_reward
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.settings import Settings, load_settings


class SftRun(Settings):
    """All that decides an SFT run."""

    policy: str
    task: TaskSettings
    finetune: FinetuneSettings


class ExpertIterationRun(Settings):
    """All that decides an expert-iteration run."""

    start: SftRun | None
    policy: str
    task: TaskSettings
    shots: int
    orm: OrmRun | None
    looks: int | None
    algorithm: ExpertIterationSettings


class OrmRun(Settings):
    """All that decides the training of a reward model."""

    start: SftRun | ExpertIterationRun
    policy: str
    task: TaskSettings
    algorithm: OrmSettings


class PpoRun(Settings):
    """All that decides a PPO run."""

    start: SftRun | None
    policy: str
    task: TaskSettings
    shots: int
    reward: RewardSettings
    orm: OrmRun | None
    validate_every: int
    looks: int | None
    algorithm: PpoSettings


class RcrlRun(Settings):
    """All that decides a run of return-conditioned RL."""

    expert: ExpertIterationRun
    policy: str
    task: TaskSettings
    orm: OrmRun | None
    algorithm: RcrlSettings


@dataclass(frozen=True)
class Trained:
    """A trained policy with what its run wrote down.

    Attributes:
        policy: The policy of the last update.
        run: Its folder: settings, metrics, checkpoints.
    """

    policy: Policy
    run: RunFolder

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The metrics of each round of expert iteration."""
        return [row for row in self.run.metrics if row["kind"] == "round"]

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The metrics of each phase of PPO."""
        return [row for row in self.run.metrics if row["kind"] == "phase"]

    @property
    def throughput(self) -> list[dict[str, float]]:
        """Response tokens a second in each stage of each phase of PPO.

        ``sampling`` draws them, ``scoring`` reads each twice (policy, reference),
        ``learning`` once an epoch: all are of the same tokens.
        """
        pairs = zip(self.run.metrics, self.run.timing, strict=True)
        return [
            {
                stage: row["response_tokens"] / seconds
                for stage, seconds in timing.items()
                if stage in ("sampling", "scoring", "learning") and seconds
            }
            for row, timing in pairs
            if row["kind"] == "phase"
        ]

    @property
    def updates(self) -> list[dict[str, Any]]:
        """The metrics of each optimiser step."""
        return [row for row in self.run.metrics if row["kind"] == "update"]

    @property
    def seconds(self) -> float:
        """Seconds of work that the run took, over all its sessions."""
        return self.run.status["seconds"]


@dataclass(frozen=True)
class TrainedRewardModel:
    """A reward model with what its run wrote down.

    Attributes:
        orm: The model.
        run: Its folder: settings, metrics, checkpoints.
    """

    orm: OutcomeRewardModel
    run: RunFolder

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """The metrics on questions that were held out, one row an epoch."""
        return [row for row in self.run.metrics if row["kind"] == "held_out"]

    @property
    def seconds(self) -> float:
        """Seconds of work that the run took, over all its sessions."""
        return self.run.status["seconds"]


def sft_run(recipe: Recipe, seed: int) -> SftRun:
    """The part of a recipe that decides its SFT."""
    task = recipe.task.model_copy(update={"questions": None})
    finetune = recipe.sft.model_copy(update={"seed": seed})
    return SftRun(policy=recipe.policy, task=task, finetune=finetune)


def expert_iteration_run(
    recipe: Recipe, seed: int, *, from_sft: bool = True
) -> ExpertIterationRun:
    """The part of a recipe that decides its expert iteration.

    ``from_sft=False`` starts from the prompted base, without any reference solution but
    the shots of the first round's prompt.
    """
    update: dict[str, Any] = {"seed": seed, "max_new_tokens": recipe.max_new_tokens}
    if not from_sft:
        update |= {"reference_solutions": False, "first_round_shots": recipe.shots}
    filtered = recipe.expert_iteration.orm_threshold is not None
    judge = recipe.model_copy(update={"orm_samples": "sft"})
    return ExpertIterationRun(
        start=sft_run(recipe, seed) if from_sft else None,
        policy=recipe.policy,
        task=recipe.task,
        shots=0 if from_sft else recipe.shots,
        orm=orm_run(judge, seed) if filtered else None,
        looks=recipe.evaluation.looks,
        algorithm=recipe.expert_iteration.model_copy(update=update),
    )


def orm_run(recipe: Recipe, seed: int) -> OrmRun:
    """The part of a recipe that decides its reward model."""
    sampler = {"sft": sft_run, "expert-iteration": expert_iteration_run}
    update = {"seed": seed, "max_new_tokens": recipe.max_new_tokens}
    return OrmRun(
        start=sampler[recipe.orm_samples](recipe, seed),
        policy=recipe.policy,
        task=recipe.task,
        algorithm=recipe.orm.model_copy(update=update),
    )


def ppo_run(recipe: Recipe, seed: int, *, from_sft: bool = True) -> PpoRun:
    """The part of a recipe that decides its PPO.

    ``from_sft=False`` starts from the base, with the recipe's shots in every prompt.
    """
    update = {"seed": seed, "max_new_tokens": recipe.max_new_tokens}
    if not from_sft and recipe.ppo_temperature_from_base is not None:
        update["temperature"] = recipe.ppo_temperature_from_base
    return PpoRun(
        start=sft_run(recipe, seed) if from_sft else None,
        policy=recipe.policy,
        task=recipe.task,
        shots=0 if from_sft else recipe.shots,
        reward=recipe.reward,
        orm=orm_run(recipe, seed) if recipe.reward.learned else None,
        validate_every=recipe.validate_every,
        looks=recipe.evaluation.looks,
        algorithm=recipe.ppo.model_copy(update=update),
    )


def rcrl_run(recipe: Recipe, seed: int) -> RcrlRun:
    """The part of a recipe that decides its return-conditioned RL."""
    update = {"seed": seed, "max_new_tokens": recipe.max_new_tokens}
    return RcrlRun(
        expert=expert_iteration_run(recipe, seed),
        policy=recipe.policy,
        task=recipe.task,
        orm=orm_run(recipe, seed) if recipe.rcrl_labels == "orm" else None,
        algorithm=recipe.rcrl.model_copy(update=update),
    )


def train_sft(recipe: Recipe, seed: int = 0) -> Trained:
    """Fine-tune the recipe's base on its reference solutions, or load that run."""
    policy = recipe.base()
    with RunFolder("sft", sft_run(recipe, seed)) as run:
        if not _trained(run):
            settings = recipe.sft.model_copy(update={"seed": seed})
            sft(policy, recipe.solved_problems(), settings, run)
            _save_policy(run, policy)
    return Trained(_load_policy(run, policy), run)


def train_expert_iteration(
    recipe: Recipe, seed: int = 0, *, from_sft: bool = True
) -> Trained:
    """Run the recipe's expert iteration from SFT or from the base, or load that run.

    Where the recipe has an ``orm_threshold``, a reward model filters the solutions. It
    is trained on samples of SFT, since its judgement is needed before there is more.
    """
    settings = expert_iteration_run(recipe, seed, from_sft=from_sft)
    base = start = recipe.base()
    run, orm = RunFolder("expert-iteration", settings), None
    if not run.done:  # before its clock runs
        if from_sft:
            start = train_sft(recipe, seed).policy
        if settings.orm is not None:
            judge = recipe.model_copy(update={"orm_samples": "sft"})
            orm = partial(score, train_reward_model(judge, seed).orm)
    with run:
        if not _trained(run):
            policy = expert_iteration(
                start,
                base,
                recipe.questions(),
                settings.algorithm,
                solved=recipe.solved_problems() if from_sft else (),
                shots=() if from_sft else recipe.shot_problems(),
                orm=orm,
                recorder=run,
                on_round=lambda _, policy: _validate(recipe, policy),
            )
            _save_policy(run, policy)
    return Trained(_load_policy(run, base), run)


def train_reward_model(recipe: Recipe, seed: int = 0) -> TrainedRewardModel:
    """Train the recipe's outcome reward model, or load that run."""
    base = recipe.base()
    run = RunFolder("orm", orm_run(recipe, seed))
    judged = None if run.done else _judged_policy(recipe, seed)
    with run:
        if not _trained(run):
            settings = run.settings.algorithm
            orm = train_orm(
                judged, recipe.questions(), settings, run, judge=judge_scores
            )
            run.save(orm.tensors(), {"finished": True})
    orm = OutcomeRewardModel(base, likelihood=recipe.orm.likelihood)
    orm.load_tensors(run.restore().tensors)
    return TrainedRewardModel(orm, run)


def likelihood_judge(recipe: Recipe, seed: int = 0) -> OutcomeRewardModel:
    """Score by how likely the policy finds it from which the reward model learns.

    The judge that a reward model has to beat, since it needs no training.
    """
    return OutcomeRewardModel(_judged_policy(recipe, seed), likelihood=True)


def _judged_policy(recipe: Recipe, seed: int) -> Policy:
    """Whose samples the reward model learns from, and whose weights it starts from."""
    train = {"sft": train_sft, "expert-iteration": train_expert_iteration}
    return train[recipe.orm_samples](recipe, seed).policy


def train_ppo(recipe: Recipe, seed: int = 0, *, from_sft: bool = True) -> Trained:
    """Run the recipe's PPO from SFT or from the prompted base, or load that run."""
    settings = ppo_run(recipe, seed, from_sft=from_sft)
    base = start = recipe.base()
    run, reward = RunFolder("ppo", settings), None
    if not run.done:
        if from_sft:
            start = train_sft(recipe, seed).policy
        reward = _reward_function(recipe, seed, base)
    with run:
        if not _trained(run):

            def look(phase: int, policy: Policy) -> dict[str, Any]:
                due = phase % recipe.validate_every == 0
                last = phase == settings.algorithm.phases
                return _validate(recipe, policy, not from_sft) if due or last else {}

            policy = ppo(
                start,
                recipe.questions(),
                settings.algorithm,
                reward=reward,
                shots=() if from_sft else recipe.shot_problems(),
                recorder=run,
                on_phase=look,
            )
            _save_policy(run, policy)
    return Trained(_load_policy(run, base), run)


def train_rcrl(recipe: Recipe, seed: int = 0) -> Trained:
    """Run the recipe's return-conditioned RL on its expert's samples, or load it."""
    settings = rcrl_run(recipe, seed)
    base = recipe.base()
    run, expert, orm = RunFolder("rcrl", settings), None, None
    if not run.done:
        expert = train_expert_iteration(recipe, seed).policy
        if settings.orm is not None:
            orm = partial(score_tokens, train_reward_model(recipe, seed).orm)
    with run:
        if not _trained(run):
            policy = rcrl(
                expert,
                base,
                recipe.questions(),
                settings.algorithm,
                orm=orm,
                recorder=run,
            )
            _save_policy(run, policy)
    return Trained(_load_policy(run, add_tokens(base, [GOOD, BAD])), run)


TRAIN = {
    "sft": train_sft,
    "expert-iteration": train_expert_iteration,
    "ppo": train_ppo,
    "orm": train_reward_model,
    "rcrl": train_rcrl,
}
"""What ``train_seeds`` and the command line call by name."""


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
    problems = recipe.task.load(split, limit)
    # A problem whose solution stands in the prompt is not asked.
    asked = [p for p in problems if p.id not in {shot.id for shot in shots}]
    return evaluate(
        policy,
        asked,
        k=0 if greedy_only else chosen.k,
        temperature=chosen.temperature,
        max_new_tokens=recipe.max_new_tokens,
        seed=seed,
        shots=shots,
        label=label,
        orm=orm,
        sampler=sampler,
    )


def load_trained(name: str | Path) -> Policy:
    """A policy by its run folder, or by any name that ``load_policy`` takes.

    Raises:
        ValueError: The run has not come to its end.
    """
    settings = read_settings(Path(name))
    if settings is None:
        return load_policy(name)
    checkpoint = read_checkpoint(Path(name))
    if checkpoint is None or "finished" not in checkpoint.state:
        raise ValueError(f"{name} is not finished; run its `rlreason train` to the end")
    policy = load_policy(settings["policy"])
    if "expert" in settings:  # return-conditioned RL
        policy = add_tokens(policy, [GOOD, BAD])
    weights = {f"model.{key}" for key in policy.model.state_dict()}
    if weights - checkpoint.tensors.keys():
        raise ValueError(f"{name} holds a reward model, not a policy: it cannot answer")
    return _with_weights(policy, checkpoint.tensors)


def load_reward_model(name: str | Path) -> OutcomeRewardModel:
    """A reward model by its run folder.

    Raises:
        ValueError: It is no such run, or the run has not come to its end.
    """
    settings, checkpoint = read_settings(Path(name)), read_checkpoint(Path(name))
    if settings is None or "held_out" not in settings.get("algorithm", {}):
        raise ValueError(f"{name} is no run folder of `rlreason train orm`")
    if checkpoint is None or "finished" not in checkpoint.state:
        raise ValueError(f"{name} is not finished; run its `rlreason train` to the end")
    likelihood = settings["algorithm"]["likelihood"]
    orm = OutcomeRewardModel(load_policy(settings["policy"]), likelihood=likelihood)
    orm.load_tensors(checkpoint.tensors)
    return orm


def train_seeds(recipe: Recipe, algorithm: str, seeds: Sequence[int]) -> list[Trained]:
    """Train several seeds at once, one single-threaded process a core, or a GPU.

    Those that are done are loaded.

    Args:
        algorithm: "sft", "expert-iteration", "ppo", "orm" or "rcrl", as in
            ``rlreason train``.

    Raises:
        RuntimeError: A process failed; holds the end of what it printed.
    """
    missing = [s for s in seeds if not _run_folder(recipe, algorithm, s).done]
    gpus = torch.cuda.device_count()
    if gpus and missing:
        torch.cuda.empty_cache()  # what this process does not use, the others may
    places = [str(i) for i in range(gpus)] or [None] * cores()
    free: Queue[str | None] = Queue()
    for place in places:
        free.put(place)

    def train_somewhere(seed: int) -> None:
        place = free.get()
        try:
            _train_elsewhere(path, algorithm, seed, gpu=place)
        finally:
            free.put(place)

    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(max_workers=len(places)) as pool,
    ):
        path = Path(folder) / "recipe.json"
        path.write_text(recipe.model_dump_json())
        list(pool.map(train_somewhere, missing))
    return [TRAIN[algorithm](recipe, seed) for seed in seeds]


def _run_folder(recipe: Recipe, algorithm: str, seed: int) -> RunFolder:
    """The folder that ``TRAIN[algorithm]`` writes."""
    settings = {
        "sft": sft_run,
        "expert-iteration": expert_iteration_run,
        "ppo": ppo_run,
        "orm": orm_run,
        "rcrl": rcrl_run,
    }
    return RunFolder(algorithm, settings[algorithm](recipe, seed))


def _train_elsewhere(
    recipe_file: Path, algorithm: str, seed: int, *, gpu: str | None
) -> None:
    command = [sys.executable, "-m", __name__, algorithm, str(recipe_file), str(seed)]
    single = os.environ | {"OMP_NUM_THREADS": "1", "RLREASON_QUIET": "1"}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        named = visible.split(",")[int(gpu)] if visible else gpu
        single["CUDA_VISIBLE_DEVICES"] = named
    done = subprocess.run(command, env=single, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"seed {seed} of {algorithm} failed:\n{done.stderr[-2000:]}")


def _reward_function(recipe: Recipe, seed: int, policy: Policy) -> RewardFunction:
    """What the recipe pays PPO for; a reward model is trained where one is needed."""
    kind, size = recipe.reward.kind, recipe.reward.size or 0.5
    if kind == "sparse":
        return sparse_token_rewards
    if kind == "dense":
        return dense_reward(policy, bound=size)
    if kind == "shaped":
        gae = recipe.ppo.gae
        gamma, bootstrap = (gae.gamma, gae.bootstrap) if gae else (1.0, False)
        return shaped_reward(policy, gamma=gamma, scale=size, bootstrap=bootstrap)
    pay = {"sparse-orm": sparse_orm_reward, "dense-orm": dense_orm_reward}[kind]
    return pay(train_reward_model(recipe, seed).orm)


def _validate(recipe: Recipe, policy: Policy, prompted: bool = False) -> dict[str, Any]:
    """What is looked at in between: greedy accuracy on the validation split."""
    look = recipe.evaluation.model_copy(update={"problems": recipe.evaluation.looks})
    report = evaluate_recipe(
        recipe.model_copy(update={"evaluation": look}),
        policy,
        split="validation",
        greedy_only=True,
        prompted=prompted,
        sampler=answer_groups,  # a policy on its way is not asked again
    )
    return {"validation_maj_1": report.maj_1.mean}


def _save_policy(run: RunFolder, policy: Policy) -> None:
    """Leave the trained weights, and nothing else, as the run's last checkpoint."""
    weights = {f"model.{k}": v for k, v in policy.model.state_dict().items()}
    run.save(weights, {"finished": True})


def _trained(run: RunFolder) -> bool:
    """Whether the weights are there; a kill may have come just before "done"."""
    checkpoint = None if run.done else run.restore()
    return run.done or (checkpoint is not None and "finished" in checkpoint.state)


def _load_policy(run: RunFolder, base: Policy) -> Policy:
    return _with_weights(base.clone(), run.restore().tensors)


def _with_weights(policy: Policy, tensors: dict[str, torch.Tensor]) -> Policy:
    """Load trained weights, in float32 where they were saved so."""
    if any(tensor.dtype == torch.float32 for tensor in tensors.values()):
        policy.model.float()
    load_model_tensors(policy.model, tensors)
    return policy


def main() -> None:
    """Entry of the processes that ``train_seeds`` starts."""
    algorithm, recipe_file, seed = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = load_settings(Recipe, json.loads(Path(recipe_file).read_text()))
    TRAIN[algorithm](recipe, int(seed))


if __name__ == "__main__":
    main()

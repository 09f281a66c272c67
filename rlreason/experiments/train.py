"""Training runs: an algorithm, its settings, and the folder it leaves.

``train_sft`` and ``train_expert_iteration`` return the trained policy with its run. A
run that is done is loaded, one that was killed goes on, so notebooks simply ask for
what they need. ``train_seeds`` trains several seeds, a single-threaded process a core.
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
from pathlib import Path
from typing import Any

import torch

from rlreason.algorithms.expert_iteration import (
    ExpertIterationSettings,
    expert_iteration,
)
from rlreason.algorithms.finetune import FinetuneSettings, load_model_tensors
from rlreason.algorithms.sft import sft
from rlreason.evaluation.evaluate import Report, evaluate
from rlreason.experiments.environment import cores
from rlreason.experiments.recipes import Recipe, TaskSettings
from rlreason.experiments.run_folder import (
    RunFolder,
    read_checkpoint,
    read_settings,
)
from rlreason.policy.load import Policy, load_policy
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
    algorithm: ExpertIterationSettings


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
        return [row for row in self.run.metrics if row.get("phase") == "round"]

    @property
    def updates(self) -> list[dict[str, Any]]:
        """The metrics of each optimiser step."""
        return [row for row in self.run.metrics if "loss" in row]

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
    return ExpertIterationRun(
        start=sft_run(recipe, seed) if from_sft else None,
        policy=recipe.policy,
        task=recipe.task,
        shots=0 if from_sft else recipe.shots,
        algorithm=recipe.expert_iteration.model_copy(update=update),
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
    """Run the recipe's expert iteration from SFT or from the base, or load that run."""
    settings = expert_iteration_run(recipe, seed, from_sft=from_sft)
    base = recipe.base()
    with RunFolder("expert-iteration", settings) as run:
        if not _trained(run):
            start = train_sft(recipe, seed).policy if from_sft else base
            policy = expert_iteration(
                start,
                base,
                recipe.questions(),
                settings.algorithm,
                solved=recipe.solved_problems() if from_sft else (),
                shots=() if from_sft else recipe.shot_problems(),
                recorder=run,
                on_round=lambda _, policy: _validate(recipe, policy),
            )
            _save_policy(run, policy)
    return Trained(_load_policy(run, base), run)


def evaluate_recipe(
    recipe: Recipe,
    policy: Policy,
    *,
    split: str = "test",
    seed: int = 0,
    greedy_only: bool = False,
    prompted: bool = False,
) -> Report:
    """Judge a policy as the recipe says: maj@1 alone, or with K samples a problem.

    Args:
        prompted: Put the recipe's shots before each question (for the base).
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
    load_model_tensors(policy.model, checkpoint.tensors)
    return policy


def train_seeds(recipe: Recipe, algorithm: str, seeds: Sequence[int]) -> list[Trained]:
    """Train several seeds at once, one single-threaded process a core.

    Args:
        algorithm: "sft" or "expert-iteration", as in ``rlreason train``.

    Raises:
        RuntimeError: A process failed; holds the end of what it printed.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(max_workers=max(1, min(cores(), len(seeds)))) as pool,
    ):
        path = Path(folder) / "recipe.json"
        path.write_text(recipe.model_dump_json())
        list(pool.map(lambda seed: _train_elsewhere(path, algorithm, seed), seeds))
    train = {"sft": train_sft, "expert-iteration": train_expert_iteration}[algorithm]
    return [train(recipe, seed) for seed in seeds]


def _train_elsewhere(recipe_file: Path, algorithm: str, seed: int) -> None:
    command = [sys.executable, "-m", __name__, algorithm, str(recipe_file), str(seed)]
    single = os.environ | {"OMP_NUM_THREADS": "1", "RLREASON_QUIET": "1"}
    done = subprocess.run(command, env=single, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"seed {seed} of {algorithm} failed:\n{done.stderr[-2000:]}")


def _validate(recipe: Recipe, policy: Policy) -> dict[str, Any]:
    """What is looked at after each round: greedy accuracy on the validation split."""
    report = evaluate_recipe(recipe, policy, split="validation", greedy_only=True)
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
    policy = base.clone()
    load_model_tensors(policy.model, run.restore().tensors)
    return policy


def main() -> None:
    """Entry of the processes that ``train_seeds`` starts."""
    algorithm, recipe_file, seed = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = load_settings(Recipe, json.loads(Path(recipe_file).read_text()))
    train = {"sft": train_sft, "expert-iteration": train_expert_iteration}[algorithm]
    train(recipe, int(seed))


if __name__ == "__main__":
    main()

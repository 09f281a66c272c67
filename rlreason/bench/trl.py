"""``rlreason bench trl``: seconds a phase, and to five points more, beside TRL's GRPO.

Same start (nano after SFT of the profile ``tiny``), same questions, reward, baseline
(the group's mean and deviation), rollouts a phase and an update, epochs, temperature,
length limit, clip and learning rates; no KL penalty, as is TRL's default, and no
whitening, which TRL does not have. So both follow one gradient, and differ in the
samples that they draw. After each phase both are asked the same validation problems,
greedily and by the same code, which is not counted. Each runs until it has been so much
better than its start in two looks in a row (one alone may be luck), and the time is
that of the first of the two; or until its phases are over. When the points come is in
large part chance, so there are several seeds, and what a phase takes is told apart.

TRL is used as its documentation says, with ``generate`` of transformers, since what it
can have in its place, vLLM, needs a GPU.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from rlreason.algorithms.ppo import BaselineSettings, KlSettings, ppo
from rlreason.evaluation.evaluate import evaluate
from rlreason.policy.load import Policy
from rlreason.runs.profiles import load_recipe
from rlreason.runs.recipes import Recipe
from rlreason.runs.steps import train_sft
from rlreason.tasks.answers import is_correct
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt

PROBLEMS = 1000  # of a look: by chance alone two looks at 300 are 4 points apart
NEEDED = "rlreason bench trl needs TRL: pip install 'rlreason[bench]'"


@dataclass
class Progress:
    """Looks at a policy on its way, and the time between them.

    Attributes:
        wanted: The accuracy that ends the run.
        looks: Seconds of training and accuracy, look by look.
    """

    problems: list[Problem]
    max_new_tokens: int
    wanted: float
    report: Callable[[str], object]
    name: str
    looks: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def look(self, policy: Policy) -> bool:
        """Stop the clock, ask the problems, start it; whether it is enough."""
        self.seconds += time.perf_counter() - self._since
        accuracy = accuracy_of(policy, self.problems, self.max_new_tokens)
        self.looks.append((self.seconds, accuracy))
        self.report(f"{self.name}: {self.seconds:.0f} s, maj@1 {accuracy:.1%}")
        self.begin()
        return self.reached is not None

    @property
    def reached(self) -> float | None:
        """Seconds to the first of two looks in a row that were good enough."""
        for (seconds, first), (_, second) in pairwise(self.looks):
            if min(first, second) >= self.wanted:
                return seconds
        return None


class TrlError(ValueError):
    """TRL cannot be used here."""


class _EnoughError(Exception):
    """It is good enough."""


def bench_trl(
    *,
    points: float = 5.0,
    phases: int | None = None,
    seeds: int = 3,
    report: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Run both, one after the other, seed by seed.

    Args:
        points: Percentage points of maj@1 to gain over the start.
        phases: At most, of so many rollouts as in the profile; None: as there.
        seeds: How many runs of each.
        report: Told each look.

    Returns:
        ``start``, the accuracy that all begin from; ``ours`` and ``trl``, each the
        median of its seconds ``a_phase``, and of those ``reached``, to the points, None
        where half of the runs or more had not got there; ``threads``.

    Raises:
        TrlError: TRL is not installed, or not whole.
    """
    try:
        from trl import GRPOTrainer  # noqa: F401  (what it lacks, it says by then)
    except (ImportError, RuntimeError) as error:
        raise TrlError(f"{NEEDED} ({' '.join(str(error).split())})") from error
    recipe = load_recipe("tiny")
    if phases is not None:
        recipe = recipe.changed({"ppo.phases": phases})
    start = train_sft(recipe).policy
    problems = recipe.task.load("validation", PROBLEMS)
    first = accuracy_of(start, problems, recipe.max_new_tokens)
    report(f"start: maj@1 {first:.1%}")
    runs: dict[str, list[Progress]] = {"ours": [], "trl": []}
    for seed in range(seeds):
        for name, run in (("ours", _ours), ("trl", _trl)):
            progress = Progress(
                problems,
                recipe.max_new_tokens,
                first + points / 100,
                report,
                f"{name}, seed {seed}",
            )
            run(start.clone(), recipe, seed, progress)
            runs[name].append(progress)
    found = {name: summary(each) for name, each in runs.items()}
    return {"start": first, **found, "threads": torch.get_num_threads()}


def summary(runs: Sequence[Progress]) -> dict[str, float | None]:
    """Median seconds of a phase, and to the points; None: half or more had not."""
    phases = []
    for run in runs:
        ends = [0.0, *(seconds for seconds, _ in run.looks)]
        phases += [b - a for a, b in pairwise(ends)]
    reached = median(math.inf if run.reached is None else run.reached for run in runs)
    return {
        "a_phase": median(phases),
        "reached": reached if math.isfinite(reached) else None,
    }


def accuracy_of(policy: Policy, problems: list[Problem], max_new_tokens: int) -> float:
    """maj@1: the share of problems that the greedy answer solves."""
    report = evaluate(
        policy, problems, k=0, max_new_tokens=max_new_tokens, progress=False
    )
    return report.maj_1.mean


def _ours(start: Policy, recipe: Recipe, seed: int, progress: Progress) -> None:
    settings = recipe.ppo.model_copy(
        update={
            "credit": BaselineSettings(kind="grpo"),
            "whiten": False,
            "kl": KlSettings(coef=0.0),
            "max_kl": None,
            "max_new_tokens": recipe.max_new_tokens,
            "seed": seed,
        }
    )

    def on_phase(phase: int, policy: Policy) -> dict:
        if progress.look(policy):
            raise _EnoughError
        return {}

    progress.begin()
    with suppress(_EnoughError):
        ppo(start, recipe.questions(), settings, on_phase=on_phase)


def _trl(start: Policy, recipe: Recipe, seed: int, progress: Progress) -> None:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ppo = recipe.ppo
    a_phase = ppo.rollouts // ppo.batch_size  # updates

    class Look(TrainerCallback):
        def on_train_begin(self, *args, **more):
            progress.begin()

        def on_step_end(self, args, state, control, *, model, **more):
            if state.global_step % a_phase == 0:
                enough = progress.look(replace(start, model=model))
                control.should_training_stop |= enough

    def right(completions: list[str], answer: list[str], **more) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        return [float(is_correct(text, gold)) for text, gold in pairs]

    questions = recipe.questions()
    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            model=start.model,
            processing_class=start.tokenizer,
            reward_funcs=right,
            train_dataset=Dataset.from_dict(
                {
                    "prompt": [format_prompt(problem) for problem in questions],
                    "answer": [problem.answer for problem in questions],
                }
            ),
            callbacks=[Look()],
            args=GRPOConfig(
                output_dir=folder,
                seed=seed,
                use_cpu=start.device.type == "cpu",
                bf16=False,
                per_device_train_batch_size=ppo.batch_size,
                steps_per_generation=a_phase,
                max_steps=ppo.phases * a_phase,
                num_generations=ppo.n,
                num_iterations=ppo.epochs,
                max_completion_length=recipe.max_new_tokens,
                temperature=ppo.temperature,
                beta=0.0,
                epsilon=ppo.clip,
                loss_type="bnpo",  # the mean over the tokens of a batch
                learning_rate=ppo.lr,
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr": ppo.lr_floor},
                adam_beta1=ppo.betas[0],
                adam_beta2=ppo.betas[1],
                weight_decay=ppo.weight_decay,
                max_grad_norm=ppo.max_grad_norm,
                gradient_checkpointing=False,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
        ).train()

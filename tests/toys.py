"""A toy task that a tiny policy learns in a second, and what its runs are watched by.

Each question has the answer 2 or 3. The policy that the toy starts from gives both to
every question, by two sequences of operations and in two wordings. ``Memory`` records a
run without the disk; ``run_toy`` makes a real run of the toy as a recipe, and
``die_in``, ``die_in_run`` and ``let_die`` end one by SIGKILL where it is to end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_policy
from torch import Tensor

from rlreason.algorithms.batching import Example
from rlreason.algorithms.finetune import FinetuneSettings, finetune
from rlreason.algorithms.recorder import Checkpoint, MemoryRecorder
from rlreason.execution.jobs import Job, Outcome, check_jobs
from rlreason.policy.load import Policy
from rlreason.runs.folder import RunFolder
from rlreason.runs.plans import obtain, read_plan_file
from rlreason.runs.recipes import Recipe
from rlreason.settings import load_settings
from rlreason.tasks import SPLITS
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt, format_response


def toy_solutions(answer: int) -> list[str]:
    """Three solutions: the first two differ in words, the third in its operations."""
    return [
        f"<<1+{answer - 1}={answer}>>\n#### {answer}",
        f"So <<1+{answer - 1}={answer}>>\n#### {answer}",
        f"<<5-{5 - answer}={answer}>>\n#### {answer}",
    ]


TOY_PROBLEMS = [
    Problem(f"toy/{name}", f"{name}?", toy_solutions(answer)[0], str(answer))
    for name, answer in zip("abcdef", (2, 3, 2, 3, 2, 3), strict=True)
]


def examples_of(
    policy: Policy, problem: Problem, solutions: Sequence[str]
) -> list[Example]:
    """Each of ``solutions`` as an answer to ``problem``, in tokens."""
    prompt = format_prompt(problem)
    return [
        Example(
            tuple(policy.encode_prompt(prompt)),
            tuple(policy.encode_response(prompt, format_response(solution))),
        )
        for solution in solutions
    ]


def toy_policy() -> Policy:
    """Gives 2 and 3 with about equal chances, whatever is asked. A copy each time."""
    return _toy_policy().clone()


@lru_cache(maxsize=1)
def _toy_policy() -> Policy:
    policy = tiny_policy()
    examples = [
        example
        for problem in TOY_PROBLEMS
        for example in examples_of(policy, problem, toy_solutions(2) + toy_solutions(3))
    ]
    settings = FinetuneSettings(
        epochs=25, batch_size=len(examples), lr=2e-2, lr_floor=1e-3, warmup=0.1
    )
    return finetune(policy, examples, settings)


class InterruptedRunError(Exception):
    """What ``Memory`` raises in place of a kill."""


class Memory(MemoryRecorder):
    """Rows and the last checkpoint, in memory; it restores as a run folder does.

    Args:
        save_every: Rows from one checkpoint to the next one that is due.
        die_at: The row, counted over all sessions, before which it raises; once.
    """

    def __init__(self, *, save_every: int = 1, die_at: int | None = None) -> None:
        super().__init__()
        self.save_every, self.die_at = save_every, die_at
        self.saved: tuple[dict[str, Tensor], str, int] | None = None

    def log(self, kind: str, **metrics: Any) -> None:
        if len(self.rows) == self.die_at:
            self.die_at = None
            raise InterruptedRunError
        super().log(kind, **metrics)

    def due(self) -> bool:
        """True when ``save_every`` rows were logged since the last checkpoint."""
        since = len(self.rows) - (self.saved[2] if self.saved else 0)
        return since >= self.save_every

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Keep copies of both, in place of those of the last checkpoint."""
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.saved = own, json.dumps(state), len(self.rows)

    def restore(self) -> Checkpoint | None:
        """Take rows back to the last checkpoint, and return a copy of it."""
        tensors, state, rows = self.saved or ({}, "", 0)
        del self.rows[rows:]
        if self.saved is None:
            return None
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        return Checkpoint(own, json.loads(state))


def weights(policy: Policy) -> dict[str, Tensor]:
    """A copy of a policy's weights."""
    return {name: t.clone() for name, t in policy.model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal to the bit."""
    return one.keys() == other.keys() and all(
        one[name].equal(other[name]) for name in one
    )


# The toy on disk, as a reader's profile would name it

UPDATE = {"epochs": 2, "batch_size": 2, "lr": 1e-3, "lr_floor": 1e-5}
RECIPE = {
    "max_new_tokens": 24,
    "shots": 1,
    "seeds": 2,
    "sft": UPDATE,
    "expert_iteration": {"k": 4, "rounds": 2, "finetune": UPDATE},
    "ppo": {
        "phases": 4,
        "rollouts": 8,
        "n": 2,
        "temperature": 1.0,
        "epochs": 1,
        "batch_size": 4,
        "lr": 1e-3,
        "lr_floor": 1e-4,
        "credit": {"kind": "gae", "value": {"kind": "branch", "layers": 1}},
        "kl": {"coef": 0.1, "target": 0.5, "horizon": 50},
        "lora": {"rank": 4, "alpha": 8.0},
        "curriculum": {"kind": "replay"},
    },
    "validate_every": 2,
    "orm": {**UPDATE, "k": 8, "batch_size": 4, "held_out": 0.4},
    "orm_samples": "sft",
    "rcrl": {"samples": 3, "k": 2, "finetune": {**UPDATE, "batch_size": 4}},
    "evaluation": {"k": 4},
}


def toy_recipe(folder: Path, **changes: Any) -> Recipe:
    """The toy as a recipe; its base and its problems lie in ``folder``."""
    if not (folder / "base").is_dir():
        policy = toy_policy()
        policy.model.save_pretrained(folder / "base")
        policy.tokenizer.save_pretrained(folder / "base")
        rows = [{"question": p.question, "answer": p.solution} for p in TOY_PROBLEMS]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "toy").mkdir()  # each split of this folder is the whole toy
        for split in SPLITS:
            (folder / "toy" / f"{split}.jsonl").write_text(lines)
    task = {"name": str(folder / "toy"), "solutions": 4}
    start = {"policy": str(folder / "base"), "task": task}
    return load_settings(Recipe, {**start, **RECIPE, **changes})


def toy_profile(folder: Path, **changes: Any) -> Path:
    """The toy as a profile of its own: a YAML file, of which JSON is a part."""
    recipe = toy_recipe(folder, **changes).model_dump(mode="json")
    path = folder / "toy.yaml"
    path.write_text(json.dumps({"description": "the toy", "recipe": recipe}))
    return path


def run_toy(
    train: Callable[..., Any],
    recipe: Recipe,
    root: Path,
    *,
    seed: int = 0,
    save_every: int = 3,
) -> Any:
    """Train into ``root``, with a checkpoint after every so many rows."""
    rows, log = 0, RunFolder.log

    def count(self, kind, **metrics):
        nonlocal rows
        rows += 1
        log(self, kind, **metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLREASON_RUNS", str(root))
        patch.setattr(RunFolder, "log", count)
        patch.setattr(RunFolder, "due", lambda self: rows % save_every == 0)
        return train(recipe, seed)


class Here:
    """An executor that carries out the plans of its jobs in this process."""

    def __init__(self, **_: Any) -> None:
        self.jobs: list[Job] = []

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Each is to be made, and is there then."""
        check_jobs(jobs)
        self.jobs += jobs
        for job in jobs:
            assert job.command[-2] == "train"
            assert not job.fresh()
            obtain(read_plan_file(Path(job.command[-1])))
            assert job.fresh()
        return {job.name: Outcome(job.name, "done") for job in jobs}


def written(root: Path) -> dict[str, bytes]:
    """What the runs of a root, which must be done, left: rows and last weights."""
    files = {}
    for run in sorted(root.iterdir()):
        files[f"{run.name}/metrics"] = (run / "metrics.jsonl").read_bytes()
        last = max((run / "checkpoints").iterdir())
        files[f"{run.name}/weights"] = (last / "weights.safetensors").read_bytes()
        assert json.loads((run / "status.json").read_text())["status"] == "done"
    return files


def was_killed(root: Path) -> bool:
    """Whether a run of a root never wrote how it ended."""
    files = root.glob("*/status.json")
    return "running" in {json.loads(file.read_text())["status"] for file in files}


# Sudden deaths


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(where: object, function: str, call: int) -> None:
    """Let the ``call``-th call of a function of a module end the process."""
    whole, calls = getattr(where, function), iter(range(1, call))

    def counted(*args, **kwargs):
        return die() if next(calls, None) is None else whole(*args, **kwargs)

    setattr(where, function, counted)


def die_in_run(kind: str, method: str, call: int) -> None:
    """Let the ``call``-th call of a method of runs of ``kind`` end the process."""
    whole, calls = getattr(RunFolder, method), iter(range(1, call))

    def counted(self, *args, **kwargs):
        if self.path.name.startswith(kind) and next(calls, None) is None:
            die()
        return whole(self, *args, **kwargs)

    setattr(RunFolder, method, counted)


def let_die(name: str, arm: Callable[[], None], run: Callable[[], Any]) -> None:
    """Run in a process that ``arm`` has prepared to be killed, and see it killed."""
    child = os.fork()
    if child == 0:
        arm()
        run()
        os._exit(0)
    _, outcome = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(outcome) != -signal.SIGKILL:
        sys.exit(f"{name}: was to be killed, but ended with {outcome}")

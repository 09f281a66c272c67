"""Training runs: killed anywhere they go on to the bit; done, they are loaded.

Run as a program, this file is the runs that get killed: it forks a process for every
point in ``KILLS`` and lets each die there by SIGKILL.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import forked
import pytest
from toys import (
    die_in,
    die_in_run,
    let_die,
    run_toy,
    same_bits,
    toy_recipe,
    was_killed,
    weights,
    written,
)

from rlreason.algorithms import finetune as finetune_module
from rlreason.algorithms import ppo as ppo_module
from rlreason.algorithms import rcrl as rcrl_module
from rlreason.algorithms import reward_modelling as orm_module
from rlreason.algorithms.rcrl import BAD, GOOD
from rlreason.rewards.orm import OutcomeRewardModel
from rlreason.runs import plans
from rlreason.runs import steps as train
from rlreason.runs.folder import read_checkpoint
from rlreason.runs.recipes import Recipe

# Killed runs: each of the three starts from runs that are done, and is itself killed

TRAIN = {
    "ppo": train.train_ppo,
    "orm": train.train_reward_model,
    "rcrl": train.train_rcrl,
}
WORK = {  # the calls that a run which goes on must not make again
    "ppo": [(ppo_module, "sample_prompts")],
    "orm": [(orm_module, "sample")],
    "rcrl": [(rcrl_module, "sample"), (rcrl_module, "label_steps")],
}
SAVE_EVERY = {"ppo": 2, "orm": 3, "rcrl": 2}  # rows
save = partial(die_in, Path, "rename")  # a checkpoint is there when it has its name

# Where a run dies, and how often each call of WORK is left to it then. A phase of PPO
# scores 4 batches: by the policy, by the reference, and in 2 updates. It saves after
# phases 2 and 4, which is the last.
PPO_KILLS = {
    "learning-in-phase-1": (partial(die_in, ppo_module, "score", 4), [4]),
    "between-save-and-rename": (partial(save, 1), [4]),
    "sampling-in-phase-3": (partial(die_in, ppo_module, "sample_prompts", 3), [2]),
    "scoring-in-phase-3": (partial(die_in, ppo_module, "score", 10), [2]),
    "learning-in-phase-3": (partial(die_in, ppo_module, "score", 12), [2]),
    "a-row-after-the-checkpoint": (partial(die_in, train, "validate", 2), [2]),
    "before-the-last-save": (partial(die_in, plans, "trained_tensors", 1), [2]),
    "after-the-last-save": (partial(die_in_run, "ppo", "close_logs", 1), [0]),
}
# Samples once, then two epochs of 5 updates; the samples are the first thing saved
ORM_KILLS = {
    "sampling": (partial(die_in, orm_module, "sample", 1), [1]),
    "between-save-and-rename": (partial(save, 1), [1]),
    "learning-in-epoch-1": (partial(die_in, orm_module, "classification_loss", 4), [0]),
    "judging": (partial(die_in, train, "classification_metrics", 1), [0]),
    "learning-in-epoch-2": (partial(die_in, orm_module, "classification_loss", 9), [0]),
    "before-the-last-save": (partial(die_in, OutcomeRewardModel, "tensors", 1), [0]),
    "after-the-last-save": (partial(die_in_run, "orm", "close_logs", 1), [0]),
}
# Six questions, two at a time: three rows of sampling, three of labels, six updates
RCRL_KILLS = {
    "between-save-and-rename": (partial(save, 1), [3, 3]),
    "sampling-last": (partial(die_in, rcrl_module, "sample", 3), [1, 3]),
    "labelling-first": (partial(die_in, rcrl_module, "sample_prompts", 1), [1, 3]),
    "labelling-last": (partial(die_in, rcrl_module, "label_steps", 3), [0, 2]),
    "learning": (partial(die_in, finetune_module, "nll", 4), [0, 0]),
    "before-the-last-save": (partial(die_in, plans, "trained_tensors", 1), [0, 0]),
    "after-the-last-save": (partial(die_in_run, "rcrl", "close_logs", 1), [0, 0]),
}
KILLS = {"ppo": PPO_KILLS, "orm": ORM_KILLS, "rcrl": RCRL_KILLS}
POINTS = [(name, point) for name, points in KILLS.items() for point in points]

kills = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def run(name: str, recipe: Recipe, root: Path, *, seed: int = 0):
    """One run of an algorithm; return-conditioned RL takes two questions at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rcrl_module, "QUESTIONS_AT_ONCE", 2)
        save_every = SAVE_EVERY[name]
        return run_toy(TRAIN[name], recipe, root, seed=seed, save_every=save_every)


def prepare(root: Path, start: Path) -> Path:
    """A root where what the runs start from is done."""
    return Path(shutil.copytree(start, root))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The toy on disk; undisturbed runs; for each kill point the runs left there."""
    folder = tmp_path_factory.mktemp("toy")
    recipe = toy_recipe(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RLREASON_QUIET": "1"}
    forked.run([__file__, folder], environment)
    for name in TRAIN:
        run(name, recipe, folder / "undisturbed")
    return folder


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often each call of WORK is made."""
    counts = {}

    def counted(name: str, whole, *args, **options):
        counts[name] += 1
        return whole(*args, **options)

    for module, function in (place for places in WORK.values() for place in places):
        name, whole = f"{module.__name__}.{function}", getattr(module, function)
        counts[name] = 0
        monkeypatch.setattr(module, function, partial(counted, name, whole))
    return counts


@kills
@pytest.mark.parametrize(("name", "point"), POINTS)
def test_p47_a_killed_run_that_goes_on_equals_an_undisturbed_one(
    name, point, folder, calls
):
    root = folder / f"{name}-{point}"
    assert was_killed(root)
    run(name, toy_recipe(folder), root)
    files = written(root)
    assert any(file.startswith(name) for file in files)
    assert files.items() <= written(folder / "undisturbed").items()
    # It went on from its checkpoint: starting over would pass as well up to here
    made = [calls[f"{module.__name__}.{function}"] for module, function in WORK[name]]
    assert made == KILLS[name][point][1]


@kills
def test_p47_what_a_killed_run_leaves_is_in_the_middle_of_its_work(folder):
    def state(root: str) -> dict:
        copies = folder / "left" / root
        (left,) = copies.glob(f"{root.partition('-')[0]}-*")
        return read_checkpoint(left).state

    ppo = state("ppo-learning-in-phase-3")
    assert (ppo["phase"], ppo["questions"]["drawn"]) == (2, 8)
    assert ppo["kl_coef"] != toy_recipe(folder).ppo.kl.coef
    assert state("orm-learning-in-epoch-2")["updates"] == 7
    rcrl = state("rcrl-learning")
    assert (rcrl["sampled"], rcrl["labelled"], rcrl["updates"]) == (6, 6, 2)


@kills
def test_p47_a_checkpoint_without_its_questions_would_be_noticed(folder):
    # The wrong version: what level replay knows of the questions is not saved
    root = prepare(folder / "forgetful", folder / "left" / "ppo-learning-in-phase-3")
    (state,) = root.glob("ppo-*/checkpoints/*/state.json")
    kept = json.loads(state.read_text())
    kept["questions"] |= {"scores": {}, "last_drawn": {}}
    state.write_text(json.dumps(kept))
    (state.parent / "hashes.json").unlink()  # which would call it damaged
    run("ppo", toy_recipe(folder), root)
    assert not written(root).items() <= written(folder / "undisturbed").items()


@kills
@pytest.mark.parametrize("name", TRAIN)
def test_two_runs_with_one_seed_are_equal_to_the_bit_and_another_seed_is_not(
    name, folder
):
    # The other run, with all that it starts from, was made by another process
    first = written(folder / "undisturbed")
    again = written(folder / f"again-{name}")
    assert again.items() <= first.items()
    other = run(name, toy_recipe(folder), folder / "seed-1", seed=1)
    assert other.run.path.name not in {file.partition("/")[0] for file in first}
    (path,) = (folder / f"again-{name}").glob(f"{name}-*")
    one, seed_1 = read_checkpoint(path).tensors, other.run.restore().tensors
    assert not same_bits(one, seed_1)
    assert (path / "metrics.jsonl").read_bytes() != (
        other.run.path / "metrics.jsonl"
    ).read_bytes()


# What a run gives back


@pytest.fixture
def recipe(folder, monkeypatch) -> Recipe:
    """The toy, whose runs of seed 0 are done."""
    monkeypatch.setenv("RLREASON_RUNS", str(folder / "undisturbed"))
    return toy_recipe(folder)


@kills
def test_a_run_that_is_done_is_loaded_and_not_made_again(recipe, monkeypatch):
    for name in ("ppo", "rcrl", "train_orm", "expert_iteration", "sft"):
        monkeypatch.setattr(train, name, None)
    trained = train.train_ppo(recipe)
    assert [row["phase"] for row in trained.phases] == [1, 2, 3, 4]
    assert ["validation_maj_1" in row for row in trained.phases] == [
        False,
        True,
        False,
        True,
    ]
    assert trained.seconds > 0
    assert same_bits(
        weights(train.load_trained(trained.run.path)), weights(trained.policy)
    )
    conditioned = train.train_rcrl(recipe)
    loaded = train.load_trained(conditioned.run.path)
    assert same_bits(weights(loaded), weights(conditioned.policy))
    assert {GOOD, BAD} <= loaded.tokenizer.get_vocab().keys()
    judged = train.train_reward_model(recipe)
    assert [row["epoch"] for row in judged.held_out] == [0, 1]
    assert same_bits(judged.orm.tensors(), judged.run.restore().tensors)


@kills
def test_the_policy_of_a_reward_model_or_of_half_a_run_is_a_clear_error(recipe, folder):
    reward_model = train.train_reward_model(recipe).run.path
    with pytest.raises(ValueError, match="holds a reward model, not a policy"):
        train.load_trained(reward_model)
    (half,) = (folder / "left" / "ppo-learning-in-phase-3").glob("ppo-*")
    with pytest.raises(ValueError, match="not finished; run its `rlreason train`"):
        train.load_trained(half)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    toy = toy_recipe(here)
    start, left = here / "start", here / "left"
    run_toy(train.train_expert_iteration, toy, start)
    for algorithm in TRAIN:
        run(algorithm, toy, prepare(here / f"again-{algorithm}", start))
        for death, (arm, _) in KILLS[algorithm].items():
            place = f"{algorithm}-{death}"
            root = prepare(here / place, start)
            let_die(place, arm, partial(run, algorithm, toy, root))
            prepare(left / place, root)

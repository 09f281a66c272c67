"""The steps: what each hands to its algorithm, and what its run is named after.

Each test holds the neighbour that it could be taken for: SFT in place of the base, one
number a solution in place of one a token, a path in place of what lies there.
"""

from __future__ import annotations

import json
import shutil
import warnings
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import HfHubHTTPError
from toys import (
    TOY_PROBLEMS,
    UPDATE,
    Memory,
    run_toy,
    same_bits,
    toy_policy,
    toy_profile,
    toy_recipe,
    weights,
)

from rlreason import cli, sample
from rlreason.algorithms import rcrl as rcrl_module
from rlreason.algorithms.ppo import BaselineSettings
from rlreason.algorithms.rcrl import BAD, GOOD, RcrlSettings, rcrl
from rlreason.policy.load import Policy, load_policy
from rlreason.policy.value import ValueSettings
from rlreason.policy.vocabulary import add_tokens
from rlreason.rewards.dense import dense_reward
from rlreason.rewards.novelty import NoveltyReward
from rlreason.rewards.orm import (
    OutcomeRewardModel,
    dense_orm_reward,
    score_responses,
    score_tokens,
    sparse_orm_reward,
)
from rlreason.rewards.shaping import shaped_reward
from rlreason.rewards.sparse import sparse_token_rewards
from rlreason.runs import evaluate as evaluate_module
from rlreason.runs import folder as folder_module
from rlreason.runs import steps as module
from rlreason.runs.contents import policy_digest
from rlreason.runs.folder import RunFolder
from rlreason.runs.plans import (
    _STEPS,
    Plan,
    Trained,
    TrainedRewardModel,
    folder_of,
    load_run,
    obtain,
    plan_of,
    read_plan,
    register,
    steps,
    without_effect,
)
from rlreason.runs.profiles import load_recipe
from rlreason.runs.recipes import Recipe, put
from rlreason.settings import (
    SettingsError,
    canonical_json,
    identity,
    load_settings,
    settings_hash,
)
from rlreason.tasks.prompts import NEXT_QUESTION

NAMES = ("sft", "expert-iteration", "orm")


@lru_cache
def moved(name: str) -> Policy:
    """A policy of the toy's kind with weights of its own. Not to be changed."""
    policy = toy_policy()
    generator = torch.Generator().manual_seed(1 + NAMES.index(name))
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
    return policy


@lru_cache
def reward_model() -> OutcomeRewardModel:
    """Scores that differ from token to token: the likelihood's. Not to be changed."""
    return OutcomeRewardModel(moved("orm"), likelihood=True)


STARTS = {
    "start": Trained(None, moved("sft")),
    "expert": Trained(None, moved("expert-iteration")),
    "reward_model": TrainedRewardModel(None, reward_model()),
}


def make(plan: Plan) -> Any:
    """Carry a plan out from known starts, with a recorder that keeps nothing."""
    needed = {name: STARTS[name] for name in plan.needs}
    return plan.make(load_policy(plan.policy), needed, Memory())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Base, problems and profile of the toy on disk."""
    folder = tmp_path_factory.mktemp("toy")
    toy_profile(folder)
    return folder


@pytest.fixture
def handed(monkeypatch) -> list[SimpleNamespace]:
    """What the algorithms are called with, which then return a copy of the start."""
    calls = []

    def note(start, *given, **options):
        calls.append(SimpleNamespace(start=start, given=given, **options))
        return start.clone()

    for name in ("ppo", "expert_iteration", "rcrl"):
        monkeypatch.setattr(module, name, note)
    return calls


# Where a run starts


def test_expert_iteration_from_the_base_may_have_more_rounds_and_a_first_of_its_own(
    folder,
):
    recipe = toy_recipe(folder, shots=2, rounds_from_base=5, first_k_from_base=2)
    plans = [
        plan_of("expert-iteration", recipe.changed({"start": s}))
        for s in ("base", "sft")
    ]
    rounds = [plan.algorithm.rounds for plan in plans]
    assert rounds == [5, recipe.expert_iteration.rounds]
    assert [plan.algorithm.first_round_k for plan in plans] == [2, None]
    # Wrong: from the base as from SFT
    same = plan_of("expert-iteration", toy_recipe(folder, shots=2, start="base"))
    assert same.algorithm.rounds == recipe.expert_iteration.rounds != 5


@pytest.mark.parametrize("step", ["expert-iteration", "ppo"])
def test_what_ends_an_answer_is_part_of_a_run_with_shots_and_of_no_other(step, folder):
    recipe = toy_recipe(folder, shots=2)
    from_base, from_sft = (
        plan_of(step, recipe.changed({"start": s})) for s in ("base", "sft")
    )
    assert from_base.stop == NEXT_QUESTION
    without = from_base.model_copy(update={"stop": ""})
    assert settings_hash(without) != settings_hash(from_base)
    # Runs without shots are named as before there was such a field
    assert '"stop"' not in identity(from_sft)


def test_ppo_from_the_base_starts_from_the_base_with_the_shots(
    folder, handed, monkeypatch
):
    recipe = toy_recipe(folder, shots=2, ppo_temperature_from_base=0.2)
    base = weights(recipe.base())
    plans = [plan_of("ppo", recipe.changed({"start": s})) for s in ("base", "sft")]
    assert [list(plan.needs) for plan in plans] == [[], ["start"]]
    assert folder_of(plans[0]).path != folder_of(plans[1]).path
    for plan in plans:
        make(plan)
    from_base, from_sft = handed
    assert same_bits(weights(from_base.start), base)
    assert list(from_base.shots) == list(recipe.shot_problems())
    assert len(from_base.shots) == 2
    assert plans[0].algorithm.temperature == 0.2
    # Wrong from the base, and right here: SFT's weights, which need no shots
    assert same_bits(weights(from_sft.start), weights(moved("sft")))
    assert not same_bits(weights(from_sft.start), base)
    assert list(from_sft.shots) == []
    assert plans[1].algorithm.temperature == recipe.ppo.temperature == 1.0
    # A policy that learns with shots is validated with shots, and when it is due
    seen = []
    monkeypatch.setattr(
        module, "validate", lambda *_, **given: seen.append(given) or {"maj": 1}
    )
    for call in handed:
        assert call.on_phase(recipe.validate_every - 1, call.start) == {}
        assert call.on_phase(recipe.validate_every, call.start) == {"maj": 1}
    assert [given["shots"] for given in seen] == [2, 0]


def test_a_kl_that_rounds_to_nothing_has_no_sign():
    row = {"kind": "phase", "phase": 1, "rollouts": 8, "reward": 0.5, "entropy": 1.0}
    shown = [steps()["ppo"].lines(row | {"kl": kl}) for kl in (-0.004, -0.006)]
    assert [line.partition("KL ")[2] for line in shown] == ["0.00", "-0.01"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_one_question_that_the_model_cannot_read_ends_ppo_before_it_begins(
    split, tmp_path, handed
):
    recipe = toy_recipe(tmp_path)
    with (tmp_path / "toy" / f"{split}.jsonl").open("a") as file:
        file.write(json.dumps({"question": "long " * 600, "answer": "#### 2"}) + "\n")
    with pytest.raises(SettingsError, match=f"the problem {split}/6 has a prompt of"):
        make(plan_of("ppo", recipe))
    assert handed == []


def test_shots_that_are_all_validation_problems_are_told_before_training(folder):
    recipe = toy_recipe(folder, shots=6, start="base")
    with pytest.raises(SettingsError, match=r"raise evaluation\.validation_problems"):
        plan_of("ppo", recipe).check()
    plan_of("ppo", recipe.changed({"start": "sft"})).check()  # which shows none


def test_solutions_without_steps_are_told(tmp_path, handed, monkeypatch):
    recipe = toy_recipe(tmp_path)
    plans = {
        step: plan_of(step, recipe.changed({"ppo.curriculum": {"kind": kind}}))
        for step, kind in (("sft", "uniform"), ("ppo", "backtracking"))
    }
    monkeypatch.setattr(module, "sft", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plan in plans.values():
            make(plan)
    rows = [{"question": p.question, "answer": p.answer} for p in TOY_PROBLEMS]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "toy" / "train.jsonl").write_text(lines)
    for step, said in (("sft", "answers alone"), ("ppo", "nothing to start from")):
        with pytest.warns(UserWarning, match=f"has a step before .*{said}"):
            make(plans[step])


def test_the_temperature_of_the_base_is_that_of_sft_where_none_is_given(folder):
    recipe = toy_recipe(folder)
    from_base = plan_of("ppo", recipe.changed({"start": "base"}))
    assert from_base.algorithm.temperature == recipe.ppo.temperature


def test_expert_iteration_from_the_base_knows_no_reference_solution(folder, handed):
    recipe = toy_recipe(folder)
    for start in ("sft", "base"):
        make(plan_of("expert-iteration", recipe.changed({"start": start})))
    from_sft, from_base = handed
    assert list(from_sft.solved) == recipe.solved_problems()
    assert (list(from_base.solved), len(from_base.shots)) == ([], 1)
    assert same_bits(weights(from_base.start), weights(recipe.base()))


def test_a_run_can_start_from_any_other_run(folder, handed, tmp_path, monkeypatch):
    recipe = toy_recipe(folder)
    first = run_toy(module.train_sft, recipe, tmp_path)
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path))
    later = recipe.changed({"start": str(first.run.path), "sft.epochs": 9})
    plan = plan_of("ppo", later)
    # It is the run itself that it starts from, and not the recipe's present SFT
    assert plan.start == first.run.settings
    assert plan.start.algorithm.epochs != later.sft.epochs
    assert plan_of("ppo", later, seed=1).start == plan.start
    obtain(plan)
    assert same_bits(weights(handed[0].start), weights(first.policy))
    with pytest.raises(SettingsError, match="give sft, base or the folder of a run"):
        recipe.changed({"start": "stf"})
    # What does not fit is refused before anything is trained
    elsewhere = tmp_path / "copy"
    shutil.copytree(first.run.path, elsewhere)
    other = tmp_path / "other-base"
    shutil.copytree(recipe.policy, other)
    (other / "tokenizer_config.json").write_text("{}")
    for changes, words in (
        ({"start": str(elsewhere)}, "is not where its run is looked for"),
        ({"policy": str(other)}, "set policy"),
    ):
        with pytest.raises(SettingsError, match=words):
            plan_of("ppo", later.changed(changes))
    (first.run.path / "status.json").unlink()
    with pytest.raises(SettingsError, match="is not finished"):
        plan_of("ppo", later)


def test_a_reward_model_or_a_policy_with_labels_is_no_start(folder, tmp_path):
    recipe = toy_recipe(folder)
    for name in ("orm", "rcrl"):
        plan = plan_of(name, recipe)
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(canonical_json(plan))
        with pytest.raises(SettingsError, match="no policy of the base's shape"):
            plan_of("ppo", recipe.changed({"start": str(tmp_path / name)}))


def test_the_profile_of_the_paper_is_the_papers_ppo():
    recipe = load_recipe("paper")
    plan, from_base = (
        module.PpoPlan(
            policy=recipe.policy,
            task=recipe.task,
            contents={"policy": "hub", "task": "gsm8k"},
            start=None,
            shots=0,
            reward=recipe.reward,
            reward_model=None,
            validate_every=recipe.validate_every,
            validation_problems=None,
            algorithm=recipe.ppo,
        ),
        recipe.ppo_temperature_from_base,
    )
    run = plan.algorithm
    values = {"rollouts": 1024, "n": 4, "epochs": 4, "batch_size": 256, "lr": 1e-6}
    values |= {"temperature": 0.7, "clip": 0.2, "max_new_tokens": 256, "keep": None}
    assert {name: getattr(run, name) for name in values} == values
    assert run.lora.rank == 128
    assert (run.kl.coef, run.kl.target) == (0.05, None)
    assert (run.gae.gamma, run.gae.lam) == (1.0, 0.95)
    assert run.gae.value == ValueSettings(kind="branch", layers=4, detach=True)
    assert from_base == 0.2  # and nothing else
    assert recipe.shots == 2


# Who samples, who scores, who learns


def test_labels_from_orm_hand_over_a_score_for_every_token(folder, handed):
    recipe = toy_recipe(folder)
    for labels in ("orm", "rollouts"):
        make(plan_of("rcrl", recipe.changed({"rcrl_labels": labels})))
    by_orm, by_rollouts = handed
    assert by_rollouts.orm is None
    rollouts = sample(toy_policy(), TOY_PROBLEMS[:2], k=2, max_new_tokens=24, seed=3)
    scores = by_orm.orm(rollouts)
    assert scores == score_tokens(reward_model(), rollouts)
    assert [len(each) for each in scores] == [len(r.tokens) for r in rollouts]
    # Wrong: the score of the solution, which every step of it would get
    assert score_responses(reward_model(), rollouts) == [each[-1] for each in scores]
    assert any(len(set(each)) > 1 for each in scores)
    # The expert samples, the base learns
    base = weights(recipe.base())
    for call in handed:
        assert same_bits(weights(call.start), weights(moved("expert-iteration")))
        assert same_bits(weights(call.given[0]), base)
    assert not same_bits(base, weights(moved("expert-iteration")))


@pytest.mark.parametrize("samples", ["sft", "expert-iteration"])
def test_orm_samples_says_whose_samples_and_weights_the_reward_model_gets(
    samples, folder, monkeypatch
):
    asked = []

    def note(policy, *_, **__):
        asked.append(policy)
        return OutcomeRewardModel(policy)

    monkeypatch.setattr(module, "train_orm", note)
    plan = plan_of("orm", toy_recipe(folder, orm_samples=samples))
    assert plan.needs["start"].step == samples
    made = make(plan)
    assert same_bits(weights(asked[0]), weights(moved("sft")))  # as STARTS has it
    expected = OutcomeRewardModel(moved("sft")).tensors()
    assert same_bits(made.tensors(), expected)
    base = OutcomeRewardModel(load_policy(plan.policy)).tensors()
    assert not same_bits(expected, base)


def test_rcrl_samples_from_the_expert_and_learns_from_the_base(monkeypatch):
    asked, learners = [], []

    def ask(whole, policy, *args, **options):
        asked.append(policy)
        return whole(policy, *args, **options)

    for name in ("sample", "sample_prompts"):
        whole = getattr(rcrl_module, name)
        monkeypatch.setattr(rcrl_module, name, partial(ask, whole))

    def learn(policy, *_, **__):
        weights = policy.model.state_dict().items()
        learners.append({name: tensor.clone() for name, tensor in weights})
        return policy

    monkeypatch.setattr(rcrl_module, "finetune", learn)
    expert, base = moved("expert-iteration"), toy_policy()
    settings = RcrlSettings(samples=4, k=2, max_new_tokens=24)
    student = rcrl(expert, base, TOY_PROBLEMS, settings)
    assert len(asked) == 2  # solutions, and labels
    assert all(policy is expert for policy in asked)
    untrained = weights(add_tokens(base, [GOOD, BAD]))
    assert same_bits(learners[0], untrained)
    assert same_bits(weights(student), untrained)
    # Wrong: the expert learns on
    rcrl(expert, expert, TOY_PROBLEMS, settings)
    assert not same_bits(learners[1], untrained)


# What PPO is rewarded for

REWARDS = {
    "sparse": ({}, lambda _: sparse_token_rewards),
    "dense": ({}, lambda _: dense_reward(toy_policy(), bound=0.5)),
    "dense-small": ({"size": 0.1}, lambda _: dense_reward(toy_policy(), bound=0.1)),
    "shaped": ({}, lambda _: shaped_reward(toy_policy(), gamma=0.9)),
    "shaped-large": (
        {"size": 0.8},
        lambda _: shaped_reward(toy_policy(), gamma=0.9, scale=0.8),
    ),
    "novel": ({}, lambda _: NoveltyReward(bonus=0.5)),
    "sparse-orm": ({}, sparse_orm_reward),
    "dense-orm": ({}, dense_orm_reward),
}


def test_each_kind_of_reward_reaches_training_and_rewards_otherwise(folder, handed):
    """Wrong would be a kind that is read and not used: two would reward the same."""
    rollouts = sample(toy_policy(), TOY_PROBLEMS, k=4, max_new_tokens=24, seed=3)
    rewards, runs = {}, set()
    ppo = {"credit": {"kind": "gae", "gamma": 0.9}}
    for name, (options, expected) in REWARDS.items():
        kind = name.removesuffix("-small").removesuffix("-large")
        plan = plan_of(
            "ppo", toy_recipe(folder, ppo=ppo, reward={"kind": kind, **options})
        )
        make(plan)
        runs.add(folder_of(plan).path)
        rewards[name] = handed[-1].reward(rollouts, TOY_PROBLEMS)
        assert rewards[name] == expected(reward_model())(rollouts, TOY_PROBLEMS)
    assert len({json.dumps(rows) for rows in rewards.values()}) == len(REWARDS)
    assert len(runs) == len(REWARDS)  # each has a folder of its own


@pytest.mark.parametrize("bootstrap", [True, False])
def test_a_potential_is_kept_where_the_learner_goes_on(bootstrap, folder):
    def rewards(credit: dict[str, Any]) -> list:
        recipe = toy_recipe(folder, ppo={"credit": credit}, reward={"kind": "shaped"})
        function = module.reward_function(recipe.reward, recipe.ppo, toy_policy())
        return function(rollouts, TOY_PROBLEMS)

    rollouts = sample(toy_policy(), TOY_PROBLEMS, k=8, max_new_tokens=15, seed=3)
    assert not all(rollout.finished for rollout in rollouts)
    found = rewards({"kind": "gae", "gamma": 0.9, "bootstrap": bootstrap})
    right = shaped_reward(toy_policy(), gamma=0.9, bootstrap=bootstrap)
    wrong = shaped_reward(toy_policy(), gamma=0.9, bootstrap=not bootstrap)
    assert found == right(rollouts, TOY_PROBLEMS)
    assert found != wrong(rollouts, TOY_PROBLEMS)
    # Without a value function nothing is discounted
    right = shaped_reward(toy_policy(), gamma=1.0)
    found = rewards(dict(BaselineSettings(kind="rloo")))
    assert found == right(rollouts, TOY_PROBLEMS)


OWN_REWARD = '''
def pay(rollouts, problems):
    """Ten for a response that ends, at its last token."""
    return [(0.0,) * (len(r.tokens) - 1) + (10.0 * r.finished,) for r in rollouts]
'''


def test_a_reward_of_ones_own_needs_no_file_of_the_library(folder, tmp_path, handed):
    file = tmp_path / "mine.py"
    file.write_text(OWN_REWARD)
    recipe = toy_recipe(folder, reward={"kind": f"{file}:pay"})
    plan = plan_of("ppo", recipe)
    make(plan)
    rollouts = sample(toy_policy(), TOY_PROBLEMS, k=2, max_new_tokens=24, seed=3)
    rewards = handed[-1].reward(rollouts, TOY_PROBLEMS)
    assert [sum(row) for row in rewards] == [10.0 * r.finished for r in rollouts]
    # It is named after what the file holds
    again = tmp_path / "elsewhere.py"
    again.write_text(OWN_REWARD)
    same = plan_of("ppo", recipe.changed({"reward.kind": f"{again}:pay"}))
    assert settings_hash(same) == settings_hash(plan)
    again.write_text(OWN_REWARD.replace("10.0", "11.0"))
    other = plan_of("ppo", recipe.changed({"reward.kind": f"{again}:pay"}))
    assert settings_hash(other) != settings_hash(plan)
    # A plan is not carried out with another reward than the one it is named after
    plan.check()
    file.write_text(OWN_REWARD.replace("10.0", "-5.0"))
    with pytest.raises(SettingsError, match="the reward no longer holds"):
        plan.check()
    with pytest.raises(ValueError, match="there is no file"):
        plan_of("ppo", recipe.changed({"reward.kind": f"{tmp_path}/nope.py:pay"}))
    with pytest.raises(ValueError, match="has no function 'other'"):
        plan_of("ppo", recipe.changed({"reward.kind": f"{again}:other"})).check()


# What a run is named after


def test_a_run_is_named_after_what_decides_it_and_nothing_else(folder):
    def names(seed: int = 0, **changes) -> dict[str, str]:
        recipe = toy_recipe(folder, **changes)
        return {
            name: settings_hash(plan_of(name, recipe, seed))
            for name in ("ppo", "orm", "rcrl")
        }

    def changed(**changes) -> set[str]:
        return {name for name, key in names(**changes).items() if key != plain[name]}

    plain = names()
    assert changed(evaluation={"k": 8}, seeds=5) == set()
    assert changed(ppo={"phases": 2}) == {"ppo"}
    assert changed(validate_every=1) == {"ppo"}
    assert changed(reward={"kind": "dense"}) == {"ppo"}
    assert changed(orm={"k": 5}) == {"orm"}
    assert changed(orm_samples="expert-iteration") == {"orm"}
    assert changed(rcrl={"k": 3}) == {"rcrl"}
    assert changed(expert_iteration={"k": 5}) == {"rcrl"}
    assert changed(seed=1) == changed(max_new_tokens=20) == {"ppo", "orm", "rcrl"}


def test_how_it_is_computed_is_no_part_of_a_runs_name(folder):
    recipe = toy_recipe(folder)
    for path, value in {
        "ppo.micro_tokens": 77,
        "ppo.gradient_checkpointing": True,
        "ppo.logit_rows": 5,
        "ppo.kl.reference": "swap",
        "sft.micro_tokens": 77,
    }.items():
        for name in ("sft", "ppo"):
            one, other = (
                plan_of(name, each) for each in (recipe, recipe.changed({path: value}))
            )
            assert identity(one) == identity(other)
    # It is written down all the same
    plan = plan_of("sft", recipe.changed({"sft.micro_tokens": 77}))
    assert json.loads(canonical_json(plan))["algorithm"]["micro_tokens"] == 77


def test_a_run_is_named_after_what_its_inputs_hold_and_not_where_they_lie(
    folder, tmp_path
):
    recipe = toy_recipe(folder)
    base, data = Path(recipe.policy), Path(recipe.task.name)
    plan = plan_of("sft", recipe)

    def named(**changes: Any) -> str:
        return settings_hash(plan_of("sft", recipe.changed(changes)))

    copy, moved_data = tmp_path / "base", tmp_path / data.name
    shutil.copytree(base, copy)
    (shutil.copytree if data.is_dir() else shutil.copy)(data, moved_data)
    assert named(policy=str(copy)) == settings_hash(plan)
    assert named(**{"task.name": str(moved_data)}) == settings_hash(plan)
    policy = load_policy(copy)
    policy.model.get_input_embeddings().weight.data.add_(1)
    policy.model.save_pretrained(copy)
    assert named(policy=str(copy)) != settings_hash(plan)
    for file in [moved_data] if moved_data.is_file() else moved_data.iterdir():
        file.write_text(file.read_text().replace("a?", "A?"))
    assert named(**{"task.name": str(moved_data)}) != settings_hash(plan)


def test_a_setting_without_which_nothing_could_be_planned_matters(folder):
    """The recipe without it is nobody's: its faults were told as the user's."""
    gone = toy_recipe(folder).model_dump(mode="json")
    gone["task"]["name"] = str(folder / "gone.jsonl")

    def make(changes):
        values = json.loads(json.dumps(gone))
        for path, value in changes.items():
            put(values, path, value)
        return load_settings(Recipe, values)

    given = {"task.name": str(folder / "toy"), "ppo.lr": 0.5}
    assert without_effect(["sft"], make, [given]) == ["ppo.lr"]
    assert without_effect(["sft", "ppo"], make, [given]) == []


@pytest.mark.parametrize("kind", ["dense", "shaped"])
def test_a_reward_that_no_step_can_earn_is_refused(folder, tmp_path, kind):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"question": "a?", "answer": "3"}')
    recipe = toy_recipe(folder, reward={"kind": kind})
    plan_of("ppo", recipe).check()
    bare = recipe.changed({"task.name": str(tmp_path)})
    with pytest.raises(SettingsError, match=f"a {kind} reward pays what a reference"):
        plan_of("ppo", bare).check()


def test_a_plan_with_paths_from_here_is_carried_out_from_anywhere(
    folder, tmp_path, monkeypatch
):
    (folder / "mine.py").write_text(OWN_REWARD)
    own = {"kind": f"{folder}/mine.py:pay"}
    absolute = plan_of("ppo", toy_recipe(folder, reward=own))
    monkeypatch.chdir(folder)
    recipe = toy_recipe(folder, reward={"kind": "mine.py:pay"})
    recipe = recipe.changed({"policy": "base", "task.name": "toy/{split}.jsonl"})
    plan = plan_of("ppo", recipe)
    assert settings_hash(plan) == settings_hash(absolute)
    text = canonical_json(plan)
    monkeypatch.chdir(tmp_path)
    assert canonical_json(read_plan(json.loads(text))) == text
    for each in (plan, plan.start):
        each.check()
    # Names that are no paths stay names, also beside a folder of that name
    (tmp_path / "nano").mkdir()
    (tmp_path / "gsm-mini").mkdir()
    named = plan_of("sft", load_recipe("tiny"))
    assert (named.policy, named.task.name) == ("nano", "gsm-mini")


def test_a_plan_whose_inputs_have_changed_is_not_carried_out(folder, tmp_path):
    copy = tmp_path / "base"
    recipe = toy_recipe(folder)
    shutil.copytree(recipe.policy, copy)
    recipe = recipe.changed({"policy": str(copy)})
    plan = plan_of("sft", recipe)
    trained = run_toy(lambda *_: obtain(plan), recipe, tmp_path / "runs")
    policy = load_policy(copy)
    policy.model.get_input_embeddings().weight.data.add_(1)
    policy.model.save_pretrained(copy)
    # Never the old result for the new base ...
    again = run_toy(module.train_sft, recipe, tmp_path / "runs")
    assert again.run.path != trained.run.path
    # ... nor the new base for the old plan, or its weights
    with pytest.raises(SettingsError, match="the policy no longer holds"):
        run_toy(lambda *_: obtain(plan), recipe, tmp_path / "other")
    with pytest.raises(SettingsError, match="was trained from another"):
        load_run(trained.run.path)
    with pytest.raises(SettingsError, match="was trained from another"):
        run_toy(lambda *_: obtain(plan), recipe, tmp_path / "runs")


def test_a_plan_is_a_file(folder):
    recipe = toy_recipe(folder, reward={"kind": "sparse-orm"}, rcrl_labels="orm")
    for name in steps():
        plan = plan_of(name, recipe, 3)
        read = read_plan(json.loads(canonical_json(plan)))
        assert read == plan
        assert settings_hash(read) == settings_hash(plan)
    values = json.loads(canonical_json(plan_of("ppo", recipe, 3)))
    # What a run of before holds besides, where it did nothing, and where it did
    values["algorithm"]["truncation_penalty"] = 0.0
    values["algorithm"]["credit"]["value_warmup"] = 0
    values["reward_model"]["algorithm"]["max_per_question"] = None
    assert read_plan(values) == plan_of("ppo", recipe, 3)
    values["algorithm"]["truncation_penalty"] = 0.5
    with pytest.raises(SettingsError, match="truncation_penalty"):
        read_plan(values)
    with pytest.raises(SettingsError, match=r"steps: unknown 'pop'.*mean 'ppo'"):
        read_plan({"step": "pop"})
    with pytest.raises(SettingsError, match="a plan is a mapping with a step"):
        read_plan({"lr": 3})


# The graph of runs


class Wish(Plan):
    """A step of one's own: it takes what it needs and adds a number to the weights."""

    step: Literal["wish"] = "wish"
    start: module.AnyPlan
    by: float

    about = "Add a number to every weight."

    @classmethod
    def of(cls, recipe: Recipe, seed: int) -> Wish:
        common = module.common_fields(recipe)
        by = recipe.more.get("wish", {}).get("by", 1.0)
        return cls(**common, start=plan_of("sft", recipe, seed), by=by)

    @property
    def needs(self) -> dict[str, Plan]:
        return {"start": self.start}

    def make(self, base, needed, run) -> Policy:
        policy = needed["start"].policy
        for weight in policy.model.parameters():
            weight.data.add_(self.by)
        run.log("wish", by=self.by)
        return policy

    @staticmethod
    def lines(row) -> str:
        return f"added {row['by']}" if row["kind"] == "wish" else ""


@pytest.fixture
def wish():
    register(Wish)
    yield
    del _STEPS["wish"]


def test_a_step_of_ones_own_is_a_class_and_known_to_the_command_line(
    wish, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path))
    command = ["train", "wish", "--profile", str(folder / "toy.yaml")]
    options = ["--set", "more", "{'wish': {'by': 0.5}}"]
    shown = CliRunner().invoke(cli.app, [*command, *options])
    assert shown.exit_code == 0, shown.output
    assert "added 0.5" in shown.output
    path = next(tmp_path.glob("wish-*"))
    loaded = load_run(path)
    start = obtain(loaded.run.settings.start).policy
    assert same_bits(
        weights(loaded.policy),
        {name: tensor + 0.5 for name, tensor in weights(start).items()},
    )
    help_text = CliRunner().invoke(cli.app, ["train", "--help"]).output
    assert "Add a number to every weight." in help_text


def test_the_time_of_a_run_is_its_own_and_what_is_done_asks_for_nothing(
    wish, folder, tmp_path, monkeypatch
):
    class Clock:
        now = 5000.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(folder_module, "time", clock)
    worked = []

    def work(seconds: float, whole, *args, **options):
        worked.append(seconds)
        clock.now += seconds
        return whole(*args, **options)

    monkeypatch.setattr(module, "sft", partial(work, 3600, lambda *_: None))
    monkeypatch.setattr(Wish, "make", partial(work, 7, lambda base, *_: base))
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path))
    plan = plan_of("wish", toy_recipe(folder))
    assert obtain(plan).seconds == 7
    assert worked == [3600, 7]  # which would count, were it made within the run
    assert obtain(plan).seconds == 7
    assert worked == [3600, 7]


def test_a_filtered_expert_gets_a_reward_model_that_learned_from_sft(folder):
    """Its judgement is needed before there are samples of expert iteration."""
    recipe = toy_recipe(
        folder,
        orm_samples="expert-iteration",
        expert_iteration={"orm_threshold": 0.5, "finetune": UPDATE},
    )
    filtered = plan_of("expert-iteration", recipe)
    assert filtered.needs["reward_model"].start.step == "sft"
    assert plan_of("orm", recipe).start == filtered


def test_throughput_is_tokens_over_the_seconds_of_each_stage(
    folder, tmp_path, monkeypatch
):
    clock = SimpleNamespace(now=5000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(folder_module, "time", clock)
    with RunFolder("ppo", plan_of("sft", toy_recipe(folder)), root=tmp_path) as run:
        for number, tokens in enumerate((100, 300)):
            for stage, seconds in (("sampling", 10), ("scoring", 4), ("learning", 20)):
                with run.clock(stage):
                    clock.now += seconds if number or stage != "scoring" else 0
            clock.now += 1000  # of no stage
            with run.clock("validating"):
                clock.now += 5
            run.log("phase", phase=number, response_tokens=tokens)
            run.log("other")
    assert Trained(run, toy_policy()).throughput == [
        {"sampling": 10, "learning": 5},
        {"sampling": 30, "scoring": 75, "learning": 15},
    ]


# A reward model on the command line


@pytest.fixture(scope="module")
def trained_orm(folder) -> Path:
    """The root of a reward model's run and of the SFT that it scores."""
    root = folder / "runs"
    run_toy(module.train_reward_model, toy_recipe(folder), root)
    return root


def run_in(root: Path, kind: str) -> Path:
    (path,) = root.glob(f"{kind}-*")
    return path


def test_a_policy_is_evaluated_with_a_reward_model(trained_orm, folder, monkeypatch):
    monkeypatch.setenv("RLREASON_RUNS", str(trained_orm))
    sft, orm = (str(run_in(trained_orm, kind)) for kind in ("sft", "orm"))
    seen, evaluate = [], evaluate_module.evaluate

    def note(*args, orm, **options):
        seen.append(orm)
        return evaluate(*args, orm=orm, **options)

    monkeypatch.setattr(evaluate_module, "evaluate", note)
    command = ["evaluate", sft, "--profile", str(folder / "toy.yaml")]

    def metrics(*options: str) -> list[str]:
        shown = CliRunner().invoke(cli.app, [*command, *options])
        assert shown.exit_code == 0, shown.output
        return [line.split()[0] for line in shown.output.splitlines() if "@" in line]

    assert "rerank@4" in metrics("--orm", orm)
    assert "rerank@4" not in metrics()
    assert seen[1] is None
    trained = module.train_reward_model(toy_recipe(folder)).orm
    assert same_bits(seen[0].tensors(), trained.tensors())
    # Greedy, there is one answer and nothing to choose from
    refused = CliRunner().invoke(cli.app, [*command, "--orm", orm, "--greedy"])
    assert refused.exit_code == 2
    assert "--orm chooses among samples, and --greedy draws none" in refused.output
    assert len(seen) == 2


def test_only_a_finished_reward_model_is_one(trained_orm, tmp_path):
    for other in (run_in(trained_orm, "sft"), tmp_path, Path("nano")):
        with pytest.raises(ValueError, match="no run folder of `rlreason train orm`"):
            module.load_reward_model(other)
    orm = run_in(trained_orm, "orm")
    half = tmp_path / orm.name
    shutil.copytree(orm, half)
    (half / "status.json").unlink()
    for state in half.glob("checkpoints/*/state.json"):
        state.write_text('{"updates": 1}')
        (state.parent / "hashes.json").unlink()  # which would call it damaged
    with pytest.raises(ValueError, match="not finished; run its `rlreason train`"):
        module.load_reward_model(half)
    assert module.load_reward_model(orm).tensors()


def test_a_hub_that_cannot_be_reached_is_told_by_loading_and_not_by_naming(
    monkeypatch,
):
    def unreachable(*_):
        raise HfHubHTTPError.__bases__[0]("Name or service not known")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert policy_digest("somebody/something") == "somebody/something@unknown"


def test_a_gguf_file_of_the_hub_is_named_by_the_revision_of_its_copy(
    tmp_path, monkeypatch
):
    """Such repositories need have no config.json, so none had a revision."""
    there = {("some/body", "q8.gguf"): str(tmp_path / "0123456789abcdef" / "q8.gguf")}

    def unreachable(*_):
        raise HfHubHTTPError.__bases__[0]("Name or service not known")

    monkeypatch.setattr("huggingface_hub.model_info", unreachable)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *asked: there.get(asked)
    )
    assert policy_digest("some/body/q8.gguf") == "some/body/q8.gguf@0123456789ab"
    assert policy_digest("some/body/q4.gguf") == "some/body/q4.gguf@unknown"

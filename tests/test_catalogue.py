"""The catalogue: each arm changes what it names, and can be made of every profile."""

from __future__ import annotations

from typing import Any

import pytest
from toys import TOY_PROBLEMS, Memory, toy_policy, toy_recipe

from rlreason.algorithms.ppo import PpoSettings, ppo
from rlreason.experiments.catalogue import ALL, BASE, CATALOGUE, GREEDY, Arm, Catalogue
from rlreason.experiments.measures import MEASURES, Context
from rlreason.experiments.records import metric_of
from rlreason.experiments.reported import reported_tables
from rlreason.runs.plans import plan_of
from rlreason.runs.profiles import load_recipe
from rlreason.settings import canonical_json

ARMS = CATALOGUE.arms
PROFILES = ["smoke", "tiny", "smol", "paper"]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """A model of the hub is named without asking it."""
    monkeypatch.setattr("rlreason.runs.contents._hub_revision", lambda name: "main")


def differences(one: Any, other: Any, at: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two dumps of settings differ, by the path of the field."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return {} if one == other else {at: (one, other)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**one, **other}:
        path = f"{at}.{key}" if at else key
        found |= differences(one.get(key), other.get(key), path)
    return found


def test_a_name_means_one_thing_and_what_entries_name_exists():
    tables = [table.name for table in CATALOGUE.tables]
    names = [*tables, *(arm.name for arm in CATALOGUE.entries)]
    assert len(set(names)) == len(names)
    shown = {name for table in CATALOGUE.tables for name in table.arms}
    assert shown == set(ARMS)
    for arm in CATALOGUE.entries:
        assert set(arm.measures) <= MEASURES.keys()
        assert {arm.start, arm.compared} - {""} <= set(ARMS)
        assert arm.text
    for table in CATALOGUE.tables:
        for name in table.arms:
            needed = {metric_of(metric)[0] for metric in table.metrics}
            assert needed <= {*ARMS[name].measures} or table.metrics == ("maj@1",)
    assert set(GREEDY) < set(ALL) < MEASURES.keys()


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("profile", PROFILES)
def test_an_arm_changes_what_it_names_and_nothing_else(name, profile):
    recipe, arm = load_recipe(profile), ARMS[name]
    changed = arm.recipe(recipe)
    made = arm.changes(recipe) if callable(arm.changes) else arm.changes
    found = differences(recipe.model_dump(), changed.model_dump())
    for path in found:
        assert any(f"{path}.".startswith(f"{change}.") for change in made), path
    short = profile == "smoke" and arm.recipe(recipe).sft == recipe.sft  # of one epoch
    assert bool(found) == bool(made) or short


@pytest.mark.parametrize("name", [n for n, arm in ARMS.items() if arm.step != BASE])
def test_an_arm_reaches_the_runs_of_its_step(name):
    recipe, arm = load_recipe("tiny"), ARMS[name]
    changed = arm.recipe(recipe)
    same = plan_of(arm.step, recipe, 0) == plan_of(arm.step, changed, 0)
    assert same == (changed == recipe)
    if arm.start == "sft":  # and none that it is compared with
        for step in {"sft", "ppo", "expert-iteration"} - {arm.step}:
            assert plan_of(step, recipe, 0) == plan_of(step, changed, 0)


@pytest.mark.parametrize("name", ["ppo-sparse-orm", "ppo-dense"])
def test_a_reward_of_another_kind_takes_no_size_along(name, tmp_path):
    recipe = toy_recipe(tmp_path, reward={"kind": "shaped", "size": 0.3})
    assert ARMS[name].recipe(recipe).reward.size != 0.3
    wrong = Arm(name, "", "ppo", {"reward.kind": "dense"})
    assert wrong.recipe(recipe).reward.size == 0.3


def test_a_weak_reward_model_is_a_head_that_learns_at_the_rate_of_sft():
    recipe = load_recipe("tiny")
    weak = ARMS["ppo-weak-orm"].recipe(recipe)
    assert not weak.orm.likelihood
    assert (weak.orm.lr, weak.orm.lr_floor) == (recipe.sft.lr, recipe.sft.lr_floor)
    assert (weak.reward.kind, weak.orm_samples) == ("sparse-orm", "sft")
    assert (weak.ppo.kl.coef, weak.ppo.kl.target) == (0, None)


def test_the_best_half_makes_as_many_updates(tmp_path):
    recipe = toy_recipe(tmp_path)
    best_half = ARMS["ppo-best-half"]
    half = best_half.recipe(recipe)
    assert (recipe.ppo.n, half.ppo.keep) == (2, 1)
    wrong = half.ppo.model_copy(update={"batch_size": recipe.ppo.batch_size})

    def updates(settings: PpoSettings) -> int:
        recorder = Memory(save_every=10**9)
        short = {"phases": 1, "epochs": 2, "lora": None, "max_new_tokens": 24}
        settings = settings.model_copy(update=short)
        ppo(toy_policy(), TOY_PROBLEMS, settings, recorder=recorder)
        return recorder.rows[0]["updates"]

    counts = [updates(settings) for settings in (recipe.ppo, half.ppo, wrong)]
    assert counts == [4, 4, 2]
    with pytest.raises(ValueError, match=r"halves ppo.n=2 .* make them even"):
        best_half.recipe(recipe.changed({"ppo.batch_size": 5, "ppo.rollouts": 10}))


def test_arms_are_found_by_their_name_or_their_tables_in_the_order_asked():
    found = [arm.name for arm in CATALOGUE.find(["rewards", "ppo", "ppo-dense"])]
    assert found == ["ppo-dense", "ppo-shaped", "ppo"]
    assert CATALOGUE.find() == [*ARMS.values()]
    with pytest.raises(ValueError, match=r"'ppo-densest' \(did you mean 'ppo-dense'"):
        CATALOGUE.find(["ppo", "ppo-densest"])
    with pytest.raises(ValueError, match="no table 'x'; there are table-1, table-2"):
        CATALOGUE.table("x")


def test_an_experiment_is_one_entry(tmp_path):
    arm = Arm("ppo-long", "more phases", "ppo", {"ppo.phases": 9}, against="ppo")
    mine = Catalogue((*CATALOGUE.entries, arm), CATALOGUE.tables)
    context = Context(toy_recipe(tmp_path, seeds=2), mine)
    subjects = context.subjects(["ppo-long"])
    named = [(subject.arm.name, subject.seed) for subject in subjects]
    assert named == [(n, s) for n in ("sft", "ppo", "ppo-long") for s in (0, 1)]
    assert subjects[-1].plan.algorithm.phases == 9
    assert subjects[-1].arm.measures == GREEDY


# The paper's tables


@pytest.mark.parametrize("profile", PROFILES)
def test_every_run_of_the_catalogue_can_be_planned(profile):
    context = Context(load_recipe(profile, {"seeds": 1}))
    subjects = context.subjects()
    assert {subject.arm.name for subject in subjects} == set(ARMS)
    sizes = {subject.size for subject in subjects if subject.arm.name == "ppo-base"}
    assert len(sizes) == len(context.recipe.sizes) + 1
    assert [s.size for s in subjects if s.arm.name == "ppo-replay"] == [
        context.recipe.policy.rpartition("/")[2]
    ]


def test_the_tables_hold_the_methods_of_the_papers():
    for table in CATALOGUE.tables:
        known = reported_tables().get(table.reported)
        if known is not None:
            assert set(table.methods) <= set(table.arms)
            assert set(table.methods.values()) == set(known.rows), table.name
    counts = [len(CATALOGUE.table(f"table-{n}").arms) for n in range(1, 7)]
    assert counts == [9, 6, 5, 4, 4, 3]


def test_a_run_that_stands_in_several_tables_is_one_run():
    context = Context(load_recipe("tiny", {"seeds": 1}))
    both = context.subjects(["table-1", "table-4", "table-6"])
    keys = [(s.arm.name, s.size) for s in both]
    assert len(set(keys)) == len(keys)
    hashes = {(s.size, s.plan_hash) for s in both}
    assert len(hashes) == len(keys)


def test_rows_of_the_papers_tables_have_all_seeds_and_others_three_at_least():
    context = Context(load_recipe("tiny"))
    seeds: dict[str, set[int]] = {}
    for subject in context.subjects():
        seeds.setdefault(subject.arm.name, set()).add(subject.seed)
    most = context.recipe.seeds
    papers = {a for t in CATALOGUE.tables if t.reported for a in t.arms}
    assert most >= 5
    assert {name for name, s in seeds.items() if len(s) == most} > papers
    assert {len(s) for s in seeds.values()} == {3, most}
    assert CATALOGUE.seeds("ppo", 9) == 9  # of several tables the one that asks most
    assert CATALOGUE.seeds("reinforce", 2) == 2  # a profile may have fewer


@pytest.mark.parametrize("table", ["table-2", "table-3", "table-5"])
def test_no_run_without_sft_knows_a_solution_but_those_of_its_prompt(table):
    """Neither it, nor a reward model that filters or rewards, nor who samples."""
    recipe = load_recipe("tiny", {"seeds": 1})
    for arm in CATALOGUE.find([table]):
        subject = Context(recipe).subject(arm.name, "nano", 0)
        text = canonical_json(subject.plan) if subject.plan else ""
        assert '"step":"sft"' not in text, arm.name
        assert '"reference_solutions":true' not in text, arm.name
        if arm.name.startswith("expert-iteration-orm"):
            assert subject.plan.reward_model.start.algorithm.orm_threshold is None
    # Wrong: the filter of expert iteration from SFT
    wrong = Context(recipe).subject("expert-iteration-orm", "nano", 0)
    assert '"step":"sft"' in canonical_json(wrong.plan)


def test_the_shifted_task_is_asked_in_training_and_measuring_alike(tmp_path):
    context = Context(load_recipe("tiny"))
    for arm in CATALOGUE.find(["table-3"]):
        subject = context.subject(arm.name, "nano", 0)
        assert subject.recipe.task.name == "svamp-mini"
        judge = context.judge_plan(subject)
        assert (judge.task.name, judge.start.start) == ("svamp-mini", None)
        assert subject.arm.start == ("base-shifted" if arm.step != BASE else "")
    one = context.judge_plan(context.subject("ppo", "nano", 0))
    other = context.judge_plan(context.subject("ppo-base", "nano", 0))
    assert one == other  # one reward model a base, task and seed
    assert one.start.step == "expert-iteration"
    with pytest.raises(ValueError, match="no shifted variant"):
        Context(toy_recipe(tmp_path)).subjects(["table-3"])


def test_light_sft_is_half_as_long_and_ppo_begins_from_it():
    context = Context(load_recipe("tiny", {"sft.epochs": 4}))
    full, light, after, ppo_full = (
        context.subject(name, "nano", 0).plan
        for name in ("sft", "sft-light", "ppo-light", "ppo")
    )
    assert (full.algorithm.epochs, light.algorithm.epochs) == (4, 2)
    assert (after.start, ppo_full.start) == (light, full)
    assert after.algorithm == ppo_full.algorithm


def test_labels_of_the_fifth_table_are_of_whole_solutions_of_one_round():
    context = Context(load_recipe("tiny"))
    minimal = context.subject("ei-minimal", "nano", 0).plan
    assert (minimal.algorithm.k, minimal.algorithm.rounds, minimal.start) == (
        1,
        1,
        None,
    )
    for ratio in (100, 10, 1):
        plan = context.subject(f"rcrl-minimal-{ratio}", "nano", 0).plan
        assert plan.expert == minimal
        assert (plan.algorithm.k, plan.algorithm.positive_ratio) == (0, ratio)


def test_longer_trainings_are_as_long_as_they_say():
    recipe = load_recipe("tiny")
    longer = ARMS["expert-iteration-longer"].recipe(recipe).expert_iteration
    plain = recipe.expert_iteration
    assert longer.finetune.epochs == plain.rounds * plain.finetune.epochs
    assert longer.rounds == plain.rounds
    assert ARMS["ppo-longer"].recipe(recipe).ppo.phases == 2 * recipe.ppo.phases

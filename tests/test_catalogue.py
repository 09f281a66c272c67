"""The catalogue: each entry changes what it names, and can be made of every profile."""

from __future__ import annotations

from typing import Any

import pytest
from toys import TOY_PROBLEMS, Memory, toy_policy, toy_recipe

from rlreason.algorithms.ppo import PpoSettings, ppo
from rlreason.experiments.catalogue import CATALOGUE, Variant
from rlreason.experiments.measures import MEASURES
from rlreason.experiments.records import TrainingRecord
from rlreason.runs.plans import plan_of
from rlreason.runs.profiles import load_recipe

COMPARISONS = CATALOGUE.comparisons


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
    entries = [c for table in CATALOGUE.tables for c in table.comparisons]
    names = [*tables, *(entry.name for entry in entries)]
    assert len(set(names)) == len(names)
    for entry in entries:
        assert entry.measures
        assert set(entry.measures) <= MEASURES.keys()
        assert entry.name == entry.after.name  # one record a training
        assert entry.text
    for figure in CATALOGUE.figures:
        assert figure.lines.keys() <= COMPARISONS.keys()
        assert set(figure.columns) <= set(TrainingRecord.__dataclass_fields__)


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("profile", ["smoke", "tiny", "smol", "paper"])
def test_a_variant_changes_what_it_names_and_nothing_else(name, profile):
    recipe = load_recipe(profile)
    variant = COMPARISONS[name].after
    changed = variant.recipe(recipe)
    made = variant.changes(recipe) if callable(variant.changes) else variant.changes
    found = differences(recipe.model_dump(), changed.model_dump())
    for path in found:
        assert any(f"{path}.".startswith(f"{change}.") for change in made), path
    assert bool(found) == bool(made)


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_variant_reaches_the_runs_of_its_step_and_none_that_it_is_compared_with(name):
    recipe = load_recipe("tiny")
    variant = COMPARISONS[name].after
    changed = variant.recipe(recipe)
    same = plan_of(variant.step, recipe, 0) == plan_of(variant.step, changed, 0)
    assert same == (changed == recipe)
    for step in {"sft", "ppo", "expert-iteration"} - {variant.step}:
        assert plan_of(step, recipe, 0) == plan_of(step, changed, 0)


@pytest.mark.parametrize("name", ["ppo-sparse-orm", "ppo-dense"])
def test_a_reward_of_another_kind_takes_no_size_along(name, tmp_path):
    recipe = toy_recipe(tmp_path, reward={"kind": "shaped", "size": 0.3})
    assert COMPARISONS[name].after.recipe(recipe).reward.size != 0.3
    wrong = Variant(name, "ppo", {"reward.kind": "dense"})
    assert wrong.recipe(recipe).reward.size == 0.3


def test_a_weak_reward_model_is_a_head_that_learns_at_the_rate_of_sft():
    recipe = load_recipe("tiny")
    weak = COMPARISONS["ppo-weak-orm"].after.recipe(recipe)
    assert not weak.orm.likelihood
    assert (weak.orm.lr, weak.orm.lr_floor) == (recipe.sft.lr, recipe.sft.lr_floor)
    assert (weak.reward.kind, weak.orm_samples) == ("sparse-orm", "sft")
    assert (weak.ppo.kl.coef, weak.ppo.kl.target) == (0, None)


def test_the_best_half_makes_as_many_updates(tmp_path):
    recipe = toy_recipe(tmp_path)
    best_half = COMPARISONS["ppo-best-half"].after
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


def test_comparisons_are_found_by_their_name_or_their_tables_in_the_order_asked():
    found = [c.name for c in CATALOGUE.find(["rewards", "ppo", "ppo-dense"])]
    assert found == ["ppo-dense", "ppo-shaped", "ppo"]
    assert CATALOGUE.find() == [*COMPARISONS.values()]
    with pytest.raises(ValueError, match=r"'ppo-densest' \(did you mean 'ppo-dense'"):
        CATALOGUE.find(["ppo", "ppo-densest"])
    with pytest.raises(ValueError, match="no figure 'x'; there are over-opt"):
        CATALOGUE.figure("x")

"""Recipes: what is refused, and what would be overwritten."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
from toys import toy_profile, toy_recipe

from rlreason.runs.plans import plan_of, steps
from rlreason.runs.recipes import Recipe, RewardSettings
from rlreason.settings import Settings, SettingsError, load_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Base, problems and profile of the toy on disk."""
    folder = tmp_path_factory.mktemp("toy")
    toy_profile(folder)
    return folder


def settings_classes(*roots: type) -> set[type[Settings]]:
    """The settings classes among some types and all that stand in their fields."""
    found, ahead = set(), list(roots)
    while ahead:
        kind = ahead.pop()
        ahead += typing.get_args(kind)
        if isinstance(kind, type) and issubclass(kind, Settings) and kind not in found:
            found.add(kind)
            ahead += [field.annotation for field in kind.model_fields.values()]
    return found


def test_every_class_of_a_recipe_and_of_a_run_refuses_an_unknown_key():
    classes = settings_classes(Recipe, *steps().values())
    names = {cls.__name__ for cls in classes}
    assert {"PpoSettings", "GaeSettings", "KlSettings", "LoraSettings"} <= names
    assert {"ReplaySettings", "OrmSettings", "RcrlSettings", "TaskSettings"} <= names
    for cls in classes:
        with pytest.raises(SettingsError, match=f"{cls.__name__}: unknown 'nope'"):
            load_settings(cls, {"nope": 1})


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"ppo": {"learning_rate": 1e-3}}, "ppo.learning_rate: Extra inputs"),
        ({"ppo": {"credit": {"kind": "gae", "n": 4}}}, "ppo.credit.gae.n: Extra"),
        ({"ppo": {"credit": {"kind": "a2c"}}}, "ppo.credit: .*'gae', 'reinforce'"),
        ({"reward": {"kind": "dens"}}, "reward.kind: .*'sparse', 'dense'"),
        ({"orm_samples": "ppo"}, "orm_samples: .*'sft' or 'expert-iteration'"),
        ({"rcrl": {"k": -1}}, "rcrl.k: .*greater than or equal to 0"),
        ({"validate_every": 0}, "validate_every: .*greater than or equal to 1"),
    ],
)
def test_a_wrong_recipe_says_which_field_is_wrong(changes, fault, tmp_path):
    with pytest.raises(SettingsError, match=f"Recipe: {fault}") as error:
        toy_recipe(tmp_path, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["sparse", "sparse-orm", "dense-orm"])
def test_a_size_is_refused_where_it_has_no_use(kind):
    assert load_settings(RewardSettings, {"kind": kind}).size is None
    with pytest.raises(SettingsError, match=f"size means nothing to a {kind} reward"):
        load_settings(RewardSettings, {"kind": kind, "size": 0.5})


# What would be overwritten


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {"ppo": {"max_new_tokens": 100}},
            "ppo.max_new_tokens .* set the recipe's max",
        ),
        (
            {"expert_iteration": {"max_new_tokens": 100}},
            "expert_iteration.max_new_tokens .* set the recipe's max_new_tokens, which",
        ),
        (
            {"orm": {"max_new_tokens": 100}},
            "orm.max_new_tokens .* set the recipe's max",
        ),
        (
            {"rcrl": {"max_new_tokens": 9}},
            "rcrl.max_new_tokens .* set the recipe's max",
        ),
        (
            {"ppo": {"seed": 3}},
            "ppo.seed would be overwritten: give the seed to the co",
        ),
        (
            {"sft": {"seed": 3}},
            "sft.seed would be overwritten: give the seed to the co",
        ),
        ({"rcrl": {"seed": 3}}, "rcrl.seed would be .*: give the seed to the command"),
    ],
)
def test_what_would_be_overwritten_is_refused_with_its_remedy(changes, remedy, folder):
    with pytest.raises(SettingsError, match=remedy):
        toy_recipe(folder, **changes)
    # It would be: a run takes the recipe's limit, and the command's seed
    run = plan_of("ppo", toy_recipe(folder), 5).algorithm
    assert (run.max_new_tokens, run.seed) == (24, 5)


def test_what_is_said_twice_alike_is_no_contradiction(folder):
    recipe = toy_recipe(folder, ppo={"max_new_tokens": 24, "seed": 0})
    assert plan_of("ppo", recipe, 0).algorithm.max_new_tokens == 24


def test_steps_must_earn_less_than_the_answer():
    for size in (1.0, 1.5):
        with pytest.raises(SettingsError, match="must earn less than the final answer"):
            load_settings(RewardSettings, {"kind": "dense", "size": size})
    assert load_settings(RewardSettings, {"kind": "dense", "size": 0.9}).size == 0.9
    assert load_settings(RewardSettings, {"kind": "shaped", "size": 1.0}).size == 1.0

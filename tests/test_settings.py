"""Settings: what is refused, and that the hash names the experiment alone."""

from __future__ import annotations

import json
from datetime import date

import pytest
from pydantic import Field, ValidationError

from rlreason.settings import (
    Settings,
    SettingsError,
    canonical_json,
    identity,
    load_settings,
    setting,
    settings_hash,
)


class Training(Settings):
    """A settings class like those of the algorithms."""

    lr: float = Field(1e-3, gt=0)
    steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    name: str = "nano"


class Sampling(Settings):
    k: int = 4
    temperature: float = 1.0


class Experiment(Settings):
    training: Training = Training()
    sampling: Sampling = Sampling()


def test_an_unknown_key_is_an_error_that_names_what_was_meant():
    with pytest.raises(SettingsError, match=r"'setps'.*did you mean 'steps'"):
        load_settings(Training, {"setps": 1})


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"lr": "fast"}, "lr"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"steps": "3"}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"betas": [0.9]}, "betas"),
    ],
)
def test_a_wrong_value_is_an_error_on_one_line_that_names_the_field(values, field):
    with pytest.raises(SettingsError, match=rf"Training: {field}") as caught:
        load_settings(Training, values)
    assert "\n" not in str(caught.value)


def test_lists_of_yaml_become_tuples_and_whole_numbers_floats():
    settings = load_settings(Training, {"betas": [0.8, 0.9], "lr": 1})
    assert settings.betas == (0.8, 0.9)
    assert isinstance(settings.lr, float)


def test_settings_cannot_be_changed_or_extended():
    settings = Training()
    with pytest.raises(ValidationError):
        settings.lr = 1.0
    with pytest.raises(ValidationError):
        Training(momentum=0.9)


def test_equal_settings_have_one_hash_however_they_were_written():
    assert settings_hash(Training()) == settings_hash(
        load_settings(Training, {"name": "nano", "betas": [0.9, 0.95], "steps": 10})
    )


@pytest.mark.parametrize(
    "change", [{"lr": 1.0000000000000002e-3}, {"steps": 11}, {"name": "nano-xs"}]
)
def test_any_change_of_a_value_changes_the_hash(change):
    assert settings_hash(Training(**change)) != settings_hash(Training())


def test_settings_within_settings_have_a_canonical_text():
    text = canonical_json(Experiment())
    assert json.loads(text)["sampling"] == {"k": 4, "temperature": 1.0}
    assert " " not in text
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert settings_hash(Experiment()) != settings_hash(
        Experiment(sampling=Sampling(k=8))
    )


def test_the_hash_is_the_same_on_every_machine_and_in_every_process():
    # Written down once: run folders of other machines must be found again
    assert settings_hash(Training()) == "23cafae504cc"
    assert settings_hash(Sampling()) == "cf631c1187d9"


# Placement and what is neutral


class Model(Settings):
    """A part with a value that says only how it is computed."""

    width: int = setting(8, "Units.", source="ours")
    chunk: int = setting(64, "Rows at once.", source="ours", placement=True)


class Old(Settings):
    """As a result was recorded with it."""

    lr: float = setting(1e-3, "Rate.", source="paper", gt=0)
    model: Model = setting(Model, "What learns.", source="ours")
    models: tuple[Model, ...] = setting((), "More of them.", source="ours")


class New(Old):
    """Later: another setting, which does nothing at None, and another default of it."""

    clip: float | None = setting(0.2, "A clip.", source="ours", neutral=None)


class Wrong(Old):
    """The wrong version: the new setting does not say where it is neutral."""

    clip: float | None = setting(None, "A clip.", source="ours")


def test_a_new_neutral_setting_makes_no_result_stale():
    assert settings_hash(New(clip=None)) == settings_hash(Old())
    assert settings_hash(New()) != settings_hash(Old())
    assert settings_hash(New(clip=0.3)) != settings_hash(New())
    assert settings_hash(Wrong()) != settings_hash(Old())


def test_placement_is_written_down_and_names_nothing():
    plain, chunked = Old(), Old(model=Model(chunk=1), models=(Model(chunk=2),))
    assert settings_hash(chunked) == settings_hash(Old(models=(Model(),)))
    assert settings_hash(Old(model=Model(width=9))) != settings_hash(plain)
    assert json.loads(canonical_json(chunked))["model"]["chunk"] == 1
    assert "chunk" not in identity(chunked)


def test_a_field_says_where_its_default_comes_from():
    for field in New.model_fields.values():
        assert field.json_schema_extra["source"] in ("paper", "ours")
        assert field.description
    with pytest.raises(SettingsError, match=r"lr: .*greater than 0"):
        load_settings(Old, {"lr": -1.0})


def test_a_value_that_json_cannot_hold_is_one_clear_error():
    with pytest.raises(SettingsError, match="is a date; settings are numbers, text"):
        load_settings(Training, {"name": date(2024, 1, 2)})

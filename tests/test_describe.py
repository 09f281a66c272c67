"""The table of all settings: nothing is left out, and ``--set`` takes every path."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from rlreason import cli
from rlreason.runs.describe import describe_settings, setting_rows, settings_page
from rlreason.runs.profiles import load_recipe
from rlreason.settings import SettingsError

RECIPE = load_recipe("tiny")
ROWS = setting_rows(None, RECIPE)


def test_every_setting_has_a_meaning_and_a_source():
    for row in ROWS:
        assert row.meaning, row.path
        assert row.source in ("paper", "precursor", "ours"), row.path
        assert row.type, row.path


def leaves(values: dict, above: str = "") -> list[str]:
    """The paths of a dump down to what is no mapping, or an empty one."""
    found = []
    for name, value in values.items():
        path = f"{above}{name}"
        deeper = isinstance(value, dict) and value
        found += leaves(value, f"{path}.") if deeper else [path]
    return found


def test_no_value_of_a_profile_is_left_out_and_each_is_as_it_is_there():
    paths = {row.path: row for row in ROWS}
    for path in leaves(RECIPE.model_dump()):
        if path.startswith("task.knobs."):
            continue
        value = RECIPE
        for name in path.split("."):
            value = getattr(value, name)
        shown = {row.value for row in ROWS if row.path == path}
        assert path in paths
        assert shown != {""}, path
        if isinstance(value, int):
            assert str(value) in shown


SHOWN = [row.path for row in ROWS if "." in row.path and row.value]


@pytest.mark.parametrize("path", SHOWN[::9])
def test_the_paths_are_those_that_set_takes(path):
    with pytest.raises(SettingsError) as error:
        RECIPE.changed({path: [["no", "such", "value"]]})
    assert path.split(".")[-1] in str(error.value)
    assert "Extra inputs" not in str(error.value)
    # Wrong: a path that there is not
    with pytest.raises(SettingsError, match="Extra inputs"):
        RECIPE.changed({f"{path}_nope": 1})


def test_an_algorithm_has_its_own_and_a_name_that_is_none_is_refused():
    assert {row.path.split(".")[0] for row in setting_rows("ppo", RECIPE)} == {"ppo"}
    ei = setting_rows("expert-iteration", RECIPE)
    assert {row.path.split(".")[0] for row in ei} == {"expert_iteration"}
    with pytest.raises(SettingsError, match="unknown 'pop'"):
        setting_rows("pop", RECIPE)
    shown = CliRunner().invoke(cli.app, ["settings", "ppo"])
    assert shown.output.strip() == describe_settings("ppo", RECIPE)
    assert "ppo.credit.lam: float = 0.95, here 1" in shown.output


def test_the_page_has_every_row_and_no_broken_table():
    page = settings_page(RECIPE, "tiny")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(ROWS)
    for line in rows:
        assert line.replace("\\|", "").count("|") == 7


def test_a_default_that_cannot_be_is_no_default():
    (row,) = [row for row in ROWS if row.path == "policy"]
    assert (row.default, row.value) == ("", "nano")

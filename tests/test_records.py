"""Records: written whole, read strictly, of a plan, shown with their provenance."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from toys import toy_profile, toy_recipe

from rlreason import cli
from rlreason.evaluation.intervals import Interval
from rlreason.execution import seeds
from rlreason.experiments import records
from rlreason.experiments.catalogue import CATALOGUE
from rlreason.experiments.records import (
    Record,
    RecordError,
    TrainingRecord,
    is_current,
    read_records,
    recorded,
    recorded_panels,
    recorded_table,
    recorded_training,
    verdict,
    write_records,
)
from rlreason.runs.environment import project_root
from rlreason.runs.folder import RunFolder
from rlreason.runs.plans import folder_of, obtain, plan_of
from rlreason.runs.profiles import load_recipe
from rlreason.settings import Settings, setting, settings_hash

ROW = Record(
    comparison="ppo",
    metric="maj@1",
    against="sft",
    before=0.5,
    after=0.575,
    difference=0.075,
    low=0.05,
    high=0.1,
    seeds=3,
    problems=1000,
    seconds=61.2,
    settings="abc0",
    commit="536e28836b08fed9174a4f54496c9b8b286d1124",
    device="a CPU",
    date="2026-11-23",
)
AUC = replace(
    ROW,
    comparison="orm",
    metric="AUC",
    against="",
    before=None,
    after=0.8,
    difference=None,
    low=0.7,
    high=0.9,
    problems=0,
)
LOSS = replace(ROW, comparison="rloo", after=0.4, difference=-0.1, low=-0.2, high=-0.05)
PHASE = TrainingRecord("ppo", 0, 1, 0.5, 0.25, None, "abc0")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The profile tiny, with nothing recorded; its folder."""
    root = tmp_path / "book" / "results"
    monkeypatch.setattr(records, "results_folder", lambda name: root / Path(name).stem)
    return root / "tiny"


def test_rows_are_read_as_written_in_the_order_of_the_catalogue(results):
    path = records.comparisons_path("tiny")
    assert path == results / "comparisons.csv"
    assert records.training_path("mine/big.yaml").parts[-2:] == ("big", "training.csv")
    assert read_records(Record, path) == []
    write_records(Record, [AUC, ROW], path)
    assert read_records(Record, path) == [ROW, AUC]
    write_records(TrainingRecord, [PHASE], results / "training.csv")
    assert recorded_training("tiny") == [PHASE]
    assert b"\r" not in path.read_bytes()
    assert {file.suffix for file in results.iterdir()} == {".csv"}  # no draft


def test_new_rows_replace_all_of_the_same_comparison_and_no_others(results):
    path = records.comparisons_path("tiny")
    second = replace(ROW, metric="maj@9")
    write_records(Record, [ROW, second, AUC], path)
    write_records(Record, [replace(ROW, seeds=9)], path)
    write_records(Record, [], path)
    found = [(row.comparison, row.metric, row.seeds) for row in recorded("tiny")]
    assert found == [("ppo", "maj@1", 9), ("orm", "AUC", 3)]
    assert [row.comparison for row in recorded("tiny", "reranking")] == ["orm"]


def test_an_interrupted_write_leaves_the_old_file(results, monkeypatch):
    path = records.comparisons_path("tiny")
    write_records(Record, [ROW], path)
    before = path.read_bytes()
    broken = replace(ROW, comparison="rloo")
    object.__setattr__(broken, "device", "\ud800")  # cannot be written
    with pytest.raises(UnicodeEncodeError):
        write_records(Record, [broken], path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("comparison,metric", "algorithm,metric", "the columns must be comparison,met"),
        ("61.2", "", "line 2: Record: seconds"),
        ("0.5750", "", "line 2: Record: after"),
        ("0.5750", "half", "line 2: Record: after"),
        ("0.5000,", ",", "before, difference and against stand together"),
        ("0.0750", "0.0650", "difference=0.065 is not 0.575 - 0.5"),
        ("0.0500", "0.0900", "0.075 is not within its interval, 0.09 to 0.1"),
        ("0.0500", "nan", "not within its interval"),
        (",3,1000", ",1000", "14 cells in 15 columns"),
        (",3,", ",three,", "line 2: Record: seeds"),
        ("a CPU", '"a CPU', "line 1: unexpected end of data"),
        ("a CPU", "\udcff", "'utf-8' codec can't decode"),
        ("orm,AUC,,,", "ppo,maj@1,sft,,", "line 3: "),
    ],
)
def test_a_damaged_file_is_one_error_that_says_where(old, new, fault, results):
    path = records.comparisons_path("tiny")
    write_records(Record, [ROW, AUC], path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1), errors="surrogateescape")
    with pytest.raises(RecordError) as error:
        recorded("tiny")
    assert str(path) in str(error.value)
    assert fault in str(error.value)
    assert str(error.value).endswith("`rlreason record` it anew")
    assert "\n" not in str(error.value)


def test_a_row_that_stands_twice_is_an_error(results):
    path = records.comparisons_path("tiny")
    write_records(Record, [ROW, replace(ROW, seeds=5)], path)
    with pytest.raises(RecordError, match="two rows of ppo maj@1 sft"):
        recorded("tiny")


# Of which plan


def test_a_row_is_current_as_long_as_the_recipe_makes_its_plan(tmp_path):
    recipe = toy_recipe(tmp_path, seeds=3)
    rloo = CATALOGUE.comparisons["rloo"].after.recipe(recipe)
    plan = plan_of("ppo", rloo, 0)
    row = replace(ROW, comparison="rloo", settings=settings_hash(plan))
    phase = replace(PHASE, comparison="rloo", seed=1)
    phase = replace(phase, settings=settings_hash(plan_of("ppo", rloo, 1)))
    assert is_current(row, recipe)
    assert is_current(phase, recipe)
    assert not is_current(replace(phase, seed=0), recipe)
    # In how many pieces, where, and what others do is all the same
    for same in (
        {"sft.micro_tokens": 77},
        {"orm.lr": 0.5},
        {"reward.kind": "sparse"},
        {"ppo.credit": {"kind": "grpo"}},  # which the variant changes anyway
    ):
        assert is_current(row, recipe.changed(same)), same
    assert is_current(replace(row, device="a GPU", date="2030-01-01"), recipe)
    elsewhere = shutil.copytree(recipe.policy, tmp_path / "elsewhere")
    assert is_current(row, recipe.changed({"policy": str(elsewhere)}))
    for other in ({"ppo.lr": 2e-3}, {"seeds": 2}, {"sft.epochs": 9}, {"start": "base"}):
        assert not is_current(row, recipe.changed(other)), other


def test_a_new_neutral_setting_and_any_chunk_size_make_no_row_stale():
    class Before(Settings):
        lr: float = 0.1

    class Now(Before):
        restarts: int = setting(0, "New.", source="ours", neutral=0)
        chunk: int = setting(512, "New.", source="ours", placement=True)

    class Wrong(Before):
        restarts: int = setting(0, "New.", source="ours")

    old = settings_hash(Before())
    assert settings_hash(Now()) == settings_hash(Now(chunk=64)) == old
    assert old not in (settings_hash(Wrong()), settings_hash(Now(restarts=1)))


# Shown in chapters


def test_a_table_says_what_when_and_where(results):
    assert recorded_table("tiny", "credit") == (
        "Nothing is recorded for profile tiny yet; `rlreason record credit --profile "
        "tiny` does it. Until then one seed is an anecdote."
    )
    path = records.comparisons_path("tiny")
    rerank = {"comparison": "orm", "metric": "rerank@96", "against": "maj@96"}
    unsure = replace(ROW, **rerank, low=-0.1, high=0.3, problems=300)
    write_records(Record, [ROW, LOSS, AUC, unsure], path)
    assert [row.comparison for row in recorded("tiny", "orm", "ppo")][-1] == "ppo"
    table, note = recorded_table("tiny", ["credit", "orm"]).split("\n\n")
    # What must not be torn apart has spaces that do not break
    assert "-10.0\xa0[-20.0,\xa0-5.0] | a\xa0loss |" in table
    assert table.replace("\xa0", " ").splitlines()[2:] == [
        "| `ppo` | maj@1 against sft | 50.0% | 57.5% | +7.5 [+5.0, +10.0] | a gain |",
        "| `rloo` | maj@1 against sft | 50.0% | 40.0% | -10.0 [-20.0, -5.0] | a loss |",
        "| `orm` | AUC |  | 0.80 | [0.70, 0.90] |  |",  # no change, no verdict
        "|  | rerank@96 against maj@96 | 50.0% | 57.5% | +7.5 [-10.0, +30.0] "
        "| inconclusive |",
    ]
    assert note == (
        "Recorded 2026-11-23 at commit 536e288 on a CPU, profile tiny, 3 seeds, 300 or "
        "1,000 test problems. Differences of percentages are in points."
    )


def test_a_table_says_where_a_chapters_run_is_of_other_settings(results, tmp_path):
    plan = plan_of("ppo", toy_recipe(tmp_path), 0)
    run = folder_of(plan)
    row = replace(ROW, settings=settings_hash(plan))
    write_records(Record, [row], records.comparisons_path("tiny"))
    assert "other settings" not in recorded_table("tiny", ["ppo"], run)
    other = folder_of(plan_of("ppo", toy_recipe(tmp_path), 1))
    assert isinstance(other, RunFolder)
    assert recorded_table("tiny", ["ppo"], other).endswith(
        "`ppo` was recorded with other settings than the run above."
    )


def test_a_verdict_needs_the_whole_interval():
    def of(low, high):
        return verdict(Interval((low + high) / 2, low, high, 0.95, 3, ""))

    assert of(0.1, 0.2) == "a gain"
    assert of(-0.2, -0.1) == "a loss"
    assert of(-0.1, 0.3) == of(0.0, 0.2) == of(-0.2, 0.0) == "inconclusive"


def test_a_figure_has_a_panel_a_comparison_and_column_and_a_line_a_seed(results):
    assert recorded_panels("tiny", "over-optimisation") == {}
    rows = [
        TrainingRecord("ppo-weak-orm", seed, phase, seed + phase / 10, 0.5, None, "x")
        for seed, phase in product((0, 1), (1, 2))
    ]
    write_records(TrainingRecord, [*rows, PHASE], records.training_path("tiny"))
    title = CATALOGUE.figure("over-optimisation").lines["ppo-weak-orm"]
    assert recorded_panels("tiny", "over-optimisation") == {
        f"{title}: reward": {
            "seed 0": {1: 0.1, 2: 0.2},
            "seed 1": {1: 1.1, 2: 1.2},
        },
        f"{title}: accuracy": {
            "seed 0": {1: 0.5, 2: 0.5},
            "seed 1": {1: 0.5, 2: 0.5},
        },
    }


# What the repository holds


def test_what_the_book_claims_is_recorded():
    assert records.comparisons_path("tiny").is_relative_to(project_root())
    rows = {row.key: row for row in recorded("tiny")}
    assert {row.comparison for row in rows.values()} == set(CATALOGUE.comparisons)
    assert rows["ppo", "maj@1", "sft"].difference >= 0.04
    for key in (
        ("ppo", "maj@1", "sft"),
        ("expert-iteration", "maj@1", "sft"),
        ("rcrl", "maj@1 with [GOOD]", "[BAD]"),
        ("orm", "rerank@96", "maj@96"),
    ):
        assert rows[key].low > 0
        assert rows[key].seconds <= 240
    assert rows["orm", "AUC on held-out questions", ""].after >= 0.8


def test_what_is_recorded_is_of_the_plans_as_they_are():
    recipe = load_recipe("tiny")
    phases = recorded_training("tiny")
    firsts = {(row.comparison, row.seed): row for row in phases}
    for row in [*recorded("tiny"), *firsts.values()]:
        assert is_current(row, recipe), row
    of_ppo = [n for n, c in CATALOGUE.comparisons.items() if c.after.step == "ppo"]
    numbers = range(1, recipe.ppo.phases + 1)
    assert [row.key for row in phases] == [
        *product(of_ppo, range(recipe.seeds), numbers)
    ]


# The command


def test_rlreason_record_writes_each_comparison_when_it_is_measured(
    results, tmp_path, monkeypatch, capsys
):
    profile = toy_profile(tmp_path, seeds=1)
    table = results.parent / "toy" / "comparisons.csv"

    def here(plans):
        """Train in this process: others take seconds to start."""
        return [obtain(plan) for plan in plans]

    def run(*arguments: str) -> list[str]:
        code = 0
        try:
            cli.main(["record", *arguments, "--profile", str(profile)])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return [str(code), *out.splitlines(), *err.splitlines()[-1:]]

    monkeypatch.setattr(seeds, "carry_out", here)
    code, line, *_ = run("ppo", "--set", "ppo.phases", "1")
    assert (code, line.partition(" ")[0]) == ("0", "ppo:")
    assert not table.exists()  # other settings than the profile's
    code, line, written, *_ = run("ppo")
    assert written == f"written to {table}"
    (row,) = read_records(Record, table)
    assert (str(row), row.seeds) == (line, 1)
    phases = read_records(TrainingRecord, table.with_name("training.csv"))
    assert [row.phase for row in phases] == [1, 2, 3, 4]
    # What was measured before a fault is kept
    code, *_, fault = run("expert-iteration", "ppo-best-half", "--set", "ppo.n", "1")
    assert (code, "make them even" in fault) == ("2", True)
    assert run("sft")[-1].startswith("rlreason: no comparison 'sft'; there are expert-")
    assert [line.split()[0] for line in run("--list") if line.startswith("  ")] == [
        *CATALOGUE.comparisons
    ]

"""The notebook runner: parameters are checked, failures told once, outputs whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlreason.publishing.notebooks import (
    REQUIRED,
    ROOMS_OF_OUTPUTS,
    NotebookError,
    choose_parameters,
    find_notebooks,
    notebook_digest,
    parse_value,
    read_notebook,
    read_record,
    run_notebook,
    unused_keys,
)
from rlreason.runs.environment import PACKAGE, ROOMS_OF_RESULTS, rooms_digest
from rlreason.runs.profiles import (
    BUILT_IN,
    Profile,
    inputs_digest,
    load_profile,
    load_recipe,
)
from rlreason.settings import SettingsError

REPOSITORY = Path(__file__).parents[1]
PARAMETERS = 'profile = "tiny"\nk = 4  # samples\nrate: float = 0.5\nnames = ["a"]'


def write_notebook(
    folder: Path, name: str, *sources: str, parameters: str = "", **ours: tuple
) -> Path:
    """Write a notebook; a source that begins with ``#`` and a space is prose.

    ``needs`` and ``records`` go to its metadata.
    """
    cells = []
    if parameters:
        cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    for source in sources:
        new = new_markdown_cell if source.startswith("# ") else new_code_cell
        cells.append(new(source))
    listed = {name: list(values) for name, values in ours.items()}
    notebook = new_notebook(cells=cells, metadata={"rlreason": listed})
    path = folder / f"{name}.ipynb"
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def profile(common: dict | None = None, **notebooks: dict) -> Profile:
    return Profile(description="test", common=common or {}, notebooks=notebooks)


@pytest.fixture
def chapter(tmp_path):
    return read_notebook(write_notebook(tmp_path, "ch", parameters=PARAMETERS))


# Parameters


def test_the_parameters_cell_says_which_there_are_and_their_defaults(chapter):
    assert chapter.parameters == {
        "profile": "tiny",
        "k": 4,
        "rate": 0.5,
        "names": ["a"],
    }


def test_a_computed_default_takes_any_value(tmp_path):
    path = write_notebook(tmp_path, "ch", parameters="seed = 3\nlimit = 2 * 8")
    notebook = read_notebook(path)
    assert notebook.parameters == {"seed": 3, "limit": REQUIRED}
    assert choose_parameters(notebook, profile(), {"limit": "all"}) == {"limit": "all"}


def test_where_the_default_tells_no_type_an_annotation_may(tmp_path):
    cell = "k: int | None = None\nrate: float | str = 'a'\nfile: Path = None\nn = None"
    cell += "\nmost: Optional[int] = 3\nnames: dict = {}"
    notebook = read_notebook(write_notebook(tmp_path, "ch", parameters=cell))

    def chosen(**given) -> dict:
        return choose_parameters(notebook, profile(), given)

    assert chosen(k=None, rate=2) == {"k": None, "rate": 2.0}
    assert chosen(names={"a": 1}) == {"names": {"a": 1}}
    # Of an annotation that is not understood the default still tells
    for name, value in {"k": [4], "rate": True, "most": "abc"}.items():
        with pytest.raises(NotebookError, match=f"{name} is .*, not of type"):
            chosen(**{name: value})
    for name in ("file", "n"):  # not told: what a parameter can be at all
        assert chosen(**{name: [1, "a"]}) == {name: [1, "a"]}
        for value in ({"a": 1}, {1}, [{"a": 1}], date(2024, 1, 2)):
            with pytest.raises(NotebookError, match="a parameter is a number, text"):
                chosen(**{name: value})


def test_an_unknown_parameter_is_an_error_that_lists_the_known_ones(chapter):
    with pytest.raises(
        NotebookError, match=r"'kk'.*did you mean 'k'.*profile, k, rate"
    ):
        choose_parameters(chapter, profile(), {"kk": 3})
    with pytest.raises(NotebookError, match="the profile: unknown 'rounds'"):
        choose_parameters(chapter, profile(ch={"rounds": 2}), {})


def test_by_hand_wins_over_the_notebooks_section_and_that_over_common(chapter):
    scale = profile({"k": 1, "rate": 0.1, "elsewhere": 1}, ch={"k": 2, "rate": 0.2})
    assert choose_parameters(chapter, scale, {"k": 3}) == {"k": 3, "rate": 0.2}


@pytest.mark.parametrize(
    ("name", "value"), [("k", "many"), ("k", 1.5), ("k", True), ("names", "a")]
)
def test_a_value_of_another_type_than_the_default_is_an_error(chapter, name, value):
    with pytest.raises(NotebookError, match=f"ch: {name} is {value!r}, not of type"):
        choose_parameters(chapter, profile(), {name: value})


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("3", 1, 3),
        ("-3", 1, -3),
        ("1e-4", 0.5, 1e-4),
        ("[1, 2]", [], [1, 2]),
        ("true", False, True),
        ("null", 1, None),
        ("7", "a name", "7"),  # text stays text where the default is text
        ("gsm-mini", None, "gsm-mini"),
        ("__import__('os')", 1, "__import__('os')"),  # read, never evaluated
        ("{{'a': 1}}", None, "{{'a': 1}}"),  # a set of a dict is no value
    ],
)
def test_values_from_the_command_line(text, default, value):
    assert parse_value(text, default) == value


def test_text_from_the_command_line_stays_text_where_the_annotation_says_so():
    assert [parse_value(text, None, (str,)) for text in ("12", "true")] == [
        "12",
        "true",
    ]
    assert parse_value("null", "a", (str,)) == "null"
    assert parse_value("null", None, (str,)) is None


def test_whole_numbers_serve_where_the_default_is_a_float(chapter):
    chosen = choose_parameters(chapter, profile(), {"rate": 1})
    assert chosen == {"rate": 1.0}
    assert isinstance(chosen["rate"], float)


@pytest.mark.parametrize("cell", ["k = 1\nprint(k)", "a, b = 1, 2", "k = ", "x.y = 1"])
def test_a_parameters_cell_holds_assignments_of_one_name_alone(tmp_path, cell):
    with pytest.raises(NotebookError, match="cell tagged parameters"):
        read_notebook(write_notebook(tmp_path, "ch", parameters=cell))


def test_what_is_no_notebook_is_named(tmp_path):
    (tmp_path / "a.ipynb").write_text("not JSON")
    (tmp_path / "b.ipynb").write_text("{}")
    (tmp_path / "d.ipynb").mkdir()
    (tmp_path / "e.ipynb").write_bytes(b"\xff\xfe")
    no_cells = {"nbformat": 4, "metadata": {}}
    for name, cells in [("f", None), ("g", [{"cell_type": "code"}])]:
        content = {**no_cells, "cells": cells} if cells else no_cells
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(content))
    for name, message in [
        ("a", "is not a notebook"),
        ("b", "not a notebook of format 4"),
        ("c", "no notebook"),
        ("d", "cannot be read: Is a directory"),
        ("e", "is not a notebook"),
        ("f", "not a whole notebook"),
        ("g", "not a whole notebook"),
    ]:
        with pytest.raises(NotebookError, match=message):
            read_notebook(tmp_path / f"{name}.ipynb")


# Order and freshness


def test_a_missing_need_and_a_circle_are_errors(tmp_path):
    write_notebook(tmp_path, "a", needs=("b",))
    (lost,) = find_notebooks(tmp_path)
    with pytest.raises(NotebookError, match=r"no notebook .*b\.ipynb"):
        notebook_digest(lost, profile())
    circle = read_notebook(write_notebook(tmp_path, "b", needs=("a",)))
    with pytest.raises(NotebookError, match="need each other: b -> a -> b"):
        notebook_digest(circle, profile())


def test_the_digest_changes_with_cells_parameters_recipe_and_needs(tmp_path):
    write_notebook(tmp_path, "base", "1 + 1")
    path = write_notebook(tmp_path, "ch", "2", parameters="k = 1", needs=("base",))

    def digest(scale=None, **given) -> str:
        return notebook_digest(read_notebook(path), scale or profile(), given)

    before = digest()
    assert digest() == before
    recipe = Profile(description="test", recipe={"seeds": 2})
    changed = {digest(k=2), digest(profile({"k": 3})), digest(recipe)}
    write_notebook(tmp_path, "base", "1 + 2")
    changed.add(digest())
    write_notebook(tmp_path, "ch", "3", parameters="k = 1", needs=("base",))
    changed.add(digest())
    assert len(changed | {before}) == 6


def test_the_digest_is_of_a_profile_too_that_a_parameter_names(tmp_path):
    """Demonstrations take their task from a profile other than the page's."""
    path = write_notebook(tmp_path, "ch", "2", parameters="small = 'tiny'")
    other, data = tmp_path / "other.yaml", tmp_path / "data.jsonl"

    def digest(content: str, rows: str) -> str:
        other.write_text(content)
        data.write_text(rows)
        return notebook_digest(read_notebook(path), profile(), {"small": str(other)})

    two = "description: mine\nrecipe: {seeds: 2}"
    with_data = "description: mine\nrecipe: {task: {name: ./data.jsonl}}"
    assert digest(two, "1") == digest(two, "2") != digest(two.replace("2", "3"), "1")
    assert digest(with_data, "1") != digest(with_data, "2")
    # Also by its default; and a file that is none decides by its bytes
    path = write_notebook(tmp_path, "by_default", "2", parameters=f"small = '{other}'")

    def by_default(content: str) -> str:
        other.write_text(content)
        return notebook_digest(read_notebook(path), profile())

    assert by_default(two) != by_default(two.replace("2", "3"))
    assert by_default("runs: 1") != by_default("runs: 2")


def test_an_imported_policy_of_the_recipe_is_an_input(tmp_path, monkeypatch):
    """It is named by one word, and was not looked at."""
    monkeypatch.setenv("RLREASON_MODELS", str(tmp_path))
    weights = tmp_path / "mine" / "model.safetensors"
    weights.parent.mkdir()
    file = tmp_path / "p.yaml"
    file.write_text("description: mine\nrecipe: {policy: mine}")
    weights.write_bytes(b"one")
    before = inputs_digest(file)
    weights.write_bytes(b"three")
    assert "" != before != inputs_digest(file)


def test_the_digest_does_not_change_with_outputs(tmp_path):
    path = write_notebook(tmp_path, "ch", "2")
    before = notebook_digest(read_notebook(path), profile())
    content = nbformat.read(path, as_version=4)
    content.cells[0].execution_count = 1
    content.cells[0].outputs = [nbformat.v4.new_output("stream", text="2")]
    nbformat.write(content, path)
    assert notebook_digest(read_notebook(path), profile()) == before


def test_a_recorded_table_is_an_input_of_the_pages_that_show_it(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for name, ours in [
        ("shows", {"records": ("gains",)}),
        ("above", {"needs": ("shows",)}),  # needs its runs, not its table
        ("apart", {}),
    ]:
        write_notebook(tmp_path, name, "1", **ours)

    def digests() -> dict[str, str]:
        return {
            n.name: notebook_digest(n, profile(), results=results)
            for n in find_notebooks(tmp_path)
        }

    def refreshed(before: dict[str, str]) -> list[str]:
        return [name for name, digest in digests().items() if digest != before[name]]

    before = digests()
    (results / "gains.jsonl").write_text("a\n1\n")  # recorded for the first time
    assert refreshed(before) == ["shows"]
    before = digests()
    (results / "gains.jsonl").write_text("a\n2\n")  # recorded anew
    assert refreshed(before) == ["shows"]
    before = digests()
    (results / "phases.jsonl").write_text("a\n1\n")  # another table
    assert refreshed(before) == []


PAGES, PAGES_AND_RUNS, NOTHING = (True, False), (True, True), (False, False)


@pytest.mark.parametrize(
    ("file", "refreshes"),
    [
        ("tasks/answers.py", PAGES_AND_RUNS),
        ("mdp.py", PAGES_AND_RUNS),
        ("policy/sampler.py", PAGES_AND_RUNS),
        ("rewards/dense.py", PAGES_AND_RUNS),
        ("algorithms/ppo.py", PAGES_AND_RUNS),
        ("evaluation/metrics.py", PAGES_AND_RUNS),
        ("runs/steps.py", PAGES_AND_RUNS),  # the wiring of a run
        ("assets/nano/model.safetensors", PAGES_AND_RUNS),
        ("settings.py", PAGES),
        ("experiments/__init__.py", PAGES),
        ("publishing/figures/__init__.py", PAGES),
        ("publishing/chapter.py", PAGES),
        ("runs/profiles/tiny.yaml", NOTHING),  # the recipe is hashed by itself
        ("publishing/notebooks.py", NOTHING),
        ("publishing/book.py", NOTHING),
        ("execution/local.py", NOTHING),
        ("bench/sample.py", NOTHING),
        ("cli.py", NOTHING),
        ("commands/training.py", NOTHING),
    ],
)
def test_what_an_edit_refreshes_follows_from_its_room(package, file, refreshes):
    kinds = (ROOMS_OF_OUTPUTS, ROOMS_OF_RESULTS)

    def digests() -> list[str]:
        return [rooms_digest(rooms, package) for rooms in kinds]

    before, path = digests(), package / file
    content = path.read_bytes() if path.is_file() else None
    path.write_bytes((content or b"") + b"# edited\n")
    assert tuple(a != b for a, b in zip(before, digests(), strict=True)) == refreshes
    path.write_bytes(content) if content is not None else path.unlink()
    assert digests() == before


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A copy of the package that may be edited."""
    copy = tmp_path_factory.mktemp("package") / "rlreason"
    return shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))


# Running


def test_a_notebook_runs_with_its_parameters_and_leaves_a_record(tmp_path):
    source = "import os\nprint(profile, k, os.environ['RLREASON_QUIET'])"
    path = write_notebook(tmp_path, "ch", source, parameters=PARAMETERS)
    before = path.read_bytes()
    record = run_notebook(
        read_notebook(path),
        profile_name="smoke",
        given={"k": 7},
        folder=tmp_path / "out",
    )
    assert path.read_bytes() == before
    executed = nbformat.read(tmp_path / "out" / "ch.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "smoke 7 1\n"
    injected = executed.cells[1].source
    assert injected.startswith("# Parameters")
    assert "rate" not in injected  # only what differs from the notebook's own
    assert record == read_record("ch", tmp_path / "out")
    assert record.parameters == {"profile": "smoke", "k": 7}
    assert record.seconds > 0
    assert not (tmp_path / "out" / "ch.failed.ipynb").exists()


def test_a_failure_names_cell_and_cause_once_and_leaves_no_output(tmp_path):
    path = write_notebook(tmp_path, "ch", "x = 1", "def f():\n    return 1 / 0", "f()")
    with pytest.raises(NotebookError) as caught:
        run_notebook(read_notebook(path), folder=tmp_path / "out")
    told = str(caught.value)
    assert told.startswith("ch, cell [3] failed")
    assert told.count("ZeroDivisionError: division by zero") == 1
    assert "\x1b" not in told
    assert (tmp_path / "out" / "ch.failed.ipynb").is_file()
    assert not (tmp_path / "out" / "ch.ipynb").exists()
    assert read_record("ch", tmp_path / "out") is None


def test_a_notebook_runs_in_this_python_whatever_kernels_the_user_has_and_path(
    tmp_path, monkeypatch
):
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    spec = {"argv": ["/another/python"], "display_name": "", "language": "python"}
    (foreign / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(foreign.parents[1]))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    from jupyter_client.kernelspec import get_kernel_spec

    assert get_kernel_spec("python3").argv == ["/another/python"]  # else no test
    odd = tmp_path / "{odd} $HOME {0}"
    monkeypatch.setenv("RLREASON_RUNS", str(odd / "runs"))
    source = "import os, sys\nprint(sys.executable)\nprint(os.environ['RLREASON_RUNS'])"
    path = write_notebook(odd, "ch {x}", source, parameters="k = 1")
    run_notebook(read_notebook(path), given={"k": 2}, folder=odd / "out")
    executed = nbformat.read(odd / "out" / "ch {x}.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text.splitlines() == [
        sys.executable,
        str(odd / "runs"),
    ]


def test_a_kernel_that_was_killed_is_told_with_its_cell_and_the_remedy(tmp_path):
    path = write_notebook(
        tmp_path, "ch", "# Prose", "1", "import os; os.kill(os.getpid(), 9)", "2"
    )
    with pytest.raises(NotebookError) as caught:
        run_notebook(read_notebook(path), folder=tmp_path / "out")
    told = str(caught.value)
    assert "ch: the kernel died in code cell 2, perhaps for want of memory" in told
    assert "\n" not in told
    assert [file.name for file in (tmp_path / "out").iterdir()] == []


def test_relative_paths_mean_the_same_to_the_kernel_and_seeds_may_run_at_once(tmp_path):
    source = (
        "import os, time\n"
        "from rlreason.runs.environment import runs_root\n"
        "time.sleep(1)\nprint(seed, runs_root(), os.environ['RLREASON_DATA'], profile)"
    )
    write_notebook(tmp_path / "deep", "ch", source, parameters="seed = 0\nprofile = ''")
    (tmp_path / "mine.yaml").write_text("description: mine")
    relative = {"RLREASON_RUNS": "myruns", "RLREASON_DATA": "data"}
    command = [sys.executable, "-m", "rlreason.cli", "run", "deep/ch.ipynb"]
    command += ["--profile", "mine.yaml", "-p", "seed"]
    started = [
        subprocess.Popen(
            [*command, str(seed)],
            cwd=tmp_path,
            env={**os.environ, **relative},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (3, 4)
    ]
    for process in started:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    folder = tmp_path / "myruns" / "notebooks" / "mine"
    record = read_record("ch", folder)
    executed = nbformat.read(folder / "ch.ipynb", as_version=4)
    said = [record.parameters["seed"], tmp_path / "myruns", tmp_path / "data"]
    said.append(tmp_path / "mine.yaml")
    assert executed.cells[-1].outputs[0].text.split() == [str(part) for part in said]
    left = {file.name for file in folder.iterdir() if file.suffix != ".lock"}
    assert left - {".lock"} == {"ch.ipynb", "ch.json"}


# Profiles


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_profiles_fit_the_notebooks_and_hold_a_recipe(name):
    notebooks = find_notebooks(REPOSITORY / "notebooks")
    scale = load_profile(name)
    assert unused_keys(scale, notebooks) == []
    for notebook in notebooks:
        choose_parameters(notebook, scale, {})
        assert all(notebook.kinds.values()), f"{notebook.name}: annotate what is None"
    load_recipe(name)


def test_what_no_notebook_takes_is_found(chapter):
    scale = profile({"k": 1, "K": 2}, ch={}, ch_2={})
    assert unused_keys(scale, [chapter]) == ["common.K", "notebooks.ch_2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("description: a\ncomon: {}", "unknown 'comon' .did you mean 'common'"),
        ("common: {}", "description"),
        ("description: a\ncommon: {k: {deep: 1}}", "common.k"),
        ("description: a\ncommon: {k: 1, k: 2}", "k given twice"),
        ("description: [", "YAML|expected"),
        ("- a", "a mapping"),
    ],
)
def test_a_profile_is_read_strictly(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)


def test_a_profile_may_be_a_file_and_an_unknown_one_lists_the_known(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("description: mine\ncommon: {lr: 1e-4, k: -2, name: e1}")
    assert load_profile(path).common == {"lr": 1e-4, "k": -2, "name": "e1"}
    with pytest.raises(SettingsError, match="no profile 'tinny': give smoke, tiny"):
        load_profile("tinny")


def test_a_path_in_a_recipe_starts_at_its_profile_wherever_that_is_read(
    tmp_path, monkeypatch
):
    recipe = {"policy": "./base", "task": {"name": "../toy.jsonl", "solutions": 2}}
    file = tmp_path / "deep" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(json.dumps({"description": "mine", "recipe": recipe}))
    monkeypatch.chdir(tmp_path)
    read = load_recipe("deep/mine.yaml", policy="./given")
    assert read.policy == "./given"  # by hand it starts where the hand is
    monkeypatch.chdir(file.parent)
    read = load_recipe("mine.yaml")
    assert Path(read.policy) == file.parent / "base"
    assert Path(read.task.name).resolve() == tmp_path / "toy.jsonl"


# The notebooks of the repository


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_notebooks_are_committed_clean_and_narrow(path):
    content = json.loads(path.read_text())
    for number, cell in enumerate(content["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], f"cell {number} has outputs"
            assert cell["execution_count"] is None, f"cell {number} was executed"
            for line in "".join(cell["source"]).splitlines():
                assert len(line) <= 79, f"cell {number}: {line}"
    assert read_notebook(path).parameters, "a notebook has a parameters cell"

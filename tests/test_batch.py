"""A grid: checked as a whole, each job once, failures kept apart and shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from base64 import b64decode, b64encode
from io import StringIO
from pathlib import Path

import pytest
import yaml
from test_notebook_runner import write_notebook
from toys import toy_profile

from rlreason.cli import main
from rlreason.publishing.batch import plan_lines, run_batch
from rlreason.publishing.grid import GridError, read_grid
from rlreason.publishing.notebooks import read_notebook, run_notebook
from rlreason.runs.plans import folder_of, obtain, plan_of
from rlreason.runs.profiles import load_recipe
from rlreason.settings import SettingsError

PARAMETERS = "seed = 0\nk = 4\nwords = 'a'"


@pytest.fixture
def grid(tmp_path):
    """Writes a grid's file, and reads it."""

    def read(*runs: dict, **more):
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump({"profile": "smoke", "runs": runs, **more}))
        return read_grid(path, tmp_path / "out")

    return read


def labels(items) -> list[str]:
    return [item.label for item in items]


# Reading


def test_a_grid_is_every_choice_of_values_and_seeds_once(grid, tmp_path):
    write_notebook(tmp_path, "ch", "k", parameters=PARAMETERS)
    write_notebook(tmp_path, "fixed", "1")
    ours = {"notebooks": ["ch.ipynb"], "parameters": {"k": [4, 8], "words": "b"}}
    items = grid(ours, ours, {"notebooks": ["fixed.ipynb"]}, seeds=[0, 1])
    assert labels(items) == [
        *(f"ch (smoke) k={k} words=b seed={s}" for k in (4, 8) for s in (0, 1)),
        "fixed (smoke)",  # which takes no seed
    ]
    assert len({item.folder for item in items}) == 5
    assert not (tmp_path / "out").exists()
    told = " ".join(items[3].job.command)
    assert told.endswith("-p k 8 -p words b -p seed 1")


def test_a_steps_needs_are_jobs_and_what_is_asked_for_has_its_label(grid, tmp_path):
    profile = str(toy_profile(tmp_path))
    runs = {"profile": profile, "parameters": {"ppo.kl.coef": [0.1, 0.2]}}
    items = grid({"steps": ["ppo"], **runs}, {"steps": ["sft"], "profile": profile})
    name = Path(profile).stem
    assert sorted(labels(items)) == [
        f"ppo ({name}) ppo.kl.coef=0.1 seed=0",
        f"ppo ({name}) ppo.kl.coef=0.2 seed=0",
        f"sft ({name}) seed=0",
    ]
    (sft,) = (item for item in items if item.label.startswith("sft"))
    assert all(i.job.needs == (sft.job.name,) for i in items if i is not sft)


def test_a_notebook_comes_after_those_of_its_own_parameters_that_it_needs(
    grid, tmp_path
):
    write_notebook(tmp_path, "base", parameters="seed = 0")
    write_notebook(tmp_path, "above", parameters="seed = 0", needs=("base",))
    items = grid({"notebooks": ["above.ipynb", "base.ipynb"]}, seeds=[3, 4])
    by_label = {item.label: item.job for item in items}
    for seed in (3, 4):
        needed = by_label[f"base (smoke) seed={seed}"].name
        assert by_label[f"above (smoke) seed={seed}"].needs == (needed,)


def test_all_faults_are_told_at_once_with_what_there_is(grid, tmp_path):
    write_notebook(tmp_path, "ch", parameters=PARAMETERS)
    write_notebook(tmp_path, "fixed")
    with pytest.raises(GridError) as caught:
        grid(
            {"notebooks": ["00_toor"]},
            {"steps": ["pppo"]},
            {"notebooks": ["ch.ipynb"], "parameters": {"kk": 1}},
            {"notebooks": ["ch.ipynb"], "parameters": {"k": "many"}},
            {"steps": ["sft"], "parameters": {"sft.epoch": 1}},
            {"steps": ["sft"], "parameters": {"sft.epochs": "two"}},
            {"steps": ["sft"], "profile": "tinny"},
            {"notebooks": ["fixed.ipynb"], "seeds": [1]},
            {"notebooks": ["ch.ipynb"], "parameters": {"k": [4, 8]}},  # in order
        )
    told = str(caught.value).splitlines()
    assert len(told) == 9
    for line, said in zip(
        told[1:],
        [
            "runs[0]: notebooks: unknown '00_toor' (did you mean '00_tour'?); known",
            "runs[1]: steps: unknown 'pppo' (did you mean 'ppo'?); known are: sft",
            "runs[2]: ch, parameters from -p: unknown 'kk' (did you mean 'k'?)",
            "runs[3]: ch: k is 'many', not of type int",
            "runs[4]: sft: unknown 'sft.epoch' (did you mean 'sft.epochs'?)",
            "runs[5]: Recipe: sft.epochs: Input should be a valid integer",
            "runs[6]: no profile 'tinny': give smoke, tiny",
            "runs[7]: fixed.ipynb takes no seeds: leave them out",
        ],
        strict=True,
    ):
        assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("runs: []", "runs: List should have at least 1 item"),
        ("runs: [{steps: sft}]", "runs.0.steps: Input should be a valid array"),
        ("runs: [{}]", "name notebooks or steps"),
        ("run: [{steps: [sft]}]", "unknown 'run' (did you mean 'runs'?)"),
        ("runs: [{steps: [sft], seeds: [-1]}]", "seed"),
        ("runs: !!python/object/apply:os.getcwd []", "could not determine"),
    ],
)
def test_a_file_that_is_no_grid_is_refused(tmp_path, content, said):
    path = tmp_path / "grid.yaml"
    path.write_text(content)
    with pytest.raises((SettingsError, GridError)) as caught:
        read_grid(path, tmp_path)
    assert said in str(caught.value)


# What is done


def test_what_is_done_is_known_by_its_identity_wherever_it_was_done(grid, tmp_path):
    notebook = write_notebook(tmp_path, "ch", "k", parameters=PARAMETERS)
    profile = str(toy_profile(tmp_path))
    plan = plan_of("sft", load_recipe(profile), 0)
    runs = (
        {"steps": ["sft"], "profile": profile},
        {"notebooks": ["ch.ipynb"], "parameters": {"k": [4, 5]}, "seeds": [0]},
    )
    assert not any(item.job.fresh() for item in grid(*runs))
    assert list(plan_lines(grid(*runs), 2))[-1].endswith("of 3 jobs it is not known")
    obtain(plan)
    run_notebook(read_notebook(notebook), profile_name="smoke", given={"k": 5})
    items = grid(*runs)
    assert [item.job.fresh() for item in items] == [True, False, True]
    assert items[0].result() == folder_of(plan).path
    lines = list(plan_lines(items, 2))
    assert lines[0].endswith("  done")
    assert re.search(r" to do, expected \d+ s$", lines[1])  # as with k=5
    assert lines[3] == "1 of 3 jobs to do"
    notebook.write_text(notebook.read_text().replace('"k"', '"k + 1"'))
    assert [item.job.fresh() for item in grid(*runs)] == [True, False, False]


# Running

PICTURE = b64encode(b"a picture").decode()
SHOWS = f"""
from IPython.display import display
display({{"image/png": "{PICTURE}"}}, raw=True)"""
# Says that it is run, and fails until there is a file of its name
COUNTS = """
import pathlib
here = pathlib.Path(".")
with (here / f"ran-{name}").open("a") as file:
    file.write("x")
assert name != "b" or (here / "b").exists(), "there is no <b>"
"""


@pytest.fixture
def three(tmp_path) -> Path:
    """A grid of a notebook that works, one that fails and one that needs it."""
    named = "name = '{}'\nseed = 0"
    write_notebook(tmp_path, "a", COUNTS, SHOWS, parameters=named.format("a"))
    write_notebook(tmp_path, "b", COUNTS, parameters=named.format("b"))
    write_notebook(tmp_path, "c", COUNTS, parameters=named.format("c"), needs=("b",))
    names = [f"{name}.ipynb" for name in "cab"]
    path = tmp_path / "grid.yaml"
    path.write_text(
        yaml.safe_dump({"profile": "smoke", "runs": [{"notebooks": names}]})
    )
    return path


def times(folder: Path, name: str) -> int:
    file = folder / f"ran-{name}"
    return len(file.read_text()) if file.is_file() else 0


def states(out: Path) -> dict[str, str]:
    """The first word of each label to its state, of status.json."""
    jobs = json.loads((out / "status.json").read_text())["jobs"].values()
    return {job["label"].split()[0]: job["state"] for job in jobs}


def batch(grid: Path, out: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["batch", str(grid), "--output", str(out), *options])
    return caught.value.code


def test_a_failure_is_kept_apart_shown_and_tried_again_when_asked(
    three, tmp_path, capsys
):
    out = tmp_path / "out"
    assert batch(three, out) == 1
    assert states(out) == {"a": "done", "b": "failed", "c": "blocked"}
    said = capsys.readouterr()
    assert "there is no <b>" in said.err
    assert "1 of 3 jobs are done" in said.out
    assert any(line.startswith("1/3 ") for line in said.out.splitlines())
    page = (out / "index.html").read_text()
    assert "there is no &lt;b&gt;" in page
    (picture,) = out.glob("a-*/picture.png")
    assert picture.read_bytes() == b64decode(PICTURE)
    assert f'src="{picture.parent.name}/picture.png"' in page
    assert f'href="{picture.parent.name}/a.ipynb"' in page
    assert f'href="{picture.parent.name}/log.txt"' in page
    # What is done, and what failed, is not run again until one asks for it
    assert batch(three, out) == 1
    assert states(out) == {"a": "fresh", "b": "failed", "c": "blocked"}
    assert "--retry-failed runs it again" in capsys.readouterr().err
    assert [times(tmp_path, name) for name in "abc"] == [1, 1, 0]
    (tmp_path / "b").touch()
    assert batch(three, out, "--retry-failed") == 0
    assert [times(tmp_path, name) for name in "abc"] == [1, 2, 1]
    assert batch(three, out) == 0
    assert set(states(out).values()) == {"fresh"}


def test_two_batches_on_one_folder_run_each_job_once(three, tmp_path):
    command = [sys.executable, "-m", "rlreason.cli", "batch", str(three)]
    command += ["--output", str(tmp_path / "out"), "--jobs", "1"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [1, 1]
    assert [times(tmp_path, name) for name in "abc"] == [1, 1, 0]
    assert states(tmp_path / "out")["b"] == "failed"


def test_steps_run_after_what_they_need_and_a_terminal_gets_a_table(grid, tmp_path):
    profile = str(toy_profile(tmp_path))
    items = grid({"steps": ["ppo"], "profile": profile}, seeds=[0, 1])
    terminal = StringIO()
    outcomes = run_batch(items, tmp_path / "out", cores=2, terminal=terminal)
    assert {outcome.state for outcome in outcomes.values()} == {"done"}
    assert len(outcomes) == 4
    assert all(item.result() is not None for item in items)
    table = terminal.getvalue().split("\x1b[J")[-1].splitlines()
    assert table[0].startswith("4 done; ")
    assert [line.split()[0] for line in table[1:]] == ["done"] * 4
    # Whoever looks in between sees a whole table: each is drawn over the last
    assert terminal.getvalue().count("\x1b[5F") == terminal.getvalue().count("\x1b[J")
    again = grid({"steps": ["ppo"], "profile": profile}, seeds=[0, 1, 2])
    assert "expected unknown" not in "\n".join(plan_lines(again, 2))

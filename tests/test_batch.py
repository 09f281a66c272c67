"""A grid: checked as a whole, each job once, failures kept apart and shown."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from base64 import b64decode, b64encode
from dataclasses import replace
from errno import ENOSPC
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import yaml
from test_notebook_runner import write_notebook
from toys import toy_profile

from rlreason.cli import main
from rlreason.execution.jobs import Job
from rlreason.publishing.batch import claim, plan_lines, run_batch
from rlreason.publishing.expected import expected_of_notebook, least_seconds
from rlreason.publishing.grid import GridError, Item, read_grid
from rlreason.publishing.notebooks import (
    Record,
    read_notebook,
    read_record,
    run_notebook,
)
from rlreason.runs.plans import folder_of, obtain, plan_of
from rlreason.runs.profiles import load_recipe
from rlreason.settings import SettingsError, canonical_json

PARAMETERS = "seed = 0\nk = 1\nwords = 'a'\nmost: int | None = None"


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


def test_notebooks_of_one_name_in_two_folders_are_two_jobs(grid, tmp_path):
    """The second was taken for the first, and dropped."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_notebook(tmp_path / folder, "ch", f"'{folder}'")
    items = grid({"notebooks": ["one/ch.ipynb", "two/ch.ipynb"]})
    assert len({item.folder for item in items}) == 2


def test_a_notebook_is_to_be_run_again_when_its_data_have_changed(tmp_path):
    """Only the recipe's text was compared, so an old result was given."""
    write_notebook(tmp_path, "ch", "1")
    data, profile = tmp_path / "data.jsonl", tmp_path / "p.yaml"
    profile.write_text("description: mine\nrecipe: {task: {name: ./data.jsonl}}")
    path = tmp_path / "grid.yaml"
    path.write_text("profile: p.yaml\nruns: [{notebooks: [ch.ipynb]}]")

    def digest(text: str) -> str:
        data.write_text(text)
        return read_grid(path, tmp_path / "out")[0].digest

    assert digest("one") == digest("one") != digest("three")


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
    items = grid({"notebooks": ["above.ipynb", "base.ipynb"]}, seeds=[0, 4])
    by_label = {item.label: item.job for item in items}
    for seed in (0, 4):
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
            {"notebooks": ["ch.ipynb"], "parameters": {"most": [[4, 8]]}},
            {"notebooks": ["ch.ipynb"], "parameters": {"k": True, "seed": 0}},
        )
    told = str(caught.value).splitlines()
    assert len(told) == 11
    for line, said in zip(
        told[1:],
        [
            "runs[0]: notebooks: unknown '00_toor' (did you mean '00_tour'?); known",
            "runs[1]: steps: unknown 'pppo' (did you mean 'ppo'?); known are: sft",
            "runs[2]: ch, parameters given: unknown 'kk' (did you mean 'k'?)",
            "runs[3]: ch: k is 'many', not of type int",
            "runs[4]: sft: unknown 'sft.epoch' (did you mean 'sft.epochs'?)",
            "runs[5]: Recipe: sft.epochs: Input should be a valid integer",
            "runs[6]: no profile 'tinny': give smoke, tiny",
            "runs[7]: fixed.ipynb has no seed: leave out seeds",
            "runs[9]: ch: most is [4, 8], not of type int",
            "runs[10]: ch: k is True, not of type int",
        ],
        strict=True,
    ):
        assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"policy": "./nowhere"}, "There is no folder './nowhere'"),
        ({"policy": "~nobody-here/m"}, "There is no folder '~nobody-here/m'"),
        ({"policy": ""}, "policy: String should have at least 1"),
        ({"policy": "broken.py"}, "'broken.py' is a file: give the folder"),
        ({"task.knobs": {"templates": 3}}, "templates=3 must be a list of names"),
        ({"task.name": "own.jsonl"}, "In a profile, say task.knobs: {}"),
        ({"task": {"name": "nowhere-{split}.jsonl"}}, "nowhere-"),
        ({"task.knobs": {"stepps": [1, 2]}}, "stepps"),
        ({"reward.kind": "nowhere.py:pay"}, "there is no file nowhere.py"),
        ({"reward.kind": "broken.py:pay"}, "broken.py failed with ZeroDivisionError"),
    ],
)
def test_what_would_end_every_job_is_told_before_any_starts(
    grid, tmp_path, monkeypatch, parameters, said
):
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GridError) as caught:
        grid({"steps": ["ppo"], "parameters": parameters, "seeds": [0, 1]})
    assert said in str(caught.value)
    assert str(caught.value).count("\n") == 1  # once, for all seeds and values


def test_of_many_choices_the_first_with_a_fault_is_named(grid):
    choices = {"ppo.lr": [1e-3, 1e-4], "task.knobs": [{"steps": [1, 2]}, {"steps": 4}]}
    with pytest.raises(GridError) as caught:
        grid({"steps": ["ppo"], "parameters": choices})
    (told,) = str(caught.value).splitlines()[1:]
    assert told.startswith(
        '  runs[0], ppo (smoke) ppo.lr=0.001 task.knobs={"steps": 4}: steps=4 must be'
    )


def test_a_fault_of_two_parts_is_told_of_both(grid):
    part = {"steps": ["ppo"], "parameters": {"policy": "./nowhere"}}
    with pytest.raises(GridError) as caught:
        grid(part, part)
    told = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in told] == ["runs[0]", "runs[1]"]


def test_a_reward_of_ones_own_is_tried_once_for_all_choices(
    grid, tmp_path, monkeypatch
):
    """Its file was run for each of them."""
    (tmp_path / "own.py").write_text(
        "open('times', 'a').write('.')\ndef pay(rollouts, problems): return []"
    )
    monkeypatch.chdir(tmp_path)
    choices = {
        "reward.kind": "own.py:pay",
        "ppo.lr": [1e-3, 1e-4],
        "ppo.phases": [1, 2],
    }
    grid({"steps": ["ppo"], "parameters": choices, "seeds": [0, 1]})
    assert (tmp_path / "times").read_text() == "."


def test_a_grids_own_values_stay_as_they_stand_in_its_file(grid):
    """What a path put into a mapping that another parameter had given stayed there."""
    choices = {"task.knobs": {"steps": [1, 2]}, "task.knobs.largest": [12, 20]}
    told = labels(grid({"steps": ["sft"], "parameters": choices}))
    assert all('task.knobs={"steps": [1, 2]}' in label for label in told)


@pytest.mark.parametrize(
    "parameters",
    [{"start": "sft", "sft.epochs": 1, "orm.k": 7}, {"shots": [0, 1, 2]}],
)
def test_what_changes_no_run_is_told(grid, parameters):
    with pytest.warns(UserWarning, match=r"(orm.k|shots) changes no run of ppo"):
        grid({"steps": ["ppo"], "parameters": parameters})


@pytest.mark.filterwarnings("error")
def test_a_parameter_may_matter_to_one_step_or_with_one_value_alone(grid):
    both = {"steps": ["expert-iteration", "ppo"], "parameters": {"ppo.kl.coef": 0.02}}
    assert len(grid(both)) == 3  # with SFT
    shots = {"start": ["sft", "base"], "shots": 1}
    assert len(grid({"steps": ["ppo"], "parameters": shots})) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("runs: []", "runs: List should have at least 1 item"),
        ("runs: [{steps: sft}]", "runs[0]: Runs: steps: Input should be a valid array"),
        ("runs: [{}]", "name notebooks or steps"),
        (
            "runs: [{step: sft}]",
            "runs[0]: Runs: unknown 'step' (did you mean 'steps'?)",
        ),
        ("run: [{steps: [sft]}]", "unknown 'run' (did you mean 'runs'?)"),
        ("runs: [{steps: [sft], seeds: [-1]}]", "seed"),
        ("runs: [{steps: [sft], seeds: []}]", "seeds has no value"),
        (
            "runs: [{steps: [sft], parameters: {sft.epochs: []}}]",
            "sft.epochs has no value",
        ),
        ("runs: [{2024-01-01: 3}]", "keys must be str"),
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
    lines = list(plan_lines(grid(*runs), cores=2))
    assert lines[-1].startswith("expected hours are not known")
    obtain(plan)
    run_notebook(read_notebook(notebook), profile_name="smoke", given={"k": 5})
    items = grid(*runs)
    assert [item.job.fresh() for item in items] == [True, False, True]
    assert items[0].result() == folder_of(plan).path
    lines = list(plan_lines(items, cores=2))
    assert lines[0].endswith("  done")
    assert re.search(r" to do, expected \d+ s, as with other settings$", lines[1])
    assert lines[3] == "1 of 3 jobs to do"
    assert re.fullmatch(r"expected [\d.]+ hours of work, at least .* 2 cores", lines[4])
    notebook.write_text(notebook.read_text().replace('"k"', '"k + 1"'))
    assert [item.job.fresh() for item in grid(*runs)] == [True, False, False]


def test_hours_are_those_of_the_runs_that_are_most_alike(grid, tmp_path):
    profile = str(toy_profile(tmp_path))
    recipe = load_recipe(profile)

    def ran(seconds: float, seed: int, **changes) -> None:
        run = folder_of(plan_of("sft", recipe.changed(changes), seed))
        run.path.mkdir(parents=True)
        (run.path / "settings.json").write_text(canonical_json(run.settings))
        status = {"status": "done", "seconds": seconds}
        (run.path / "status.json").write_text(json.dumps(status))

    ran(100, 0)
    ran(300, 1)
    ran(5000, 2, **{"sft.epochs": 50})
    ran(None, 7)  # what cannot be understood is passed over
    broken = folder_of(plan_of("sft", recipe, 0)).path.with_name("sft-0123456789ab")
    broken.mkdir()
    (broken / "status.json").write_text('{"status": "do')
    for runs, said in (
        ({}, "200 s"),  # wrong would be the mean of all three
        ({"parameters": {"sft.epochs": 9, "sft.lr": 0.5}}, "as with other settings"),
        ({"parameters": {"sft.lr": 0.5}}, "200 s, as with other settings"),
    ):
        (item,) = grid({"steps": ["sft"], "profile": profile, **runs}, seeds=[3])
        assert str(item.expected).endswith(said)


def test_hours_of_what_was_not_run_here_are_the_recorded_ones(grid):
    first, second = grid({"steps": ["sft"], "profile": "tiny"}, seeds=[0, 999])
    assert first.expected.by == "as recorded"
    assert second.expected.by == "as recorded of other settings"
    assert 0 < second.expected.seconds < 3600


def test_a_notebook_of_another_profile_took_another_time(tmp_path):
    record = Record("ch", "smoke", {"k": 1, "seed": 3}, "digest", 10.0, None, {})
    damaged = replace(record, seconds=None)
    there = [record, damaged, None]
    assert str(expected_of_notebook(there, "smoke", {"k": 1})) == "10 s"
    for profile, k in (("paper", 1), ("smoke", 2)):
        found = expected_of_notebook(there, profile, {"k": k})
        assert str(found) == "10 s, as with other settings"
    (tmp_path / "ch-notes.txt").touch()  # no folder
    assert read_record("ch", tmp_path / "ch-notes.txt") is None


def test_no_order_is_faster_than_the_longest_way_or_all_work_on_all_cores():
    jobs = [Job("a", []), Job("b", [], ("a",), gpus=1), Job("c", [], cores=9, gpus=1)]
    seconds = {"a": 10.0, "b": 20.0, "c": 40.0}
    for cores, gpus, least in (
        (0, 0, 40),  # all at once
        (2, 0, 55),  # c has both cores: more than there are it cannot have
        (4, 1, 60),  # b and c want the one GPU
        (1, 0, 70),
    ):
        assert least_seconds(jobs, seconds, cores=cores, gpus=gpus) == least
    assert least_seconds(jobs, {"a": 10.0, "b": 50.0}, cores=0, gpus=0) == 60


# Running

PICTURE = b64encode(b"a picture").decode()
SHOWS = f"""
from IPython.display import display
display({{"image/png": "{PICTURE}"}}, raw=True)"""
# Notes that it is run, and fails until it is mended
COUNTS = """
import pathlib, sys
here, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with (here / f"ran-{name}").open("a") as file:
    file.write("x")
if name == "b" and not (here / "mended").exists():
    sys.exit("rlreason: there is no <b>")
(here / f"made-{name}").touch()
"""


def three(folder: Path, out: Path) -> list[Item]:
    """A job that works, one that fails until it is mended, and one that needs that."""
    items = []
    for name, needs in (("c", ("b",)), ("a", ()), ("b", ())):
        made, own = folder / f"made-{name}", out / name
        command = [sys.executable, "-c", COUNTS, str(folder), name]
        job = Job(name, command, needs, fresh=made.is_file)
        job = replace(job, log=own / "log.txt", lock=own / "lock")
        there = partial(lambda path: path if path.is_file() else None, made)
        items.append(Item(f"{name} (toy)", own, name, job, None, there))
    return items


def times(folder: Path) -> list[int]:
    """How many times each of the three was run."""
    files = [folder / f"ran-{name}" for name in "abc"]
    return [len(file.read_text()) if file.is_file() else 0 for file in files]


def states(out: Path) -> dict[str, str]:
    jobs = json.loads((out / "status.json").read_text())["jobs"]
    return {name: job["state"] for name, job in jobs.items()}


def test_a_failure_is_kept_apart_shown_and_tried_again_when_asked(tmp_path):
    out, lines = tmp_path / "out", []
    items = three(tmp_path, out)
    run_batch(items, out, report=lines.append)
    assert states(out) == {"a": "done", "b": "failed", "c": "blocked"}
    assert sorted(line.split(" ", 1)[0] for line in lines) == ["1/3", "2/3", "3/3"]
    page = (out / "index.html").read_text()
    assert "<pre>there is no &lt;b&gt;</pre>" in page
    assert 'href="b/log.txt"' in page
    assert (out / "b" / "log.txt").read_text() == "rlreason: there is no <b>\n"
    # What is done, and what failed, is not run again until one asks for it
    outcomes, _ = run_batch(items, out, report=lines.append)
    assert states(out) == {"a": "fresh", "b": "failed", "c": "blocked"}
    assert "--retry-failed runs it again" in outcomes["b"].message
    assert times(tmp_path) == [1, 1, 0]
    changed = [replace(item, digest="another") for item in items]  # nor is that asked
    run_batch(changed, out, report=lines.append)
    assert times(tmp_path) == [1, 2, 0]
    (tmp_path / "mended").touch()
    run_batch(items, out, report=lines.append, retry_failed=True)
    assert times(tmp_path) == [1, 3, 1]
    run_batch(items, out, report=lines.append)
    assert set(states(out).values()) == {"fresh"}
    assert times(tmp_path) == [1, 3, 1]


def test_a_job_that_ends_well_and_leaves_nothing_has_failed(tmp_path):
    """The exit code alone was asked."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", "raise SystemExit(0)"]
    job = Job("a", command, there=lambda: False)
    items = [Item("a (toy)", out / "a", "a", job, None, lambda: None)]
    outcomes, _ = run_batch(items, out, report=lambda line: None)
    assert not outcomes["a"].ok
    assert "its result is not there" in outcomes["a"].message


def test_a_full_disk_ends_no_batch_and_is_told_at_its_end(tmp_path, monkeypatch):
    def full(path, *rest):
        raise OSError(ENOSPC, "No space left on device", str(path))

    out, items = tmp_path / "out", three(tmp_path, tmp_path / "out")
    for name in ("write_json", "write_atomically"):
        monkeypatch.setattr(f"rlreason.publishing.batch.{name}", full)
    outcomes, unwritten = run_batch(items, out)
    found = {name: outcome.state for name, outcome in outcomes.items()}
    assert found == {"a": "done", "b": "failed", "c": "blocked"}
    assert times(tmp_path) == [1, 1, 0]
    assert "No space left on device" in unwritten
    assert "make room, and give the same command again" in unwritten
    assert "\n" not in unwritten


def test_a_lock_that_cannot_be_made_is_the_failure_of_its_job_alone(tmp_path):
    out, items = tmp_path / "out", three(tmp_path, tmp_path / "out")
    (out / "b" / "lock").mkdir(parents=True)
    outcomes, unwritten = run_batch(items, out)
    found = {name: outcome.state for name, outcome in outcomes.items()}
    assert found == {"a": "done", "b": "failed", "c": "blocked"}
    assert not unwritten


def test_two_batches_on_one_folder_run_each_job_once(tmp_path):
    fork, out = multiprocessing.get_context("fork"), tmp_path / "out"
    both = [
        fork.Process(target=run_batch, args=(three(tmp_path, out), out))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert times(tmp_path) == [1, 1, 0]
    assert states(out)["b"] == "failed"


def test_without_locks_two_batches_run_a_job_twice(tmp_path):
    """The wrong version: each finds the job not done, and starts it."""
    meet = f"import pathlib, os, time; here = pathlib.Path({str(tmp_path)!r})\n" + (
        "(here / f'ran-{os.getpid()}').touch()\n"
        "while len(list(here.glob('ran-*'))) < 2:\n    time.sleep(0.02)"
    )
    job = Job("a", [sys.executable, "-c", meet])
    item = Item("a", tmp_path / "a", "a", job, None, lambda: None)
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=run_batch, args=([item], tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert len(list(tmp_path.glob("ran-*"))) == 2


def test_a_terminal_gets_a_table_that_is_drawn_over_the_last(tmp_path):
    (tmp_path / "mended").touch()
    out, terminal = tmp_path / "out", StringIO()
    run_batch(three(tmp_path, out), out, terminal=terminal, report=pytest.fail)
    text = terminal.getvalue()
    first, last = text.split("\x1b")[0], text.split("\x1b[J")[-1]
    assert first.splitlines()[0] == "3 waiting; unknown time left"
    assert first.splitlines()[1].split() == ["waiting", "c", "(toy)"]
    assert last.startswith("3 done; about 0 min left\ndone ")
    assert text.count("\x1b[4F\x1b[J") == text.count("\x1b") // 2 == 6


def test_an_interruption_leaves_no_job_running(tmp_path):
    def interrupt(line):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_batch(three(tmp_path, out), out, cores=1, report=interrupt)
    assert "running" not in states(out).values()
    assert "waiting" in states(out).values()
    # Nor does the page wait for one
    page = (out / "index.html").read_text()
    assert "http-equiv" not in page
    assert "; stopped</p>" in page


def test_links_of_the_page_lead_to_folders_of_whatever_name(tmp_path):
    out = tmp_path / "out"
    item = replace(three(tmp_path, out)[1], folder=out / "100% of #1?")
    log = item.folder / "log.txt"
    run_batch([replace(item, job=replace(item.job, log=log))], out, report=len)
    assert 'href="100%25%20of%20%231%3F/log.txt"' in (out / "index.html").read_text()


def test_two_grids_of_one_name_do_not_share_a_folder(tmp_path):
    out, grids = tmp_path / "out", [tmp_path / n / "grid.yaml" for n in "ab"]
    for path in grids:
        path.parent.mkdir()
        path.touch()
    claim(out, grids[0])
    claim(out, tmp_path / "b" / ".." / "a" / "grid.yaml")  # the same
    with pytest.raises(GridError, match=f"another grid, {grids[0]}: give --output"):
        claim(out, grids[1])
    grids[0].unlink()  # it has moved
    claim(out, grids[1])


def test_a_grid_of_steps_and_a_notebook_from_the_command_line(tmp_path, capsys):
    profile = toy_profile(tmp_path)
    write_notebook(tmp_path, "ch", SHOWS, parameters=PARAMETERS)
    path, out = tmp_path / "grid.yaml", tmp_path / "out"
    runs = [{"steps": ["sft"], "profile": "toy.yaml"}, {"notebooks": ["ch.ipynb"]}]
    path.write_text(yaml.safe_dump({"profile": "smoke", "runs": runs, "seeds": [3]}))
    with pytest.raises(SystemExit) as caught:
        main(["batch", str(path), "--output", str(out), "--jobs", "2"])
    assert caught.value.code == 0
    assert "2 of 2 jobs are done" in capsys.readouterr().out
    assert set(states(out).values()) == {"done"}
    assert folder_of(plan_of("sft", load_recipe(profile), 3)).done
    (picture,) = out.glob("ch-*/picture.png")
    assert picture.read_bytes() == b64decode(PICTURE)
    page = (out / "index.html").read_text()
    for name in ("picture.png", "ch.ipynb", "log.txt"):
        assert f'="{picture.parent.name}/{name}"' in page
    main(["batch", str(path), "--output", str(out), "--dry-run"])
    assert "0 of 2 jobs to do" in capsys.readouterr().out


def test_the_grid_of_the_book_is_one(tmp_path):
    book = Path(__file__).parents[1] / "book"
    items = read_grid(book / "grid.yaml", tmp_path)
    assert f"{len(items)} jobs" in (book / "batch.md").read_text()

"""Words, not tracebacks: whatever a user has to mend is told in one line, with exit 2.

Each row of the tables is a command line that somebody may well type. None may end in a
traceback, and none may change a file that was there.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
from test_notebook_runner import write_notebook
from toys import toy_profile, toy_recipe

from rlreason import cli
from rlreason.runs.plans import obtain, plan_of

PROFILES = {
    "list.yaml": b"- a",
    "empty.yaml": b"",
    "broken.yaml": b"description: [",
    "latin.yaml": "description: caf\u00e9".encode("latin-1"),
    "date.yaml": b"description: a\ncommon: {day: 2024-01-02}",
    "date-key.yaml": b"description: a\nrecipe: {2024-01-02: 3}",
    "key.yaml": b"description: a\ncomon: {}",
    "number.yaml": b"1: 2",
    "twice.yaml": b"description: a\ndescription: b",
    "object.yaml": b"!!python/object/apply:os.getcwd []",
    "circle.yaml": b"description: a\nrecipe: &a {task: *a}",
    "unused.yaml": b"description: a\ncommon: {typo: 1}",
    "infinite.yaml": b"description: a\ncommon: {k: .inf}",
    "bytes.yaml": b"description: !!binary aGVsbG8=",
    "control.yaml": b"description: \x01",
}
PROBLEMS = {
    "empty.jsonl": b"",
    "broken.jsonl": b"{",
    "latin.jsonl": '{"question": "caf\u00e9"}'.encode("latin-1"),
    "fields.jsonl": b'{"question": "a?"}',
    "words.jsonl": b'{"question": "a?", "answer": "many"}',
}
PLANS = {
    "text.json": b"not JSON",
    "list.json": b"[]",
    "nothing.json": b"{}",
    "step.json": b'{"step": "nope"}',
    "lacking.json": b'{"step": "sft"}',
    "latin.json": b'{"step": "caf\xe9"}',
}
NOTEBOOKS = {
    "text.ipynb": b"not JSON",
    "old.ipynb": b'{"nbformat": 3}',
    "cells.ipynb": b'{"nbformat": 4, "metadata": {}}',
    "latin.ipynb": b"\xff",
    "needs.ipynb": b'{"nbformat": 4, "metadata": {"rlreason": 3}, "cells": []}',
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with all that is wrong, and a run that is done."""
    here = tmp_path_factory.mktemp("misuse")
    for files in (PROFILES, PROBLEMS, PLANS, NOTEBOOKS):
        for name, content in files.items():
            (here / name).write_bytes(content)
    (here / "file").write_text("a file")
    for taken in ("tiny", "smol"):
        text = "description: mine, by a name that is taken"
        (here / f"{taken}.yaml").write_text(text)
    (here / "model.gguf").write_bytes(b"GGUF and then nothing")
    for name in ("folder", "folder.yaml", "folder.ipynb", "folder.json"):
        (here / name).mkdir()
    junk = here / "junk"
    junk.mkdir()
    (junk / "config.json").write_text("{}")
    write_notebook(here, "ch", "print(k)", parameters="k = 1\nname = 'a'")
    write_notebook(here, "broken", parameters="k = 1\nprint(k)")
    toy_profile(here)
    plan = plan_of("sft", toy_recipe(here), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLREASON_RUNS", str(here / "runs"))
        done = obtain(plan).run.path
    for fault in ("damaged", "unfinished", "cut"):
        run = shutil.copytree(done, here / fault / done.name)
        if fault == "damaged":
            (run / "settings.json").write_text("{")
        elif fault == "unfinished":
            shutil.rmtree(run / "checkpoints")
            (run / "status.json").unlink()
        else:
            (weights,) = run.rglob("weights.safetensors")
            weights.write_bytes(weights.read_bytes()[:100])
        (here / f"{fault}-run").symlink_to(run)
    (here / "sft-run").symlink_to(done)
    return here


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder, by a hash of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and ".lock" not in path.name
    }


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    """Work in the folder, without lines of progress."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("RLREASON_DATA", str(place / "folder"))
    monkeypatch.setenv("RLREASON_QUIET", "1")


def told(arguments: list[str], capsys) -> tuple[int, str]:
    """Run the command line; return its exit code and what it says of the fault."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    return exit_.value.code, capsys.readouterr().err


TRAIN = ["train", "sft", "--profile", "toy.yaml"]
PPO = ["train", "ppo", "--profile", "toy.yaml"]
EVALUATE = ["evaluate", "sft-run", "--profile", "toy.yaml"]
SETTINGS = ["settings", "--profile"]

OPTIONS = [
    (["nope"], "No such command 'nope'"),
    (["--nope"], "No such option"),
    (["train", "nope"], "No such command 'nope'"),
    (["train", "ppo", "--seed", "-1"], "--seed"),
    (["train", "ppo", "--seed", "one"], "--seed"),
    (["train", "ppo", "--seed", "9" * 20], "--seed"),
    (["train", "ppo", "--set", "ppo.phases"], "--set"),
    ([*TRAIN, "--start", "base", "--set", "start", "sft"], "are two starts"),
    (["train", "nano", "--size", "huge"], "--size"),
    (["plan", "tiny", "--memory", "nan"], "--memory"),
    (["plan", "tiny", "--rates", "1", "inf"], "--rates"),
    (["train", "nano", "--output", "file"], "--output"),
    (["run"], "NOTEBOOK"),
    (["run", "ch.ipynb", "-p", "k"], "-p"),
    (["run", "ch.ipynb", "--output", "file"], "--output"),
    (["book", "--jobs", "0"], "--jobs"),
    (["evaluate"], "POLICY"),
    (["evaluate", "nano", "--seed", "-1"], "--seed"),
    (["evaluate", "nano", "--split", "nope"], "--split"),
    (["evaluate", "nano", "--label", "GOOD"], "--label"),
    (["evaluate", "nano", "--greedy", "--orm", "a"], "--orm"),
    (["bench", "sample", "--k", "0"], "--k"),
    (["bench", "sample", "--repeats", "0"], "--repeats"),
    (["bench", "sample", "--questions", "0"], "--questions"),
    (["bench", "train", "--problems", "-3"], "--problems"),
    (["bench", "train", "--batch-size", "0"], "--batch-size"),
    (["batch", "no.yaml", "--dry-run"], "GRID"),
    (["batch", "folder", "--dry-run"], "GRID"),
    (["bench", "train", "--repeats", "0"], "--repeats"),
]


@pytest.mark.parametrize(("arguments", "says"), OPTIONS, ids=lambda v: str(v)[:40])
def test_a_wrong_option_is_named(arguments, says, capsys):
    code, error = told(arguments, capsys)
    assert code == 2
    assert says in error
    assert error.startswith(("Usage: rlreason", "Error: "))
    assert "Traceback" not in error


MINI = [*TRAIN, "--set", "task.name", "gsm-mini", "--set", "task.knobs"]
WORDS = [
    # Recipes
    ([*TRAIN, "--set", "pop.k", "1"], "unknown 'pop' (did you mean 'ppo'"),
    ([*TRAIN, "--set", "ppo.creditt", "1"], "ppo.creditt: Extra inputs"),
    ([*TRAIN, "--set", "policy.rank", "1"], "no field policy.rank"),
    ([*TRAIN, "--set", "reward.size", "1.0"], "size means nothing to a sparse"),
    ([*TRAIN, "--set", "reward.kind", "dens"], "reward"),
    ([*TRAIN, "--set", "orm_samples", "ppo"], "'sft' or 'expert-iteration"),
    ([*TRAIN, "--set", "rcrl.k", "few"], "rcrl.k: Input should be a valid"),
    ([*TRAIN, "--set", "sft.lr", "nan"], "sft.lr"),
    ([*TRAIN, "--set", "sft.lr", "1e999"], "sft.lr"),
    ([*TRAIN, "--set", "sft.lr", "-1.0"], "sft.lr"),
    ([*TRAIN, "--set", "sft.epochs", "0"], "sft.epochs"),
    ([*TRAIN, "--set", "sft.seed", "3"], "give the seed to the command"),
    ([*TRAIN, "--set", "sft.betas", "[0.9, 1.5]"], "sft.betas.1: Input should be"),
    ([*TRAIN, "--set", "ppo.betas", "[-0.1, 0.9]"], "ppo.betas.0: Input should be"),
    # Also where it is the default of its part
    ([*TRAIN, "--set", "ppo.max_new_tokens", "256"], "ppo.max_new_tokens would be"),
    ([*TRAIN, "--set", "expert_iteration.first_round_shots", "2"], "recipe's shots"),
    ([*TRAIN, "--set", "policy", ""], "policy: String should have at least 1"),
    ([*TRAIN, "--plan", "--set", "policy", "no/model"], "no/model"),
    ([*TRAIN, "--plan", "--set", "task.name", "no.jsonl"], "no.jsonl"),
    ([*TRAIN, "--set", "", "1"], "unknown ''"),
    ([*TRAIN, "--set", "ppo.", "1"], "ppo."),
    ([*TRAIN, "--set", "policy", "3"], "policy: Input should be a valid string"),
    ([*TRAIN, "--set", "policy", "no/model"], "no/model"),
    ([*TRAIN, "--set", "policy", "folder"], "folder"),
    ([*TRAIN, "--set", "policy", "file"], "file"),
    ([*TRAIN, "--start", "nope"], "give sft, base or the folder of a run"),
    ([*TRAIN, "--start", ""], "give sft, base or the folder of a run"),
    ([*PPO, "--start", "base", "--set", "shots", "6"], "evaluation.validation_proble"),
    ([*PPO, "--start", "folder"], "folder"),
    ([*PPO, "--start", "damaged-run"], "damaged"),
    (["settings", "nope"], "nope"),
    (["record", "sftt"], "did you mean 'sft'?"),
    (["record", "--profile", "big"], "no profile 'big'"),
    (["claims", "--profile", "big"], "no profile 'big'"),
    # Tasks
    ([*TRAIN, "--set", "task.name", "no.jsonl"], "no.jsonl"),
    ([*TRAIN, "--set", "task.name", "folder"], "folder"),
    ([*TRAIN, "--set", "task.name", "gsm9k"], "gsm9k"),
    (["plan", "smoke", "--set", "task.name", "gsm9k"], "unknown task 'gsm9k'"),
    ([*MINI, "{'steps': 'x'}"], "two whole numbers"),
    ([*MINI, "{'steps': [1.5, 2]}"], "two whole numbers"),
    ([*MINI, "{'steps': [1, 2, 3]}"], "two whole numbers"),
    ([*MINI, "{'steps': 0}"], "two whole numbers"),
    ([*MINI, "{'largest': 'x'}"], "a whole number, 12 to 200"),
    ([*MINI, "{'distractors': 'x'}"], "a chance, 0 to 1"),
    ([*MINI, "{'limit': 5}"], "limit, which is no knob"),
    ([*TRAIN, "--set", "task.name", "gsm8k"], "gsm8k"),
    *(([*TRAIN, "--set", "task.name", name], name) for name in PROBLEMS),
    # Plans
    (["train", "no.json"], "no.json is no plan"),
    (["train", "folder.json"], "folder.json is no plan"),
    (["train", "text.json"], "text.json is no plan"),
    (["train", "latin.json"], "latin.json is no plan"),
    (["train", "list.json"], "a plan is a mapping"),
    (["train", "nothing.json"], "a plan is a mapping"),
    (["train", "step.json"], "unknown 'nope'"),
    (["train", "lacking.json"], "Field required"),
    # Profiles
    ([*SETTINGS, "big"], "no profile 'big'"),
    ([*SETTINGS, "no.yaml"], "no profile"),
    ([*SETTINGS, "tiny.yaml"], "has the name of a built-in one"),
    ([*SETTINGS, "smol.yaml"], "has the name of a built-in one"),
    ([*SETTINGS, "folder.yaml"], "no profile"),
    ([*SETTINGS, "file"], "no profile"),
    ([*SETTINGS, "x" * 5000 + ".yaml"], "File name too long"),
    ([*SETTINGS, "list.yaml"], "not a mapping of keys"),
    ([*SETTINGS, "empty.yaml"], "not a mapping of keys"),
    ([*SETTINGS, "broken.yaml"], "broken.yaml"),
    ([*SETTINGS, "latin.yaml"], "latin.yaml"),
    ([*SETTINGS, "date.yaml"], "date"),
    ([*SETTINGS, "date-key.yaml"], "date-key.yaml: keys must be"),
    (["batch", "date-key.yaml", "--dry-run"], "date-key.yaml: keys must be"),
    ([*SETTINGS, "key.yaml"], "did you mean 'common'"),
    ([*SETTINGS, "number.yaml"], "unknown"),
    ([*SETTINGS, "twice.yaml"], "description given twice"),
    ([*SETTINGS, "object.yaml"], "object.yaml"),
    ([*SETTINGS, "circle.yaml"], "circle.yaml"),
    ([*SETTINGS, "infinite.yaml"], "k"),
    ([*SETTINGS, "bytes.yaml"], "bytes"),
    ([*SETTINGS, "control.yaml"], "control.yaml"),
    (["book", "--profile", "unused.yaml"], "no notebook takes common.typo"),
    (["book", "--profile", "big"], "no profile 'big'"),
    (["bench", "base", "--profile", "big"], "no profile 'big'"),
    # Notebooks
    (["run", "no.ipynb"], "no notebook no.ipynb"),
    (["run", "ch.ipynb", "-p", "profile", "tiny"], "name it with --profile"),
    (["run", "folder.ipynb"], "cannot be read: Is a directory"),
    (["run", "file/ch.ipynb"], "cannot be read: Not a directory"),
    (["run", "text.ipynb"], "text.ipynb is not a notebook"),
    (["run", "latin.ipynb"], "latin.ipynb is not a notebook"),
    (["run", "old.ipynb"], "not a notebook of format 4"),
    (["run", "cells.ipynb"], "not a whole notebook"),
    (["run", "needs.ipynb"], "needs.ipynb"),
    (["run", "broken.ipynb"], "only assignments of one name"),
    (["run", "ch.ipynb", "-p", "nope", "1"], "unknown 'nope'"),
    (["run", "ch.ipynb", "-p", "k", "many"], "not of type int"),
    (["run", "ch.ipynb", "--profile", "big"], "no profile 'big'"),
    (["run", "ch.ipynb", "--output", "file/out"], "cannot be made"),
    # Policies
    (["evaluate", "file"], "file"),
    (["evaluate", "folder"], "folder"),
    (["evaluate", "no/run"], "no/run"),
    (["evaluate", "model.gguf"], "model.gguf"),
    (["evaluate", "junk"], "junk"),
    (["evaluate", "damaged-run"], "damaged"),
    (["evaluate", "unfinished-run"], "is not finished"),
    (["evaluate", "cut-run"], "cut"),
    ([*EVALUATE, "--orm", "sft-run"], "sft"),
    ([*EVALUATE, "--orm", "no"], "no"),
    ([*EVALUATE, "--label", "[GOOD]"], "has no token '[GOOD]'"),
    ([*EVALUATE, "--set", "max_new_tokens", "100000"], "positions"),
    ([*EVALUATE, "--set", "evaluation.k", "0"], "evaluation.k"),
    ([*EVALUATE, "--prompted", "--set", "shots", "6"], "evaluation.sampled_problems"),
    (["bench", "train", "--policy", "no/model"], "no/model"),
    (["bench", "sample", "--policy", "folder"], "folder"),
]


@pytest.mark.parametrize(("arguments", "says"), WORDS, ids=lambda v: str(v)[-40:])
def test_a_misuse_is_one_line_with_what_is_wrong(arguments, says, place, capsys):
    before = content(place)
    code, error = told(arguments, capsys)
    assert code == 2, error
    assert error.startswith("rlreason: "), error
    assert error.count("\n") == 1, error
    assert says in error
    assert content(place) == before


@pytest.mark.parametrize("runs", ["file", "file/below", "/proc/nowhere", "x" * 300])
@pytest.mark.parametrize(
    "arguments",
    [TRAIN, EVALUATE, ["run", "ch.ipynb"], ["book", "--profile", "smoke"]],
    ids=lambda arguments: arguments[0],
)
def test_a_runs_folder_that_cannot_be_is_told_with_the_remedy(
    arguments, runs, monkeypatch, capsys
):
    monkeypatch.setenv("RLREASON_RUNS", runs)
    code, error = told(arguments, capsys)
    assert code == 2, error
    assert error.startswith("rlreason: "), error
    assert error.count("\n") == 1, error
    assert "RLREASON_RUNS" in error


def test_there_are_many_of_them():
    assert len(OPTIONS) + len(WORDS) >= 100

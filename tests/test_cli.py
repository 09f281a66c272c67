"""The command line: quick help, whose fault an error is, interruptions, commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import psutil
import pytest
from click.testing import CliRunner
from test_execution import ends, wait_for
from test_notebook_runner import write_notebook
from toys import run_toy, toy_profile, toy_recipe

from rlreason import cli
from rlreason.bench import doctor
from rlreason.experiments.catalogue import CATALOGUE
from rlreason.runs import steps
from rlreason.runs.environment import PACKAGE
from rlreason.runs.folder import read_settings


def call(*arguments: str) -> int:
    """Run the command line; return its exit code."""
    try:
        cli.main(arguments)
    except SystemExit as exit_:
        return exit_.code or 0
    return 0


def page(*command: str) -> str:
    """The help of a command."""
    shown = CliRunner().invoke(cli.app, [*command, "--help"])
    assert shown.exit_code == 0
    return shown.output


# Help


def test_help_is_a_manual_and_every_command_has_one():
    for word in ("doctor", "RLREASON_DATA", "Exit codes", "profile"):
        assert word in page()
    for name in cli.app.commands:
        assert len(page(name).splitlines()) > 5


GROUPS = [
    [],
    *([name] for name, c in cli.app.commands.items() if hasattr(c, "commands")),
]


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_the_list_of_commands_says_what_each_is_for(group):
    listed = page(*group).partition("Commands:\n")[2].splitlines()
    assert listed
    assert all(line.endswith(".") for line in listed)
    assert not [line for line in listed if line.endswith("...")]  # cut off


def test_help_tells_what_may_be_chosen_and_exit_codes_are_as_it_says(capsys):
    for name in CATALOGUE.arms:
        assert name in page("record")
    told = " ".join(page("evaluate").split())
    assert "--label LABEL [GOOD] or [BAD] before every step" in told
    assert call("--help") == call("book", "--help") == call("--version") == 0
    assert "rlreason, version" in capsys.readouterr().out
    assert call() == 2


@pytest.mark.parametrize(
    "module",
    [
        "rlreason",
        "rlreason.cli",
        "rlreason.publishing.book",
        "rlreason.experiments.catalogue",
    ],
)
def test_the_package_its_help_and_a_book_that_stands_do_not_wait_for_torch(module):
    check = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_public_names_are_there_and_others_are_not():
    import rlreason

    for name in rlreason.__all__:
        assert getattr(rlreason, name).__name__ == name
        assert name in dir(rlreason)
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        rlreason.smaple  # noqa: B018


# Whose fault an error is (what a user has to mend is in test_misuse)


@pytest.mark.parametrize(
    "fault",
    [
        lambda: int("not a number"),
        lambda: json.loads("{"),
        lambda: exec(compile("int('x')", cli.__file__, "exec")),  # in a line of ours
        lambda: Path("/no/such/file").read_text(),
        lambda: {}["key"],
    ],
    ids=["elsewhere", "in a library", "in ours", "file", "key"],
)
def test_a_fault_of_the_program_keeps_its_traceback(fault, monkeypatch, capsys):
    monkeypatch.setitem(
        cli.app.commands, "fault", click.Command("fault", callback=fault)
    )
    with pytest.raises((ValueError, OSError, KeyError)):
        cli.main(["fault"])
    assert capsys.readouterr().err == ""


def test_what_the_system_refuses_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    refused = click.Command("refused", callback=lambda: tmp_path.open())
    monkeypatch.setitem(cli.app.commands, "refused", refused)
    assert call("refused") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"rlreason: the system refuses {tmp_path}: Is a directory")
    assert told.count("\n") == 1


# Interruptions


def test_an_interruption_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setitem(
        cli.app.commands, "long", click.Command("long", callback=interrupt)
    )
    assert call("long") == 130
    assert capsys.readouterr().err == "rlreason: interrupted\n"


@pytest.mark.parametrize(
    ("command", "reported", "number"),
    [
        (["book", "--jobs", "1"], "a ...\n", signal.SIGINT),
        (["run", "notebooks/a.ipynb"], "", signal.SIGINT),
        (["run", "notebooks/a.ipynb"], "", signal.SIGTERM),
    ],
    ids=["book", "run", "run-asked-to-end"],
)
def test_ctrl_c_ends_the_kernels_at_once_and_starts_no_more(
    command, reported, number, tmp_path
):
    # A checkout of its own: the package, and a book of three notebooks
    junk = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(PACKAGE, tmp_path / "rlreason", ignore=junk)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "_toc.yml").touch()
    (tmp_path / "plain.yaml").write_text("description: nothing is set")
    wait = (
        "import os, pathlib, time\n"
        f"started = pathlib.Path({str(tmp_path)!r}) / '{{name}}.started'\n"
        "started.with_suffix('.partial').write_text(str(os.getpid()))\n"
        "started.with_suffix('.partial').rename(started)\ntime.sleep(600)"
    )
    for name in "abc":
        write_notebook(tmp_path / "notebooks", name, wait.format(name=name))
    program = [sys.executable, "-m", "rlreason.cli", *command]
    process = subprocess.Popen(
        [*program, "--profile", "plain.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    kernel = wait_for(tmp_path / "a.started")
    family = psutil.Process(process.pid).children(recursive=True)
    assert kernel in [member.pid for member in family]
    process.send_signal(number)
    out, error = process.communicate()
    assert (process.returncode, error) == (130, "rlreason: interrupted\n")
    assert out == reported
    assert all(ends(member.pid) for member in family)
    assert [path.name for path in tmp_path.glob("*.started")] == ["a.started"]
    if command[0] == "run":  # a book throws drafts away when it begins
        assert not list(tmp_path.rglob("*.partial.ipynb"))


# Doctor


def test_the_doctor_finds_that_tiny_can_run_here(capsys):
    code = call("doctor")
    shown = capsys.readouterr().out
    for what in ("Python", "torch", "CPU", "memory", "disk", "GPU", "policy nano"):
        assert what in shown
    assert code == 0, shown
    assert "This machine can run the profile tiny." in shown


def test_the_doctor_says_what_to_do_about_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("RLREASON_DATA", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    found = {finding.what: finding for finding in doctor.examine(package=tmp_path)}
    for what in ("policy nano", "data gsm8k", "Chromium"):
        assert not found[what].ok
        assert found[what].remedy
    assert found["policy nano"].required
    assert not found["Chromium"].required


def test_the_doctor_notices_weights_that_were_cut_off(tmp_path):
    whole = PACKAGE / "assets" / "nano" / "model.safetensors"
    cut = tmp_path / "assets" / "nano" / "model.safetensors"
    cut.parent.mkdir(parents=True)
    cut.write_bytes(whole.read_bytes()[:1000])
    found = {finding.what: finding for finding in doctor.examine(package=tmp_path)}
    assert not found["policy nano"].ok


@pytest.mark.parametrize("runs", ["file", "file/below", "/proc/nowhere"])
def test_runs_that_cannot_be_written_are_a_finding_and_exit_code_1(
    runs, monkeypatch, capsys, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLREASON_RUNS", str(tmp_path / runs))
    assert call("doctor") == 1
    shown = capsys.readouterr().out
    assert "!! disk" in shown
    assert "-> point RLREASON_RUNS to a folder that can be written" in shown
    assert "This machine cannot run the profile tiny." in shown


# Training runs, with the toy in place of a profile


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of the toy, where what the runs start from is done."""
    folder = tmp_path_factory.mktemp("toy")
    toy_profile(folder)
    run_toy(steps.train_expert_iteration, toy_recipe(folder), folder / "runs")
    return folder


@pytest.fixture
def shown(toy, monkeypatch, capsys):
    """A function: the lines that a command prints, with the toy as its profile."""
    monkeypatch.setenv("RLREASON_RUNS", str(toy / "runs"))

    def lines(*arguments: str) -> list[str]:
        assert call(*arguments, "--profile", str(toy / "toy.yaml")) == 0
        return capsys.readouterr().out.splitlines()

    return lines


def settings_of(last: str) -> dict:
    """The settings of the run that the last line of a training run names."""
    path, _, seconds = last.partition(" took ")
    assert seconds.endswith(" s")
    return read_settings(Path(path))


def test_ppo_is_trained_with_another_credit_and_reward(shown):
    changes = ["--set", "ppo.credit", "{'kind': 'rloo'}", "--set", "ppo.phases", "2"]
    changes += ["--set", "reward.kind", "dense", "--set", "reward.size", "0.3"]
    *phases, last = shown("train", "ppo", *changes)
    assert [line.split(":")[0] for line in phases] == ["phase 1", "phase 2"]
    assert phases[0].startswith("phase 1: 8 rollouts, reward 0.")
    assert "validation maj@1" not in phases[0]
    assert "validation maj@1" in phases[1]
    settings = settings_of(last)
    assert settings["algorithm"]["credit"] == {"kind": "rloo", "k": 1}
    assert settings["reward"] | {"function": None} == {
        "kind": "dense",
        "size": 0.3,
        "function": None,
    }
    assert settings["start"] is not None


@pytest.mark.parametrize("start", ["base", "sft"])
def test_what_changes_nothing_of_a_run_is_noted(shown, start, capsys):
    call("train", "sft", "--plan", "--start", start)
    noted = capsys.readouterr().err
    assert ("note: start changes nothing of sft" in noted) == (start == "base")


def test_ppo_can_start_from_the_prompted_base(shown):
    *_, last = shown("train", "ppo", "--start", "base", "--set", "ppo.phases", "1")
    settings = settings_of(last)
    assert (settings["start"], settings["shots"]) == (None, 1)


def test_a_plan_is_printed_and_carried_out_from_its_file(shown, tmp_path, capsys):
    (text,) = shown("train", "orm", "--plan")
    (tmp_path / "plan.json").write_text(text)
    assert call("train", str(tmp_path / "plan.json")) == 0
    *epochs, last = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in epochs] == ["epoch 1", "epoch 2"]
    assert all(", AUC 0." in line or ", AUC 1." in line for line in epochs)
    assert settings_of(last) == json.loads(text)
    # The same run, which nobody is told to have run again
    assert shown("train", "orm")[-1] == f"{last} before: it was there already"


def test_return_conditioned_rl_is_trained_and_judged_by_its_labels(shown):
    labels, last = shown("train", "rcrl")
    assert labels.startswith("6 questions: ")
    assert labels.endswith("% good")
    run = last.partition(" took ")[0]
    for label in ("[GOOD]", "[BAD]"):
        command = ("evaluate", run, "--label", label, "--greedy")
        what, caption, *metrics = shown(*command)
        assert what.startswith(f"{run}: ")
        assert what.endswith(f", validation split, seed 0, {label} before each step")
        assert "6 problems, greedy only" in caption
        assert [line.split()[0] for line in metrics] == ["maj@1"]
    settings = settings_of(shown("train", "rcrl", "--set", "rcrl_labels", "orm")[-1])
    assert settings["policy"] in json.dumps(settings["reward_model"])


def notes(capsys, *arguments: str) -> list[str]:
    """What an evaluation notes on standard error."""
    assert call("evaluate", *arguments) == 0
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith("note: ")]


def test_an_evaluation_notes_what_changes_nothing_of_it(shown, toy, capsys):
    *_, last = shown("train", "sft")
    run = last.partition(" took ")[0]
    ours = ["--profile", str(toy / "toy.yaml")]
    idle = ["--set", "ppo.lr", "1e-4", "--set", "shots", "2"]
    idle += ["--set", "evaluation.problems", "3"]
    assert notes(capsys, run, *ours, *idle) == [
        f"note: {path} changes nothing of this evaluation"
        for path in ("evaluation.problems", "ppo.lr", "shots")
    ]
    busy = ["--greedy", "--prompted", *idle[3:], "--set", "max_new_tokens", "20"]
    assert notes(capsys, run, *ours, *busy) == []


def test_an_evaluation_notes_where_it_asks_otherwise_than_the_run_was_trained(
    shown, toy, capsys, monkeypatch
):
    *_, last = shown("train", "ppo", "--start", "base", "--set", "ppo.phases", "1")
    run = last.partition(" took ")[0]
    ours = ["--profile", str(toy / "toy.yaml"), "--greedy"]
    assert notes(capsys, run, *ours, "--prompted") == []
    (shots,) = notes(capsys, run, *ours)
    assert shots.startswith("note: the run was trained with 1 solved examples in its")
    few = ["--set", "task.knobs", "{'steps': [1, 1]}"]
    few += ["--set", "evaluation.problems", "2", "--prompted"]
    (task,) = notes(capsys, run, *ours, *few, "--set", "task.name", "gsm-mini")
    assert task.endswith("toy, and is asked of gsm-mini steps=[1, 1]")
    *_, last = shown("train", "rcrl")
    (label,) = notes(capsys, last.partition(" took ")[0], *ours)
    assert label.endswith("after a label: give --label '[GOOD]'")


def test_a_setting_within_what_a_profile_leaves_out_is_made(capsys):
    changes = ["--set", "ppo.lora.rank", "4"]  # smoke says lora: null
    changes += ["--set", "ppo.credit", "{'kind': 'rloo'}"]
    assert call("train", "ppo", "--plan", "--profile", "smoke", *changes) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["algorithm"]["lora"]["rank"] == 4
    assert plan["algorithm"]["credit"] == {"kind": "rloo", "k": 1}

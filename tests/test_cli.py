"""The command line: quick help, errors in one line, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner
from toys import run_toy, toy_profile, toy_recipe

from rlreason import cli
from rlreason.algorithms.ppo import BaselineSettings
from rlreason.bench import doctor
from rlreason.experiments.catalogue import CATALOGUE
from rlreason.runs import steps as train
from rlreason.runs.recipes import Recipe


def call(*arguments: str, monkeypatch) -> int:
    """Run the command line as the console script does; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["rlreason", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0


def test_help_is_a_manual_and_every_command_has_one():
    shown = CliRunner().invoke(cli.app, ["--help"]).output
    for word in ("doctor", "RLREASON_DATA", "Exit codes", "profile"):
        assert word in shown
    for name in cli.app.commands:
        page = CliRunner().invoke(cli.app, [name, "--help"])
        assert page.exit_code == 0
        assert len(page.output.splitlines()) > 5


@pytest.mark.parametrize("group", [[], ["train"], ["bench"]])
def test_the_list_of_commands_says_what_each_is_for(group):
    page = CliRunner().invoke(cli.app, [*group, "--help"]).output
    listed = page.partition("Commands:\n")[2].splitlines()
    assert len(listed) >= 4
    assert all(line.endswith(".") for line in listed)
    assert not [line for line in listed if line.endswith("...")]  # cut off


def test_the_help_of_a_training_run_tells_its_choices():
    def page(*command: str) -> str:
        shown = CliRunner().invoke(cli.app, [*command, "--help"]).output
        return " ".join(shown.split())

    ppo = page("train", "ppo")
    assert "--set ppo.credit \"{'kind': 'rloo'}\"" in ppo
    for kind in ("reinforce", "grpo", "dense", "shaped", "sparse-orm", "dense-orm"):
        assert kind in ppo
    assert "--from-base" in ppo
    assert "--set rcrl_labels orm" in page("train", "rcrl")
    assert "rlreason evaluate --label" in page("train", "rcrl")
    assert "--label LABEL [GOOD] or [BAD] before every step" in page("evaluate")
    for name in CATALOGUE.comparisons:
        assert name in page("record")


@pytest.mark.parametrize(
    "program",
    ["import rlreason", "import rlreason.cli", "import rlreason.experiments.catalogue"],
)
def test_the_package_and_its_help_do_not_wait_for_torch(program):
    check = f"{program}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_call_for_a_book_that_stands_does_not_wait_for_torch():
    check = "import rlreason.publishing.book, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_public_names_are_there_and_others_are_not():
    import rlreason

    for name in rlreason.__all__:
        assert getattr(rlreason, name).__name__ == name
        assert name in dir(rlreason)
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        rlreason.smaple  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "no.ipynb"], "no notebook no.ipynb"),
        (["run", "notebooks/00_tour.ipynb", "-p", "nope", "1"], "unknown 'nope'"),
        (["run", "notebooks/00_tour.ipynb", "--profile", "big"], "no profile 'big'"),
        (["book", "--profile", "big"], "no profile 'big'"),
        (["train", "ppo", "--set", "pop.k", "1"], "unknown 'pop' (did you mean 'ppo'"),
        (["train", "ppo", "--set", "ppo.creditt", "1"], "ppo.creditt: Extra inputs"),
        (["train", "ppo", "--set", "policy.rank", "1"], "no field policy.rank"),
        (["train", "ppo", "--set", "reward.size", "1.0"], "size means nothing to a sp"),
        (["train", "orm", "--set", "orm_samples", "ppo"], "'sft' or 'expert-iteration"),
        (["train", "rcrl", "--set", "rcrl.k", "few"], "rcrl.k: Input should be a val"),
        (["record", "sft"], "no comparison 'sft'; there are expert-iteration, exp"),
        (["evaluate", "nano", "--label", "[GOOD]"], "has no token '[GOOD]'"),
        (["bench", "ppo", "--profile", "big"], "no profile 'big'"),
    ],
)
def test_an_error_of_ours_is_one_line_and_exit_code_2(
    arguments, told, monkeypatch, capsys
):
    assert call(*arguments, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.startswith("rlreason: ")
    assert error.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    # A ValueError from a library is no message to the user
    monkeypatch.setattr(doctor, "examine", lambda: int("not a number"))
    monkeypatch.setattr(sys, "argv", ["rlreason", "doctor"])
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main()


def test_a_wrong_option_is_exit_code_2(monkeypatch, capsys):
    assert call("book", "--jobs", "0", monkeypatch=monkeypatch) == 2
    assert "--jobs" in capsys.readouterr().err


# Doctor


def test_the_doctor_finds_that_tiny_can_run_here(monkeypatch, capsys):
    code = call("doctor", monkeypatch=monkeypatch)
    shown = capsys.readouterr().out
    for what in ("Python", "torch", "CPU", "memory", "disk", "GPU", "policy nano"):
        assert what in shown
    assert code == 0, shown
    assert "This machine can run the profile tiny." in shown


def test_the_doctor_says_what_to_do_about_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    monkeypatch.setenv("RLREASON_DATA", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    found = {finding.what: finding for finding in doctor.examine()}
    for what in ("policy nano", "data gsm8k", "Chromium"):
        assert not found[what].ok
        assert found[what].remedy
    assert found["policy nano"].required
    assert not found["Chromium"].required


def test_the_doctor_notices_weights_that_were_cut_off(monkeypatch, tmp_path):
    whole = doctor.PACKAGE / "assets" / "nano" / "model.safetensors"
    cut = tmp_path / "assets" / "nano" / "model.safetensors"
    cut.parent.mkdir(parents=True)
    cut.write_bytes(whole.read_bytes()[:1000])
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    found = {finding.what: finding for finding in doctor.examine()}
    assert not found["policy nano"].ok


def test_missing_what_tiny_needs_is_exit_code_1(monkeypatch, capsys):
    broken = [doctor.Finding("policy nano", "gone", False, True, "get it again")]
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    assert call("doctor", monkeypatch=monkeypatch) == 1
    shown = capsys.readouterr().out
    assert "!! policy nano" in shown
    assert "-> get it again" in shown


# Training runs, with the toy in place of a profile


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of the toy, where what the runs start from is done."""
    folder = tmp_path_factory.mktemp("toy")
    toy_profile(folder)
    run_toy(train.train_expert_iteration, toy_recipe(folder), folder / "runs")
    return folder


def told(toy, *arguments: str, monkeypatch, capsys) -> list[str]:
    """The lines that a command prints, with the toy as its profile."""
    monkeypatch.setenv("RLREASON_RUNS", str(toy / "runs"))
    given = (*arguments, "--profile", str(toy / "toy.yaml"))
    assert call(*given, monkeypatch=monkeypatch) == 0
    return capsys.readouterr().out.splitlines()


def test_ppo_is_trained_with_another_credit_and_reward(toy, monkeypatch, capsys):
    changes = ["--set", "ppo.credit", "{'kind': 'rloo'}", "--set", "ppo.phases", "2"]
    changes += ["--set", "reward.kind", "dense", "--set", "reward.size", "0.3"]
    *phases, last = told(
        toy, "train", "ppo", *changes, monkeypatch=monkeypatch, capsys=capsys
    )
    assert [line.split(":")[0] for line in phases] == ["phase 1", "phase 2"]
    assert phases[0].startswith("phase 1: 8 rollouts, reward 0.")
    assert "validation maj@1" not in phases[0]
    assert "validation maj@1" in phases[1]
    path, _, seconds = last.partition(" took ")
    settings = train.read_settings(train.Path(path))
    assert settings["algorithm"]["credit"] == {"kind": "rloo"}
    assert settings["reward"] == {"kind": "dense", "size": 0.3}
    assert settings["start"] is not None
    assert seconds.endswith(" s")


def test_ppo_can_start_from_the_prompted_base(toy, monkeypatch, capsys):
    arguments = ["train", "ppo", "--from-base", "--set", "ppo.phases", "1"]
    *_, last = told(toy, *arguments, monkeypatch=monkeypatch, capsys=capsys)
    settings = train.read_settings(train.Path(last.partition(" took ")[0]))
    assert (settings["start"], settings["shots"]) == (None, 1)


def test_a_reward_model_is_trained_and_tells_its_auc(toy, monkeypatch, capsys):
    *epochs, _ = told(toy, "train", "orm", monkeypatch=monkeypatch, capsys=capsys)
    assert [line.split(":")[0] for line in epochs] == ["epoch 1", "epoch 2"]
    assert all(", AUC 0." in line or ", AUC 1." in line for line in epochs)


def test_return_conditioned_rl_is_trained_and_judged_by_its_labels(
    toy, monkeypatch, capsys
):
    def shown(*arguments: str) -> list[str]:
        return told(toy, *arguments, monkeypatch=monkeypatch, capsys=capsys)

    labels, last = shown("train", "rcrl")
    assert labels.startswith("6 questions: ")
    assert labels.endswith("% good")
    run = last.partition(" took ")[0]
    seen = []
    evaluate = train.evaluate

    def note(policy, problems, *, label, **options):
        seen.append(label)
        return evaluate(policy, problems, label=label, **options)

    monkeypatch.setattr(train, "evaluate", note)
    for label in ("[GOOD]", "[BAD]"):
        caption, *metrics = shown("evaluate", run, "--label", label, "--greedy")
        assert "6 problems, greedy only" in caption
        assert [line.split()[0] for line in metrics] == ["maj@1"]
    assert seen == ["[GOOD]", "[BAD]"]
    from_orm = shown("train", "rcrl", "--set", "rcrl_labels", "orm")
    settings = train.read_settings(train.Path(from_orm[-1].partition(" took ")[0]))
    assert settings["orm"]["start"]["policy"] == settings["policy"]


def test_a_setting_within_what_a_profile_leaves_out_is_made(monkeypatch):
    seen = []
    monkeypatch.setattr(
        train, "train_ppo", lambda recipe, *_, **__: seen.append(recipe) or 1 / 0
    )
    arguments = ["train", "ppo", "--profile", "smoke"]
    arguments += ["--set", "ppo.lora.rank", "4"]  # smoke says lora: null
    arguments += ["--set", "ppo.credit", "{'kind': 'rloo'}"]
    monkeypatch.setattr(sys, "argv", ["rlreason", *arguments])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    (recipe,) = seen
    assert isinstance(recipe, Recipe)
    assert recipe.ppo.lora.rank == 4
    assert recipe.ppo.credit == BaselineSettings(kind="rloo")


def test_the_benchmark_of_ppo_is_a_table(toy, monkeypatch, capsys):
    shown = {"monkeypatch": monkeypatch, "capsys": capsys}
    head, *lines = told(toy, "bench", "ppo", "--phases", "1", **shown)
    assert head.split()[0] == "stage"
    assert [line.split()[0] for line in lines] == ["sampling", "scoring", "learning"]

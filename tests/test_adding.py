"""The page on adding things: what it names exists, and its code is code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toys import TOY_PROBLEMS, toy_policy, toy_profile

from rlreason import sample
from rlreason.cli import main
from rlreason.rewards.own import load_reward

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "book" / "adding.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    """The Python of the page."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", PAGE, flags=re.S | re.M)
    return [
        "\n".join(line.removeprefix(indent) for line in code.splitlines())
        for indent, code in found
    ]


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(test_\w+)`", PAGE)
    source = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    assert len(named) == 4
    for name in named:
        assert f"def {name}(" in source, name


def test_its_code_parses_and_its_reward_rewards(tmp_path):
    codes = blocks()
    assert len(codes) == 3
    for code in codes:
        ast.parse(code)
    file = tmp_path / "mine.py"
    file.write_text(codes[0])
    rollouts = sample(toy_policy(), TOY_PROBLEMS, k=2, max_new_tokens=24, seed=0)
    rewards = load_reward(f"{file}:short_and_right")(rollouts, TOY_PROBLEMS)
    assert [len(row) for row in rewards] == [len(r.tokens) for r in rollouts]
    assert all(sum(row) < 1 for row in rewards)


def test_the_step_of_an_installed_package_is_known_to_every_process(tmp_path, capsys):
    (tmp_path / "wishes.py").write_text(blocks()[2])
    about = tmp_path / "wishes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: wishes\nVersion: 1.0")
    (about / "entry_points.txt").write_text("[rlreason.steps]\nwish = wishes\n")
    profile = toy_profile(tmp_path, more={"wish": {"by": 0.5}})

    command = ["settings", "wish", "--profile", str(profile)]
    installed = subprocess.run(
        [sys.executable, "-m", "rlreason.cli", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert installed.stdout == (
        "more.wish.by: float = as the step has it, here 0.5  [its package]\n"
    )
    with pytest.raises(SystemExit):  # here it is not installed
        main(command)
    assert "unknown 'wish'" in capsys.readouterr().err

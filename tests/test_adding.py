"""The page on adding things: what it names exists, and its code is code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from toys import TOY_PROBLEMS, toy_policy

from rlreason import sample
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

"""The book's page of pitfalls names tests that exist, and leaves no pitfall out."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)


def rows() -> list[tuple[str, ...]]:
    page = (ROOT / "book" / "pitfalls.md").read_text(encoding="utf-8")
    return ROW.findall(page)


def existing_tests() -> set[str]:
    files = (ROOT / "tests").glob("test_*.py")
    return {
        name
        for file in files
        for name in re.findall(
            r"^def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE
        )
    }


def test_every_pitfall_has_its_row_with_existing_tests():
    assert [int(number) for number, *_ in rows()] == list(range(1, 53))
    named = {
        name for _, _, tests, _ in rows() for name in re.findall(r"`(\w+)`", tests)
    }
    assert named <= existing_tests(), named - existing_tests()


def test_every_test_named_after_a_pitfall_is_of_one_in_the_table():
    numbers = {
        int(number)
        for name in existing_tests()
        for number in re.findall(r"_p(\d\d)(?=_)", name)
    }
    assert numbers <= set(range(1, 53))

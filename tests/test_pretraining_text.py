"""The text behind nano: what is in it, how often, and what the base knows by it."""

from __future__ import annotations

import random
import re
from itertools import islice, pairwise
from math import factorial

import pytest

from rlreason import load_policy
from rlreason.bench.base import bench_base, format_base_benchmark
from rlreason.policy.nano import build_tokenizer
from rlreason.tasks import pretraining_text as module
from rlreason.tasks.gsm_mini import TEMPLATES, load_gsm_mini, make_problems
from rlreason.tasks.pretraining_text import (
    ANOTHER,
    COMPOSED,
    MIX,
    Kind,
    as_notes,
    pretraining_documents,
)
from rlreason.tasks.story_kit import PEOPLE, THINGS

PAGES = {"pages": MIX["pages"]}


def documents(count: int, seed: int | str = 0, mix=None) -> list[str]:
    return list(islice(pretraining_documents(seed, mix), count))


def test_a_seed_gives_the_same_text_and_another_seed_another():
    state = random.getstate()
    assert documents(300) == documents(300)
    assert not set(documents(300)) & set(documents(300, seed=1))
    assert random.getstate() == state


def test_documents_come_as_often_as_the_mix_says():
    def kind_of(text: str) -> str:
        if "####" in text:
            return "pages"
        if "?" not in text:
            return "drill"
        return "short" if "The answer is" in text else "notes"

    kinds = [kind_of(text) for text in documents(4000)]
    for name, kind in MIX.items():
        assert kinds.count(name) / len(kinds) == pytest.approx(kind.share, abs=0.03)


# What is kept apart


def stories(texts) -> set[str]:
    """The questions, whoever and whatever they are about: numbers name a problem."""
    found = set()
    for text in texts:
        asked = re.findall(r"Q: (.*)\nA:", text) or re.findall(r"^.*\?", text)
        for story in asked:
            found.add(re.sub("|".join([*PEOPLE, *THINGS]), "X", story))
    return found


def of_split(split: str) -> set[str]:
    knobs = {"limit": 4000, "steps": (1, 1)}
    return stories(p.question for p in load_gsm_mini(split, **knobs))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_no_problem_of_the_task_is_in_the_text(split, monkeypatch):
    mix = {"pages": MIX["pages"], "short": MIX["short"]}
    read, asked = stories(documents(4000, mix=mix)), of_split(split)
    assert len(read) > 1000 < len(asked)
    assert not read & asked
    # The wrong version: another seed of the same split, and no classes
    monkeypatch.setattr(
        module, "make_problems", lambda _, **knobs: make_problems(split, **knobs)
    )
    assert stories(documents(4000, mix=mix)) & asked


# Notes


def lines_of(problem) -> list[str]:
    """The steps as notes write them."""
    *lines, _ = problem.solution.split("\n")
    return [re.sub(r"<<(.*?)>>\d+", r"\1", line) for line in lines]


def in_order(write, *, steps: int, count: int = 2000) -> float:
    """How often the notes of a problem have its steps in the solution's order."""
    rng = random.Random(0)
    kept = 0
    for problem in islice(make_problems("pretrain", steps=(steps, steps)), count):
        notes, lines = write(problem, rng), lines_of(problem)
        assert notes.startswith(problem.question)
        told = notes.removeprefix(problem.question)
        assert sorted(told.split()) == sorted(" ".join(lines).split())
        assert "####" not in notes
        assert "answer" not in notes
        kept += told == f" {' '.join(lines)}"
    return kept / count


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_notes_hold_every_step_in_an_order_left_to_chance(steps):
    chance = 1 / factorial(steps)
    assert in_order(as_notes, steps=steps) == pytest.approx(chance, abs=0.04)

    class Still(random.Random):
        def shuffle(self, x):
            """The wrong version: the order is the solution's."""

    assert in_order(lambda p, _: as_notes(p, Still()), steps=steps, count=50) == 1


# Pages


def composed_on(pages: list[str]) -> list[list[bool]]:
    """Page by page, which problems take more than one step."""
    return [[part.count("<<") > 1 for part in page.split("\n\n")] for page in pages]


def after(pages: list[list[bool]], before: bool) -> float:
    """The share of composed problems among those that follow on one, or on another."""
    following = [b for page in pages for a, b in pairwise(page) if a == before]
    return sum(following) / len(following)


def test_a_page_ends_after_each_problem_with_the_same_chance():
    lengths = [len(page) for page in composed_on(documents(6000, mix=PAGES))]
    for n in (1, 2, 3):
        reached = [length for length in lengths if length >= n]
        ended = reached.count(n) / len(reached)
        assert ended == pytest.approx(1 - ANOTHER, abs=0.05)
    assert max(lengths) == 4
    # The wrong version, any length as likely: three pages in four go on
    assert abs(1 / 4 - (1 - ANOTHER)) > 0.05


def test_what_stands_before_says_nothing_of_the_steps_of_a_problem(monkeypatch):
    pages = composed_on(documents(15_000, mix=PAGES))
    for place in range(3):
        here = [page[place] for page in pages if len(page) > place]
        assert sum(here) / len(here) == pytest.approx(COMPOSED, abs=0.015)
    assert after(pages, True) == pytest.approx(COMPOSED, abs=0.03)
    assert after(pages, False) == pytest.approx(COMPOSED, abs=0.01)

    # The wrong version: pages of one kind, told by their first problem
    by_page = {
        "pages": Kind(1 - COMPOSED, "page", (1, 1)),
        "long": Kind(COMPOSED, "page", (2, 5)),
    }
    monkeypatch.setattr(module, "COMPOSED", 0.0)
    pages = composed_on(documents(4000, mix=by_page))
    assert after(pages, True) == 1
    assert after(pages, False) == 0


# What is shipped


@pytest.fixture(scope="module")
def nano():
    return load_policy("nano", device="cpu")


def test_the_shipped_vocabulary_is_that_of_the_text(nano):
    vocabulary = build_tokenizer().get_vocab()
    for policy in (nano, load_policy("nano-xs", device="cpu")):
        assert policy.tokenizer.get_vocab() == vocabulary


def test_every_word_of_every_template_is_one_token(nano):
    def tokens(word: str) -> int:
        return len(nano.tokenizer(word, add_special_tokens=False).input_ids)

    words = set()
    for template in TEMPLATES:
        for n in range(template.least, template.most + 1):
            knobs = {"limit": 30, "templates": [template.name], "steps": (n, n)}
            for p in load_gsm_mini("train", distractors=1.0, **knobs):
                words |= set(re.findall(r" ?[A-Za-z]+", p.question + p.solution))
    assert len(words) > 300
    assert not [word for word in words if tokens(word) != 1]
    assert tokens(" zebras") > 1  # a word that no story has falls into bytes


@pytest.mark.filterwarnings("ignore:.*were cut")  # a profile of short answers
def test_the_shipped_base_knows_the_parts_in_every_form(nano):
    rows = bench_base(nano, profile="smoke", problems=20, sampled=1)
    share = {(row["asked"], row["shots"]): row["maj@1"].mean for row in rows}
    assert share["equations", 0] >= 0.95
    for shots in (0, 1, 2):
        assert share["1 step", shots] >= 0.9
        assert 0 < share["2 steps", shots] < 0.8
    assert abs(share["2 steps", 0] - share["2 steps", 2]) <= 0.1
    head, *lines = format_base_benchmark(rows).splitlines()
    assert head.split() == ["asked", "shots", "tokens", "maj@1", "maj@K", "pass@K"]
    assert len(lines) == len(rows) + 1 == 11
    assert [len(re.findall(r"%", line)) for line in lines] == [1] * 7 + [3] * 3 + [0]

"""gsm-mini: every problem is right, reproducible, and in one split alone."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlreason.tasks.answers import is_correct, parse_solution
from rlreason.tasks.gsm_mini import (
    SHIFTED_SHAPES,
    SPLIT_CLASSES,
    TEMPLATES,
    load_gsm_mini,
    make_problems,
)
from rlreason.tasks.story_kit import LARGEST_RESULT, Draw, residue

PAIRS = [(t.name, n) for t in TEMPLATES for n in range(t.least, t.most + 1)]


def test_there_are_at_least_forty_templates_over_the_shapes_of_reasoning():
    shapes = {t.shape for t in TEMPLATES}
    assert len({t.name for t in TEMPLATES}) == len(TEMPLATES) >= 40
    assert {"chain", "comparison", "total", "rate", "change", "distractor"} <= shapes
    assert min(t.least for t in TEMPLATES) == 1
    assert max(t.most for t in TEMPLATES) == 8


@pytest.mark.parametrize(("name", "n"), PAIRS)
def test_every_template_takes_exactly_the_steps_it_is_asked_for(name, n):
    for problem in load_gsm_mini("train", limit=20, templates=[name], steps=(n, n)):
        solution = parse_solution(problem.solution)
        annotations = [a for step in solution.steps for a in step.annotations]
        assert len(annotations) == n
        assert all(annotation.valid for annotation in annotations)
        assert solution.answer == problem.answer == solution.results[-1]
        assert is_correct(problem.solution, problem.answer)
        assert 0 < int(problem.answer) <= LARGEST_RESULT


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**9),
    st.sampled_from(sorted(SPLIT_CLASSES)),
    st.integers(12, 200),
    st.floats(0, 1),
    st.booleans(),
)
def test_the_answer_follows_from_the_story_for_any_knobs(
    seed, split, largest, distractors, shifted
):
    problems = make_problems(
        split, seed=seed, largest=largest, distractors=distractors, shifted=shifted
    )
    for problem in islice(problems, 10):
        solution = parse_solution(problem.solution)
        known = [int(x) for x in re.findall(r"\d+", problem.question)]
        # Words that stand for numbers: half, twice, doubles, both ways, n hours ...
        known += list(range(1, 10))
        for step in solution.steps:
            for annotation in step.annotations:
                for operand in re.findall(r"\d+", annotation.expression):
                    assert int(operand) in known, (problem, annotation)
                known.append(int(annotation.result))
        assert is_correct(problem.solution, problem.answer)


def test_a_wrong_annotation_would_be_seen():
    problem = load_gsm_mini("train", limit=1)[0]
    broken = re.sub(r"=(\d+)>>", lambda m: f"={int(m[1]) + 1}>>", problem.solution)
    steps = parse_solution(broken).steps
    assert not any(a.valid for step in steps for a in step.annotations)


@pytest.mark.parametrize("shifted", [False, True])
def test_p46_splits_share_no_problem(shifted):
    sizes = {"limit": 4000, "shifted": shifted}
    splits = {s: load_gsm_mini(s, **sizes) for s in SPLIT_CLASSES}
    for one in splits:
        for other in splits:
            if one < other:
                a = {p.question for p in splits[one]}
                assert not a & {p.question for p in splits[other]}


def test_splits_share_no_numbers_within_a_template_even_under_other_names():
    # Names and things do not count: a problem with other names is the same problem.
    def numbers(problem):
        return tuple(re.findall(r"\d+", problem.question))

    for name in ("gains_and_losses", "bags_compared", "shopping"):
        knobs = {"limit": 1000, "templates": [name], "distractors": 0.0}
        train = {numbers(p) for p in load_gsm_mini("train", **knobs)}
        test = {numbers(p) for p in load_gsm_mini("test", **knobs)}
        shared = train & test
        # Verbs are part of the story, not of the key: gains and losses may share
        # numbers only where the signs differ.
        assert not shared or name == "gains_and_losses"


def test_splits_by_seed_alone_would_share_problems():
    # The wrong version: same generator, other seed, no residue classes.
    knobs = {
        "templates": ["doubling"],
        "distractors": 0.0,
        "limit": 20,
        "steps": (1, 2),
    }
    one = {p.question for p in load_gsm_mini("train", seed=1, **knobs)}
    other = {p.question for p in load_gsm_mini("train", seed=2, **knobs)}
    assert one & other
    assert not one & {p.question for p in load_gsm_mini("test", seed=2, **knobs)}


def test_the_same_seed_gives_the_same_problems_everywhere():
    text = "\n".join(
        f"{p.id}|{p.question}|{p.solution}|{p.answer}"
        for split in ("train", "test")
        for p in load_gsm_mini(split, limit=500, seed=7, steps=(1, 8))
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "077319c07c50f3a0"


def test_problems_neither_use_nor_move_the_global_generator():
    random.seed(3)
    before = random.getstate()
    load_gsm_mini("train", limit=50)
    assert random.getstate() == before


def test_a_longer_list_begins_with_the_shorter_one():
    assert load_gsm_mini("train", limit=300)[:100] == load_gsm_mini("train", limit=100)


def test_no_question_and_no_id_comes_twice():
    problems = load_gsm_mini("train", limit=5000)
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == 5000


def test_most_problems_admit_several_sequences_of_operations():
    # Commuting a sum or product does not count as another sequence here.
    problems = load_gsm_mini("train", limit=1000)
    several = [p for p in problems if another_sequence(p) is not None]
    assert len(several) / len(problems) > 0.5
    for problem in several:
        *_, (_, _, _, result) = another_sequence(problem)
        assert result == int(problem.answer)


def another_sequence(problem):
    """A right sequence of steps other than the reference's, None if none is found."""
    steps = [
        (int(a), op, int(b), int(r))
        for a, op, b, r in re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", problem.solution)
    ]
    for i, ((a, op, b, r), (c, op2, d, r2)) in enumerate(pairwise(steps)):
        before, after = steps[:i], steps[i + 2 :]
        if r not in (c, d):  # two steps that do not need each other
            return [*before, (c, op2, d, r2), (a, op, b, r), *after]
        if d == r and op2 in "+*":
            c, d = d, c
        if c != r or (op, b) == (op2, d):
            continue
        if {op, op2} <= {"+", "-"} or op == op2 == "*":  # (a+b)-d is (a-d)+b
            first = a + d if op2 == "+" else a - d if op2 == "-" else a * d
            if first > 0:
                return [*before, (a, op2, d, first), (first, op, b, r2), *after]
    return None


def test_last_aims_at_the_wanted_split():
    for start in range(200):
        draw = Draw(random.Random(start), SPLIT_CLASSES["test"], 20)
        draw.num(2, 20)
        draw.last(2, 40)
        assert residue(draw.key) in SPLIT_CLASSES["test"]


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"split": "dev"}, "train"),
        ({"steps": (0, 3)}, "1 to 8"),
        ({"steps": (3, 9)}, "1 to 8"),
        ({"largest": 5}, "12 to 200"),
        ({"distractors": 1.5}, "0 to 1"),
        ({"templates": ["nope"]}, "gains_and_losses"),
        ({"templates": ["bags_compared"], "steps": (1, 2)}, "no template"),
    ],
)
def test_a_wrong_knob_names_the_right_ones(knobs, says):
    with pytest.raises(ValueError, match=says):
        next(make_problems(**knobs))


def test_running_out_of_problems_is_an_error_not_a_hang():
    problems = make_problems(templates=["doubling"], steps=(1, 1), distractors=0.0)
    with pytest.raises(ValueError, match="different problems"):
        list(islice(problems, 5000))


def test_a_split_without_any_problem_is_an_error_not_a_hang():
    knobs = {"templates": ["doubling"], "steps": (3, 3), "largest": 12}
    with pytest.raises(ValueError, match="no more than 0 different problems"):
        load_gsm_mini("validation", limit=1, **knobs)


def test_of_four_steps_two_stories_can_be_told_shifted_and_none_of_five():
    """What chapter 16 says of the shifted task, whose steps are the profile's."""
    shapes = [t for t in TEMPLATES if t.shape in SHIFTED_SHAPES]
    most = sorted(t.most for t in shapes)
    assert (len(shapes), sum(m >= 3 for m in most), most[-3:]) == (10, 8, [3, 4, 4])
    problems = islice(make_problems(shifted=True, steps=(3, 5)), 200)
    counts = Counter(p.solution.count("<<") for p in problems)
    assert set(counts) == {3, 4}
    assert 0.4 < counts[4] / 200 < 0.6


def test_distractors_are_told_but_not_used():
    plain = load_gsm_mini("train", limit=400, distractors=0.0)
    told = load_gsm_mini("train", limit=400, distractors=1.0)
    count = [sum(p.question.count(".") for p in ps) for ps in (plain, told)]
    assert count[1] > count[0] + 300

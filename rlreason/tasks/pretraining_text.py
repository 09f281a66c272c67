"""The procedurally made text on which nano is pretrained.

It plays the part of the web text behind a real base model: it holds the parts of
reasoning far more often than whole worked problems. ``MIX`` says how often each kind of
document comes, of how many steps its problems are, and how they are written:

- *drill*: equations alone, with the operands that stories lead to;
- *prose*: a story worked in plain prose (no ``<<``, no ``####``);
- *notes*: a story with the steps of its solution in no order, and no answer;
- *page*: problems in the task's own format, one after the other, from which a prompt
  with solved examples works at all.

Problems come from the "pretrain" split of the generator, which shares no problem with
the task's splits. One document in thirty spells a made-up name, so that the tokenizer's
byte tokens are trained.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlreason.tasks.gsm_mini import make_problems
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt, format_response
from rlreason.tasks.story_kit import PEOPLE


@dataclass(frozen=True)
class Kind:
    """A kind of document.

    Attributes:
        share: How many of all documents are of it (not of tokens).
        form: "drill", "prose", "notes" or "page": see above.
        steps: Least and most steps of its problems.
    """

    share: float
    form: str
    steps: tuple[int, int]


MIX = {
    "drill": Kind(0.20, "drill", (2, 5)),
    "short": Kind(0.20, "prose", (1, 1)),
    "notes": Kind(0.40, "notes", (2, 5)),
    "pages": Kind(0.20, "page", (1, 1)),
}
COMPOSED = 0.03
"""Share of the problems of a page that have 2 to 5 steps, whatever the others have."""
ANOTHER = 0.35
"""Chance that a page goes on with another problem, up to four."""

_ANNOTATION = re.compile(r"<<([^=<>]+)=([^<>]+)>>")


def _in_words(line: str) -> str:
    """``Ann has <<5+3=8>>8 apples.`` becomes ``Ann has 5+3=8 apples.``"""
    return re.sub(r"<<([^<>]+)>>\d+", r"\1", line)


def in_prose(problem: Problem) -> str:
    """A problem and its solution as plain text: another format than the task's."""
    *lines, _ = problem.solution.split("\n")
    worked = " ".join(map(_in_words, lines))
    return f"{problem.question} {worked} The answer is {problem.answer}."


def as_notes(problem: Problem, rng: random.Random) -> str:
    """A problem with its steps in no order: what is said, not how it is solved."""
    *lines, _ = problem.solution.split("\n")
    rng.shuffle(lines)
    return f"{problem.question} {' '.join(map(_in_words, lines))}"


def as_page(problems: list[Problem]) -> str:
    """Problems in the task's format, one after the other."""
    *shots, last = problems
    return format_prompt(last, shots=shots) + format_response(last.solution)


def drill(problem: Problem, rng: random.Random) -> str:
    """A problem's equations without its story, in random order, with a few more."""
    equations = [f"{a}={b}" for a, b in _ANNOTATION.findall(problem.solution)]
    for _ in range(3):
        a, b = rng.randint(1, 120), rng.randint(1, 60)
        equations.append(f"{a}+{b}={a + b}" if rng.random() < 0.5 else _minus(a, b))
        a, b = rng.randint(2, 30), rng.randint(2, 12)
        equations.append(
            f"{a}*{b}={a * b}" if rng.random() < 0.5 else f"{a * b}/{b}={a}"
        )
    rng.shuffle(equations)
    return " ".join(equations)


def _minus(a: int, b: int) -> str:
    return f"{a + b}-{a}={b}"


def pretraining_documents(
    seed: int | str, mix: Mapping[str, Kind] | None = None
) -> Iterator[str]:
    """Yield documents without end, the same for the same seed and mix."""
    mix = mix or MIX
    rng = random.Random(f"nano/{seed}")
    ranges = sorted({(2, 5), *(kind.steps for kind in mix.values())})
    sources = {steps: _problems(seed, steps, rng) for steps in ranges}
    kinds, weights = list(mix.values()), [kind.share for kind in mix.values()]
    while True:
        kind = rng.choices(kinds, weights)[0]
        if kind.form == "page":
            count = 1
            while count < 4 and rng.random() < ANOTHER:
                count += 1
            chosen = [
                (2, 5) if rng.random() < COMPOSED else kind.steps for _ in range(count)
            ]
            text = as_page([next(sources[steps]) for steps in chosen])
        elif kind.form == "prose":
            text = in_prose(next(sources[kind.steps]))
        else:
            write = {"drill": drill, "notes": as_notes}[kind.form]
            text = write(next(sources[kind.steps]), rng)
        if rng.random() < 1 / 30:
            text = _rename(text, rng)
        yield text


def _problems(seed, steps, rng) -> Iterator[Problem]:
    """Mostly gsm-mini, sometimes its shifted variant, some with larger numbers."""
    makers = [
        make_problems("pretrain", seed=f"{seed}/{i}", steps=steps, largest=largest)
        for i, largest in enumerate((20, 30, 60))
    ]
    if steps[0] < 3:
        least, most = steps
        shifted = make_problems(
            "pretrain", seed=seed, steps=(least, min(3, most)), shifted=True
        )
        makers.append(shifted)
    weights = [6, 2, 1, 1][: len(makers)]
    while True:
        yield next(rng.choices(makers, weights)[0])


def _rename(text: str, rng: random.Random) -> str:
    """Replace one known name by made-up letters."""
    present = [name for name in PEOPLE if name in text]
    if not present:
        return text
    letters = "abcdefghijklmnopqrstuvwxyz"
    made_up = "".join(rng.choice(letters) for _ in range(rng.randint(3, 6)))
    return text.replace(rng.choice(present), made_up.capitalize())

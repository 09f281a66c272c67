"""The procedurally made text on which nano is pretrained.

It plays the part of the web text behind a real base model: it holds the parts of
reasoning (sums, reading a short story) far more often than whole worked problems, and
it rarely looks like the task. Six kinds of documents, in ``MIX``:

- *drill*: equations alone, with the operands that stories lead to;
- *short*: stories of one or two steps, worked in plain prose (no ``<<``, no ``####``);
- *long*: the same with three to six steps, rare;
- *annotated*: one short problem in the task's own format, rarer still;
- *pages*: two or three short problems of the task's format on one page, from which a
  few-shot prompt works at all;
- *long pages*: the same with up to five steps, the rarest.

Problems come from the "pretrain" split of the generator, which shares no problem with
the task's splits. One document in thirty spells a made-up name, so that the tokenizer's
byte tokens are trained.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from rlreason.tasks.gsm_mini import make_problems
from rlreason.tasks.problem import Problem
from rlreason.tasks.prompts import format_prompt, format_response
from rlreason.tasks.story_kit import PEOPLE

MIX = {
    "drill": 0.22,
    "short": 0.58,
    "long": 0.08,
    "annotated": 0.05,
    "pages": 0.06,
    "long pages": 0.01,
}
"""Share of each kind of document (not of tokens)."""

_ANNOTATION = re.compile(r"<<([^=<>]+)=([^<>]+)>>")


def in_prose(problem: Problem) -> str:
    """A problem and its solution as plain text: another format than the task's."""
    *lines, _ = problem.solution.split("\n")
    # "Ann has <<5+3=8>>8 apples." becomes "Ann has 5+3=8 apples."
    worked = " ".join(re.sub(r"<<([^<>]+)>>\d+", r"\1", line) for line in lines)
    return f"{problem.question} {worked} The answer is {problem.answer}."


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


def pretraining_documents(seed: int | str) -> Iterator[str]:
    """Yield documents without end, the same for the same seed."""
    rng = random.Random(f"nano/{seed}")
    short = _problems(seed, (1, 2), rng)
    long = _problems(seed, (3, 6), rng)
    middle = _problems(seed, (2, 5), rng)
    kinds, weights = list(MIX), list(MIX.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        if kind == "drill":
            text = drill(next(middle), rng)
        elif kind == "short":
            text = in_prose(next(short))
        elif kind == "long":
            text = in_prose(next(long))
        elif kind == "annotated":
            text = as_page([next(short)])
        else:
            source = short if kind == "pages" else middle
            text = as_page([next(source) for _ in range(rng.randint(2, 3))])
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
        shifted = make_problems("pretrain", seed=seed, steps=(1, 3), shifted=True)
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

"""``gsm-mini``: word problems in GSM8K's own format, made from seeded templates.

A template draws numbers, tells a story, and writes its reasoning graph: each step is
one operation on numbers of the story or on results of earlier steps. The engine turns
the graph into a solution, so every annotation is right and the answer follows from it:

1. *Draw*: names, things and numbers come from one seeded stream.
2. *Tell*: the template returns the sentences and the question.
3. *Order*: any order that respects the graph is a right solution; one is drawn, and
   sums and products are commuted at random. Most problems admit several.
4. *Split*: a hash of (template, numbers) names the only split a problem may be in.

Knobs: ``steps`` (1 to 8), ``largest`` (size of the numbers), ``distractors`` (chance of
a sentence that is not needed), ``templates`` (a subset by name). ``shifted=True`` gives
``svamp-mini``, which stands to ``gsm-mini`` as SVAMP stands to GSM8K: one to three
steps unless ``steps`` says otherwise, an unknown that is not the last quantity of the
story, always a distractor. Ten stories can be told so, of three steps and more eight,
and of four steps two.

The stories are in ``stories``, what they are made with in ``story_kit``.

Left out against GSM8K: percentages, decimals, negative answers, free language.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

from rlreason.tasks.problem import Problem
from rlreason.tasks.stories import TEMPLATES
from rlreason.tasks.story_kit import COLORS, Draw, Graph, Redraw, residue

SPLIT_CLASSES = {
    "test": (0,), "validation": (1,), "pretrain": (2, 3), "train": (4, 5, 6, 7)
}  # fmt: skip
"""Residues of the problem's hash modulo 8 that belong to each split."""

MAX_STEPS = 8
DEFAULT_STEPS = (2, 5)
SHIFTED_STEPS = (1, 3)
SHIFTED_SHAPES = ("reversed", "distractor")


def _distractor(d: Draw) -> str:
    """A true sentence with a number that no question asks for."""
    x = 2 + d.below(d.big)
    kind = d.below(4)
    if kind == 0:
        return f"{d.person()} is {x} years old."
    if kind == 1:
        return f"A shop sells {d.thing()} for ${x} each."
    if kind == 2:
        return f"There are {x} {d.pick(COLORS)} cars in the street."
    return f"It rains for {x} minutes."


def _ordered(steps: list, d: Draw) -> list:
    """A random order in which every step stands after the steps it uses."""
    order, waiting, done = [], list(steps), set()
    while waiting:
        ready = [
            s
            for s in waiting
            if (type(s[0]) is int or s[0].step in done)
            and (type(s[2]) is int or s[2].step in done)
        ]
        step = ready[0] if len(ready) == 1 else d.pick(ready)
        order.append(step)
        waiting.remove(step)
        done.add(step[3].step)
    return order


def _lines(graph: Graph, d: Draw) -> str:
    """The graph as a solution in GSM8K's format."""
    steps = graph.steps
    answer = steps[-1][3]
    # Most graphs are chains with one order; only branching ones are shuffled. The
    # step that answers the question uses all others, so it always comes last.
    if any(type(s[0]) is int and type(s[2]) is int and s[3].step > 0 for s in steps):
        steps = _ordered(steps, d)
    lines = []
    for a, op, b, result, sentence in steps:
        if op in "+*" and d.coin():
            a, b = b, a
        lines.append(sentence % f"<<{a:d}{op}{b:d}={result:d}>>{result:d}")
    lines.append(f"#### {answer:d}")
    return "\n".join(lines)


def make_problems(
    split: str = "train",
    *,
    seed: int = 0,
    shifted: bool = False,
    steps: tuple[int, int] | None = None,
    largest: int = 20,
    distractors: float | None = None,
    templates: Sequence[str] | None = None,
) -> Iterator[Problem]:
    """Yield problems without end: the same ones for the same arguments, everywhere.

    Args:
        split: "train", "validation", "test", or "pretrain" (nano's own, kept apart).
        seed: Seed of the stream; splits share no problem whatever the seeds.
        shifted: The shifted variant, ``svamp-mini``.
        steps: Least and most number of reasoning steps, within 1 to 8.
        largest: About the largest number of a story, at least 12.
        distractors: Chance of one needless sentence, 0 to 1.
        templates: Names of the templates to use; all by default.

    Raises:
        ValueError: a knob is out of range; the message names the range.
    """
    chosen, (least, most), distractors = _check_knobs(
        split, shifted, steps, largest, distractors, templates
    )
    by_steps = {
        n: [t for t in chosen if t.least <= n <= t.most] for n in range(least, most + 1)
    }
    counts = [n for n, ts in by_steps.items() if ts]
    name = "svamp-mini" if shifted else "gsm-mini"
    rng = random.Random(f"{name}/{split}/{seed}")
    draw = Draw(rng, SPLIT_CLASSES[split], largest)
    salt = {t.name: sum(t.name.encode()) * 7919 + len(t.name) for t in chosen}
    seen: set[str] = set()
    lost = stale = 0  # draws in a row without a story of the split; without a new one
    while True:
        if max(lost, stale) > 10_000:
            raise ValueError(
                f"{name} holds no more than {len(seen)} different problems for "
                f"these knobs; widen steps, largest or templates"
            )
        lost += 1
        n = draw.pick(counts)
        kind = draw.pick(by_steps[n])
        draw.key = salt[kind.name]
        graph = Graph()
        try:
            told = kind.tell(draw, graph, n)
        except Redraw:
            continue
        if residue(draw.key) not in draw.classes:
            continue
        lost = 0
        if distractors and draw.coin(distractors):
            told.insert(draw.below(len(told)), _distractor(draw))
        question = " ".join(told)
        if question in seen:
            stale += 1
            continue
        stale = 0
        seen.add(question)
        solution = _lines(graph, draw)
        yield Problem(
            f"{name}/{split}/{seed}-{len(seen) - 1}",
            question,
            solution,
            solution.rpartition(" ")[2],
        )


def _check_knobs(split, shifted, steps, largest, distractors, templates):
    if split not in SPLIT_CLASSES:
        raise ValueError(f"unknown split {split!r}; use one of {sorted(SPLIT_CLASSES)}")
    if steps is None:
        steps = SHIFTED_STEPS if shifted else DEFAULT_STEPS
    whole = isinstance(steps, (list, tuple)) and all(type(n) is int for n in steps)
    if not whole or len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= MAX_STEPS:
        raise ValueError(
            f"steps={steps!r} must be two whole numbers within 1 to {MAX_STEPS}, low "
            "first"
        )
    least, most = steps
    if type(largest) is not int or not 12 <= largest <= 200:
        raise ValueError(f"largest={largest!r} must be a whole number, 12 to 200")
    if distractors is None:
        distractors = 1.0 if shifted else 0.15
    if not isinstance(distractors, (int, float)) or not 0 <= distractors <= 1:
        raise ValueError(f"distractors={distractors!r} is a chance, 0 to 1")
    if not (templates is None or isinstance(templates, (list, tuple))):
        raise ValueError(f"templates={templates!r} must be a list of names")
    names = {t.name for t in TEMPLATES}
    if templates is not None and not set(map(str, templates)) <= names:
        unknown = sorted(set(map(str, templates)) - names)
        raise ValueError(f"unknown templates {unknown}; there are {sorted(names)}")
    chosen = [
        t
        for t in TEMPLATES
        if (templates is None or t.name in templates)
        and (not shifted or t.shape in SHIFTED_SHAPES)
        and t.least <= most
        and t.most >= least
    ]
    if not chosen:
        raise ValueError(f"no template has {least} to {most} steps with these knobs")
    return chosen, (least, most), distractors


def load_gsm_mini(
    split: str = "train", *, limit: int | None = None, shifted: bool = False, **knobs
) -> list[Problem]:
    """The first ``limit`` problems of a split (1,000 by default); knobs as above."""
    return list(
        islice(
            make_problems(split, shifted=shifted, **knobs),
            1000 if limit is None else limit,
        )
    )

"""What the stories of ``gsm-mini`` are made with: words, random draws, a graph.

A template draws from one :class:`Draw`, writes its steps into one :class:`Graph`, and
raises :class:`Redraw` where the numbers do not fit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LARGEST_RESULT = 999

# Adding a word here makes it one token of nano only after `rlreason train nano`.
WOMEN = [
    "Ann", "Beth", "Cara", "Dora", "Emma", "Fay", "Gina", "Hana", "Iris", "Jane",
    "Kate", "Lily",
]  # fmt: skip
MEN = [
    "Adam", "Ben", "Carl", "Dan", "Eric", "Fred", "Greg", "Hugo", "Ivan", "Jack",
    "Karl", "Leo",
]  # fmt: skip
PEOPLE = WOMEN + MEN
THINGS = [
    "apples", "pears", "plums", "lemons", "eggs", "cookies", "muffins", "cakes", "pens",
    "pencils", "books", "cards", "stamps", "stickers", "marbles", "beads", "buttons",
    "coins", "shells", "stones", "toys", "balls", "cups", "candles", "flowers", "roses",
]  # fmt: skip
COLORS = ["red", "blue", "green", "white", "black", "yellow"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
GAINS = ["buys", "finds", "gets", "wins", "picks"]
LOSSES = ["sells", "loses", "gives away", "breaks", "drops"]
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}


class Redraw(Exception):  # noqa: N818 - a signal, not an error
    """A template's numbers did not fit; the engine draws again."""


class Value(int):
    """A result: an integer that remembers which step of the graph made it."""

    step: int


class Graph:
    """The reasoning graph of one problem, written by its template step by step.

    ``graph(a, "+", b, "Ann has %s apples.")`` adds a step and returns its result.
    Operands are numbers of the story (``int``) or earlier results (``Value``).
    """

    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps: list[tuple[int, str, int, Value, str]] = []

    def __call__(self, a: int, op: str, b: int, sentence: str) -> Value:
        if op == "+":
            number = a + b
        elif op == "-":
            number = a - b
        elif op == "*":
            number = a * b
        else:
            number, rest = divmod(a, b)
            if rest:
                raise Redraw
        if not 0 < number <= LARGEST_RESULT:
            raise Redraw
        result = Value(number)
        result.step = len(self.steps)
        self.steps.append((a, op, b, result, sentence))
        return result


class Draw:
    """The random choices of one problem; numbers also decide its split.

    ``key`` is a rolling hash of the template and every number drawn so far. ``last``
    draws a number that leads into one of the wanted residue classes, so that making a
    test problem costs no more than making a training problem.
    """

    __slots__ = ("_random", "big", "classes", "key", "small")

    def __init__(self, rng: random.Random, classes: Sequence[int], largest: int):
        self._random = rng.random
        self.classes = frozenset(classes)
        self.big = largest
        self.small = max(5, min(9, largest // 3))
        self.key = 0

    def below(self, n: int) -> int:
        """An index below ``n`` that does not enter the key."""
        return int(self._random() * n)

    def pick(self, options: Sequence):
        return options[int(self._random() * len(options))]

    def coin(self, chance: float = 0.5) -> bool:
        return self._random() < chance

    def num(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""
        number = low + int(self._random() * (max(high, low) - low + 1))
        self.key = (self.key * 31 + number + 1) & 0xFFFFFFFF
        return number

    def last(self, low: int, high: int) -> int:
        """As ``num``, for a template's last number: aims at the wanted split."""
        span = max(high, low) - low + 1
        start = int(self._random() * span)
        base = self.key * 31 + 1 + low
        for shift in range(span):
            offset = (start + shift) % span
            key = (base + offset) & 0xFFFFFFFF
            if residue(key) in self.classes:
                break
        self.key = key
        return low + offset

    def person(self) -> str:
        return self.pick(PEOPLE)

    def people(self, n: int) -> list[str]:
        """``n`` different names."""
        start, stride = self.below(24), self.pick((1, 5, 7, 11, 13))
        return [PEOPLE[(start + i * stride) % 24] for i in range(n)]

    def thing(self) -> str:
        return self.pick(THINGS)

    def things(self, n: int) -> list[str]:
        start, stride = self.below(26), self.pick((1, 3, 5, 7, 9))
        return [THINGS[(start + i * stride) % 26] for i in range(n)]


def residue(key: int) -> int:
    """Residue class, 0 to 7, of a 32-bit key (Fibonacci hashing)."""
    return ((key * 2654435761) & 0xFFFFFFFF) >> 29


@dataclass(frozen=True, slots=True)
class Template:
    """A kind of story: how many steps it can take, and the function that tells it."""

    name: str
    shape: str
    least: int
    most: int
    tell: Callable[[Draw, Graph, int], list[str]]


TEMPLATES: list[Template] = []


def template(shape: str, least: int, most: int | None = None):
    """Register ``tell(draw, graph, n)``, which returns the question's sentences."""

    def register(tell):
        TEMPLATES.append(Template(tell.__name__, shape, least, most or least, tell))
        return tell

    return register


def she(name: str) -> str:
    return "She" if name in WOMEN else "He"

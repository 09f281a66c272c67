r"""Reading a solution: its final answer, its steps, the arithmetic that it claims.

A solution is text in GSM8K's format, written by a person or by a policy:

    Natalia sold 48/2 = <<48/2=24>>24 clips in May.
    Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
    #### 72

**Answers are numbers, not strings.** ``72``, ``72.0``, ``$72.``, ``\boxed{72}`` and
``144/2`` are one answer, and :func:`canonical_number` gives each of them the one name
``"72"``: see :mod:`rlreason.tasks.numerals`.

**An answer counts only where it is stated**, on a ``####`` line. There is no
falling back to the last number of the text: that would pay a policy for stopping
in the middle of its work. What follows the number is its unit and is dropped, and
percent is a unit, as in GSM8K: ``50%`` answers 50, ``$5 million`` answers 5. An
equation answers its worked-out side: ``14 = 7 * 2`` is 14. A solution that claims two
different numbers (two ``####`` lines, or ``42 or 43`` on one) has not decided, and
states none. Four signs also begin a heading in Markdown: beside a line that states a
number, ``#### Step 1`` and ``#### 1. The cost`` claim nothing.

**Arithmetic** is what stands between ``<<`` and ``>>``. It is read by a small
recursive-descent parser: the text comes from a model and is never given to
``eval``. Inside arithmetic a percent sign divides by 100, or ``20%*50`` would be
1000.

Left out against GSM8K's own tools: the calculator that types results into a sample
while it is being written. Here it is the policy that has to get them right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from rlreason.tasks.numerals import (
    DASHES,
    DECIMAL,
    NUMBER,
    canonical_number,
    decimal_places,
    name_of,
    number_alone,
    plain,
    value_of,
)

MAX_EXPRESSION = 200  # characters
MAX_DEPTH = 16  # of nested parentheses

_LETTER = r"[^\W\d_]"
# A mark, and what is behind it on its line before the next one
_MARK = re.compile(r"#{4,}([^#\n]*(?:#{1,3}(?!#)[^#\n]*)*)")
_ANNOTATION = re.compile(r"<<([^<>\n]*)>>")

# Headings: "Step 1: ...", "1. The cost", and any words that state no number
_LABEL = re.compile(
    r"[*_\s]*(?:step|part|stage|phase|section|example|method|case)\s*"
    r"[0-9]{1,3}(?![0-9]|\.[0-9])\s*[.:)-]?",
    re.IGNORECASE,
)
_HEADING = re.compile(rf"[*_\s]*(?:[0-9]{{1,2}}[.)]\s+[*_]*)?{_LETTER}")
_CONCLUDES = re.compile(
    r"\b(?:answer|result|so|thus|hence|therefore|is|are|equals)\b"
    r"|[:=][\s*_]*[-$]*\.?[0-9]",
    re.IGNORECASE,
)

# What ends the text between two numbers that are alternatives, or parts of one thing.
_ALTERNATIVE = re.compile(rf"(?:^|[,;&|]|(?<!{_LETTER})(?:or|and))$")
_OPERATOR = re.compile(rf"(?:[-+*/]|(?<!{_LETTER})(?:times|plus|minus|of|by|[xX]))$")
_JOINT = re.compile(
    rf"(?:[-+*/,;&|]|(?<!{_LETTER})(?:or|and|to|times|plus|minus|[xX]))$"
)
_ASIDE = re.compile(rf"{_LETTER}|[(\[]")

# ----------------------------------------------------------------------------------
# Final answers


def extract_answer(text: str) -> str | None:
    """The number that a solution states as its final answer, by its canonical name.

    None where no ``####`` line states a number, or where they state different ones.
    Time is linear in the length of the text.

    >>> extract_answer("48 + 24 = 72 clips\\n#### $72.00 in all")
    '72'
    >>> extract_answer("#### 72\\n#### 73") is None
    True
    """
    return _final_answer(text)[0]


def is_correct(text: str, answer: str) -> bool:
    """Whether the solution ``text`` states the number ``answer``, and no other.

    Raises:
        ValueError: ``answer``, the gold one, is not a number. A wrong label would
            otherwise pass for a wrong solution.
    """
    gold = canonical_number(answer)
    if gold is None:
        raise ValueError(f"the gold answer {answer!r} is not a number")
    return extract_answer(text) == gold


def _final_answer(text: str) -> tuple[str | None, int]:
    """The answer that a solution states, and where its work ends: at the mark."""
    stated: set[Fraction | None] = set()
    headed: set[Fraction | None] = set()
    ends = []
    for match in _MARK.finditer(text):
        ends.append(match.start())
        line = plain(_ANNOTATION.sub("", match[1]).strip())
        label = _LABEL.match(line)
        if label or (_HEADING.match(line) and not _CONCLUDES.search(line)):
            headed |= _claims(line[label.end() :] if label else line)
            continue
        claims = _claims(line)
        if claims and not stated:
            ends[0] = match.start()
        stated |= claims
        if len(stated) > 1:
            return None, ends[0]
    claims = stated or headed
    answer = claims.pop() if len(claims) == 1 else None
    end = ends[0] if ends else len(text)
    return (None if answer is None else name_of(answer)), end


def _claims(line: str) -> set[Fraction | None]:
    """The numbers that the rest of a ``####`` line claims; none if it holds none.

    One number is a claim. More than one are where the line does not say which of
    them it means, and None stands for a number that cannot be read. Sides of an
    equation that are still to be worked out claim nothing beside one that is.
    """
    if alone := number_alone(line):
        return {value_of(alone)}
    claims: set[Fraction | None] = set()
    sides, works = line.split("="), 0
    for side in sides:
        numbers = list(NUMBER.finditer(side))
        gaps = [side[a.end() : b.start()] for a, b in pairwise(numbers)]
        if len(sides) > 1 and _is_work(gaps):
            works += 1
        elif numbers:
            claims |= _side_claims(side[: numbers[0].start()], numbers, gaps)
    return claims or ({None} if works else set())


def _side_claims(
    before: str, numbers: list[re.Match[str]], gaps: list[str]
) -> set[Fraction | None]:
    """The claims of numbers, with what is written before and between them."""
    if not re.search(_LETTER, before):
        # In "42 apples in 3 boxes" the first number is the claim.
        gaps = gaps[:1]
        numbers = numbers[: 2 if gaps and _competes(gaps[0]) else 1]
    # Else "The answer is 42" is plain; in "2 times 21 is 42" any number may be meant.
    claims = {value_of(number) for number in numbers}
    if any(_competes(gap) and not _is_alternative(gap) for gap in gaps):
        claims.add(None)  # 7 + 7 does not claim 7
    return claims


def _competes(gap: str) -> bool:
    """Whether the number behind ``gap`` is claimed as much as the one before it.

    It is in ``42 or 43``, ``42, 43``, ``40-42``, ``40 + 2`` and ``2:30``. It is not
    in ``42 apples in 3 boxes`` and ``42 (40 + 2)``, where it says something else.
    """
    gap = gap.strip(" \t$")
    return bool(_JOINT.search(gap)) or not _ASIDE.search(gap)


def _is_alternative(gap: str) -> bool:
    """Whether ``gap`` lists two numbers: each of ``42, 42`` is one, ``5,5`` is none."""
    return gap != "," and bool(_ALTERNATIVE.search(gap.strip(" \t$")))


def _is_work(gaps: list[str]) -> bool:
    """Whether the numbers around ``gaps`` are operands, and nothing besides."""
    operators = [bool(_OPERATOR.search(gap.strip(" \t$()[]"))) for gap in gaps]
    return any(operators) and not any(
        _competes(gap)
        for gap, operator in zip(gaps, operators, strict=True)
        if not operator
    )


# ----------------------------------------------------------------------------------
# Arithmetic

_TOKEN = re.compile(rf"\s*(?:(?P<number>{DECIMAL})|(?P<symbol>//|[-+*/()%]))")
_SYMBOLS = DASHES | str.maketrans(
    {"x": "*", "X": "*", "\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/"}
)


def evaluate_expression(expression: str) -> Fraction:
    """The exact value of an arithmetic expression.

    Grammar, with the usual precedence, left to right. ``//`` rounds down, ``%``
    behind a number divides it by 100, and ``x`` is times, as are the signs of
    school arithmetic:

        sum     = product (("+" | "-") product)*
        product = factor (("*" | "/" | "//") factor)*
        factor  = ("+" | "-")* (number | "(" sum ")") "%"*

    Raises:
        ValueError: The text is none of this, divides by zero, is longer than
            ``MAX_EXPRESSION`` or nested deeper than ``MAX_DEPTH``. Nothing else is
            raised, whatever the text.
    """
    return _Evaluation(_tokens(expression)).value


def _tokens(expression: str) -> list[str]:
    """Numbers (by their canonical names) and symbols of an expression, in order."""
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression of {len(expression)} characters is too long")
    text = expression.translate(_SYMBOLS).rstrip()
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"{text[position:]!r} in {expression!r} is no arithmetic")
        number = match["number"]
        tokens.append(
            name_of(Fraction(number.replace(",", ""))) if number else match["symbol"]
        )
        position = match.end()
    return tokens


class _Evaluation:
    """One pass over the tokens of an expression; each method reads one grammar rule."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.position = 0
        self.value = self.sum(depth=0)
        if self.position < len(tokens):
            raise ValueError(f"{tokens[self.position]!r} is out of place")

    def take(self, *wanted: str) -> str | None:
        """The next token if it is one of ``wanted``; then it is used up."""
        if self.position < len(self.tokens) and self.tokens[self.position] in wanted:
            self.position += 1
            return self.tokens[self.position - 1]
        return None

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while symbol := self.take("+", "-"):
            term = self.product(depth)
            value = value + term if symbol == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while symbol := self.take("*", "/", "//"):
            factor = self.factor(depth)
            if symbol == "*":
                value *= factor
            elif factor == 0:
                raise ValueError("division by zero")
            else:
                value = value / factor if symbol == "/" else Fraction(value // factor)
        return value

    def factor(self, depth: int) -> Fraction:
        sign = 1
        while symbol := self.take("+", "-"):
            sign = -sign if symbol == "-" else sign
        if self.take("("):
            if depth == MAX_DEPTH:
                raise ValueError(f"more than {MAX_DEPTH} nested parentheses")
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise ValueError("a parenthesis is not closed")
        else:
            value = self.number()
        while self.take("%"):
            value /= 100
        return sign * value

    def number(self) -> Fraction:
        token = self.tokens[self.position] if self.position < len(self.tokens) else ""
        if not token[:1].isdigit():
            raise ValueError(f"a number is missing before {token!r}")
        self.position += 1
        return Fraction(token)


# ----------------------------------------------------------------------------------
# Solutions


@dataclass(frozen=True, slots=True)
class Annotation:
    """What stands between ``<<`` and ``>>``: a piece of arithmetic and its result.

    Attributes:
        expression: Left of the ``=``, without spaces, numbers by their canonical
            names: ``"48/2"``. Text that is no arithmetic stands as it is.
        result: Right of the ``=``, a canonical number: ``"24"``. Likewise.
        valid: The result is the value of the expression. Equality is exact (each of
            GSM8K's 27,998 annotations meets it). Only for a value without a finite
            decimal expansion may the result be rounded, to two or more decimals:
            ``10/3=3.33`` is valid, ``10/3=3``, ``10/3=3.3`` and ``5/2=3`` are not.
    """

    expression: str
    result: str
    valid: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a solution, as written, with the annotations in it."""

    text: str
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True, slots=True)
class Solution:
    """A solution, parsed.

    Attributes:
        steps: The lines before the answer's ``####``, without headings and empty ones.
        operations: The expressions of all annotations, in order.
        results: Their results, one for each operation: the intermediate results.
        answer: The final answer as :func:`extract_answer` reads it.
    """

    steps: tuple[Step, ...]
    operations: tuple[str, ...]
    results: tuple[str, ...]
    answer: str | None


def parse_solution(text: str) -> Solution:
    """Steps, operations, intermediate results and final answer of a solution."""
    answer, end = _final_answer(text)
    steps = tuple(
        Step(line.strip(), tuple(map(_annotation, _ANNOTATION.findall(line))))
        for line in text[:end].split("\n")
        if line.strip() and not line.lstrip().startswith("####")
    )
    annotations = [note for step in steps for note in step.annotations]
    return Solution(
        steps=steps,
        operations=tuple(note.expression for note in annotations),
        results=tuple(note.result for note in annotations),
        answer=answer,
    )


def operation_key(text: str) -> tuple[str, ...]:
    """What makes a solution the same as another: its arithmetic, in order.

    Two solutions with one key do the same operations on the same numbers, however
    they are worded; the paper counts them as one. A solution that annotates nothing
    is known by its lines instead (spaces aside), so that two different texts are
    not taken for one because neither shows its arithmetic.
    """
    solution = parse_solution(text)
    if solution.operations:
        return solution.operations
    return tuple(" ".join(step.text.split()) for step in solution.steps)


def _annotation(content: str) -> Annotation:
    """Parse what stands between ``<<`` and ``>>``."""
    expression, _, result = content.partition("=")
    try:
        tokens = _tokens(expression)
        value = _Evaluation(tokens).value
        stated, decimals = _result(result)
    except ValueError:
        return Annotation("".join(expression.split()), "".join(result.split()), False)
    valid = stated == value
    if not valid and decimal_places(value) is None and decimals >= 2:
        # A calculator's sixteenth digit is noise; nine of them are asked to agree.
        unit = Fraction(1, 10 ** min(decimals, 9))
        valid = abs(stated - value) <= unit / 2
    return Annotation("".join(tokens), name_of(stated), valid)


def _result(text: str) -> tuple[Fraction, int]:
    """Value and written decimals of the right side of an annotation."""
    match = number_alone(plain(text))
    value = value_of(match) if match else None
    if value is None:
        raise ValueError(f"the result {text!r} is not a number")
    decimals = len(match["decimal"].partition(".")[2])
    return (value / 100, decimals + 2) if "%" in match[0] else (value, decimals)

"""GSM8K, SVAMP and any JSONL file as lists of :class:`Problem`.

GSM8K and SVAMP come from the Hugging Face hub through ``datasets``. Where the
environment variable ``RLREASON_DATA`` names a folder, they come from there, in the
file formats of their release, and the hub is not asked:

    gsm8k/train.jsonl  gsm8k/test.jsonl    {"question": ..., "answer": "... #### 72"}
    svamp/SVAMP.json                       a list of {"ID", "Body", "Question", ...}

What is used for what. The test split is for reporting only. The last 256 training
problems of GSM8K are its validation split, and the last 100 of SVAMP's are its;
neither is trained on. SVAMP was released unsplit. The hub's copy has 700 rows to
train on and 300 to test on, drawn in a way that is not documented and that cannot
be drawn again from the released file. From the file, therefore, the first 700 are
for training and the last 300 are the test: sizes agree with the hub's, **members do
not**, and SVAMP figures from the two sources must not be compared.

Every row becomes a problem whose own solution scores as correct. Anything that
stands in the way of that is one error, :class:`DataError`, and names file, line and
what to do. A file with too few rows is an error too: a training file that was cut
off would put training problems into the validation split.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlreason.tasks.answers import (
    canonical_number,
    evaluate_expression,
    extract_answer,
)
from rlreason.tasks.problem import Problem

SPLITS = ("train", "validation", "test")
GSM8K_ROWS = {"train": 7473, "test": 1319}
GSM8K_VALIDATION = 256
SVAMP_ROWS = {"train": 700, "test": 300}
SVAMP_VALIDATION = 100

Row = tuple[str, dict[str, Any]]  # where it stands, for messages; what it holds


class DataError(ValueError):
    """A task cannot be loaded; the message names the place and the remedy."""


def load_gsm8k(split: str = "train", *, limit: int | None = None) -> list[Problem]:
    """GSM8K (Cobbe et al. 2021): 7,217 train, 256 validation and 1,319 test problems.

    Solutions keep their annotations. An id counts within the split: "gsm8k/test/17".

    Raises:
        DataError: see the module.
    """
    part = _check_request(split, limit)
    folder = _data_folder()
    if folder is None:
        rows, source = _hub_rows("openai/gsm8k", part, config="main")
    else:
        path = folder / "gsm8k" / f"{part}.jsonl"
        rows, source = list(_jsonl_rows(path, _FILE_REMEDY)), str(path)
    _check_count(rows, GSM8K_ROWS[part], source)
    rows = _share(rows, split, GSM8K_VALIDATION)
    return [
        _problem(row, f"gsm8k/{split}/{i}", _gsm8k_fields)
        for i, row in enumerate(rows[:limit])
    ]


def load_svamp(split: str = "train", *, limit: int | None = None) -> list[Problem]:
    """SVAMP (Patel et al. 2021): 600 train, 100 validation and 300 test problems.

    A solution is made from the row's equation, one operation a line, in GSM8K's
    format. An id ends in the row's own: "svamp/test/chal-736".

    Raises:
        DataError: see the module.
    """
    part = _check_request(split, limit)
    folder = _data_folder()
    if folder is None:
        rows, source = _hub_rows("ChilleD/SVAMP", part)
    else:
        path = folder / "svamp" / "SVAMP.json"
        rows, source = list(_json_list_rows(path)), str(path)
        _check_count(rows, sum(SVAMP_ROWS.values()), source)
        cut = SVAMP_ROWS["train"]
        rows = rows[:cut] if part == "train" else rows[cut:]
    _check_count(rows, SVAMP_ROWS[part], source)
    rows = _share(rows, split, SVAMP_VALIDATION)
    return [
        _problem(row, f"svamp/{split}/{_text(row, 'ID')}", _svamp_fields)
        for row in rows[:limit]
    ]


def load_jsonl(path: str | Path, *, limit: int | None = None) -> list[Problem]:
    """Problems of a JSON Lines file: one object a line, UTF-8, blank lines ignored.

    Fields: ``question``; ``answer``, a number (JSON's or in text) or a solution that
    ends in ``#### N``; optionally ``solution``, to which a missing ``####`` line is
    added. Without a solution the problem's is the ``####`` line alone: enough for
    sampling and scoring, nothing to learn steps from. An id is the file's name and
    the count, "mine/17".

    Raises:
        DataError: see the module.
    """
    _check_limit(limit)
    path = Path(path).expanduser()
    rows = list(_jsonl_rows(path, "Check the path, or write the file again"))
    if not rows:
        raise DataError(f"{path} is empty: one problem a line is expected")
    return [
        _problem(row, f"{path.stem}/{i}", _jsonl_fields)
        for i, row in enumerate(rows[:limit])
    ]


# ----------------------------------------------------------------------------------
# What is asked for

_FILE_REMEDY = (
    "Put the released file there again, or unset RLREASON_DATA to load from the hub"
)


def _check_request(split: str, limit: int | None) -> str:
    """The released part, "train" or "test", that holds ``split``."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    _check_limit(limit)
    return "test" if split == "test" else "train"


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit!r} must be at least 1, or None for all problems")


def _data_folder() -> Path | None:
    """The folder that RLREASON_DATA names; None where it is unset or empty."""
    name = os.environ.get("RLREASON_DATA")
    if not name:
        return None
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"RLREASON_DATA={name} is not a folder. Set it to the folder that holds "
            "gsm8k/ and svamp/, or unset it to load from the hub"
        )
    return folder


def _share(rows: list[Row], split: str, validation: int) -> list[Row]:
    """The rows of ``split`` among those of its released part."""
    if split == "train":
        return rows[:-validation]
    return rows[-validation:] if split == "validation" else rows


def _check_count(rows: list[Row], expected: int, source: str) -> None:
    if len(rows) != expected:
        what = "is truncated" if len(rows) < expected else "is another version"
        raise DataError(
            f"{source} {what}: it holds {len(rows):,} problems, the release holds "
            f"{expected:,}. Get the released data again, or load another set of "
            "problems by the path of its .jsonl file"
        )


# ----------------------------------------------------------------------------------
# Sources of rows


def _hub_rows(
    name: str, part: str, *, config: str | None = None
) -> tuple[list[Row], str]:
    """Rows of a data set on the hub, and its name for messages.

    The environment decides about the network: with HF_HUB_OFFLINE=1 nothing is asked
    of it, and only a copy in the local cache is found.
    """
    import datasets  # seconds to import: only where it is used

    source = f"{name}, split {part}, on the Hugging Face hub"
    try:
        table = datasets.load_dataset(name, config, split=part)
    # The hub's client passes on what its HTTP, cache and file libraries raise, which
    # have no base class in common.
    except Exception as error:
        raise DataError(
            f"cannot load {source}: {type(error).__name__}: {error}. Run with a "
            "network (and without HF_HUB_OFFLINE=1), or set RLREASON_DATA to a folder "
            "with the released files, or use the task gsm-mini, which needs neither"
        ) from error
    return [(f"{source}, row {i}", dict(row)) for i, row in enumerate(table)], source


def _jsonl_rows(path: Path, remedy: str) -> Iterator[Row]:
    """Rows of a JSON Lines file, each with its line number."""
    content = _read(path, remedy)
    lines = content.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            # A complete last line ends in a line break, which leaves an empty one.
            cut = number == len(lines)
            what = "the file is cut off in this line" if cut else "not JSON"
            raise DataError(f"{where}: {what} ({error}). {remedy}") from error
        yield where, _object(record, where, remedy)


def _json_list_rows(path: Path) -> Iterator[Row]:
    """Rows of a file that is one JSON list of objects, each with its line number."""
    content = _read(path, _FILE_REMEDY)
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")

    def skip(position: int) -> int:
        return space.match(content, position).end()

    position, expected = skip(0), "["
    line, counted = 1, 0
    while content[position : position + 1] == expected:
        position, expected = skip(position + 1), ","
        line, counted = line + content.count("\n", counted, position), position
        where = f"{path}, line {line}"
        try:
            record, position = decoder.raw_decode(content, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}). {_FILE_REMEDY}") from error
        yield where, _object(record, where, _FILE_REMEDY)
        position = skip(position)
    if content[position:].rstrip() != "]":
        line += content.count("\n", counted, position)
        found = content[position : position + 1]
        raise DataError(
            f"{path}, line {line}: a JSON list goes on with {expected!r} here, "
            f"{f'not with {found!r}' if found else 'but the file ends'}: it is "
            f"truncated or another format. {_FILE_REMEDY}"
        )


def _read(path: Path, remedy: str) -> str:
    """The text of a file, without the byte-order mark that some editors put first."""
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {remedy}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte {error.start} is not UTF-8. {remedy}"
        ) from error


def _object(record: Any, where: str, remedy: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON object is expected, not {type(record).__name__}. {remedy}"
        )
    return record


# ----------------------------------------------------------------------------------
# From a row to a problem


Fields = Callable[[Row], tuple[str, str, str]]


def _problem(row: Row, problem_id: str, fields: Fields) -> Problem:
    """A problem from question, solution and answer as ``fields(row)`` gives them."""
    question, solution, answer = fields(row)
    if extract_answer(solution) != answer:
        raise DataError(
            f"{row[0]}: the solution states {extract_answer(solution)} as its final "
            f"answer, the field 'answer' {answer}. Make them agree"
        )
    return Problem(problem_id, question, solution, answer)


def _gsm8k_fields(row: Row) -> tuple[str, str, str]:
    solution = _text(row, "answer")
    answer = extract_answer(solution)
    if answer is None:
        raise DataError(
            f"{row[0]}: 'answer' does not end in one '#### N': {solution[-60:]!r}. "
            "Restore the released row"
        )
    return _text(row, "question"), solution, answer


def _svamp_fields(row: Row) -> tuple[str, str, str]:
    question = f"{_text(row, 'Body')} {_text(row, 'Question')}"
    answer = _number(row, "Answer")
    steps, value = _equation_steps(row)
    # chal-680 of the release has an equation for 5 and the answer 1. The answer is
    # what everybody reports against, so it stays; steps to another one do not.
    lines = [*steps, f"#### {answer}"] if value == answer else [f"#### {answer}"]
    return question, "\n".join(lines), answer


def _jsonl_fields(row: Row) -> tuple[str, str, str]:
    question = _text(row, "question")
    if isinstance(row[1].get("answer"), str) and "####" in row[1]["answer"]:
        _, given, answer = _gsm8k_fields(row)
    else:
        given, answer = f"#### {_number(row, 'answer')}", _number(row, "answer")
    if "solution" not in row[1]:
        return question, given, answer
    solution = _text(row, "solution")
    if "####" not in solution:
        solution = f"{solution}\n#### {answer}"
    return question, solution, answer


_OPERATION = re.compile(r"\(\s*([^\s()]+)\s+([-+*/])\s+([^\s()]+)\s*\)")


def _equation_steps(row: Row) -> tuple[list[str], str]:
    """The operations of SVAMP's ``( ( 4.0 - 2.0 ) + 3.0 )``, a line each; the value."""
    equation = rest = _text(row, "Equation")
    steps = []
    try:
        while match := _OPERATION.search(rest):  # an innermost one
            left, right = _evaluate(match[1]), _evaluate(match[3])
            if re.search("[-/]", right):
                right = f"({right})"
            symbol, expression = match[2], f"{left}{match[2]}{right}"
            value = _evaluate(expression)
            steps.append(f"{left} {symbol} {right} = <<{expression}={value}>>{value}")
            rest = rest[: match.start()] + value + rest[match.end() :]
        return steps, _evaluate(rest)
    except ValueError as error:
        raise DataError(
            f"{row[0]}: the equation {equation!r} cannot be read ({error}). "
            "Restore the released row"
        ) from error


def _evaluate(expression: str) -> str:
    """The canonical number that is the value of ``expression``."""
    number = canonical_number(str(evaluate_expression(expression)))
    if number is None:
        raise ValueError(f"the value of {expression} is too long")
    return number


def _text(row: Row, field: str) -> str:
    """A text field that is there and holds something, without the space around it."""
    where, record = row
    if field not in record:
        found = ", ".join(sorted(map(str, record))) or "none"
        raise DataError(f"{where}: no field {field!r}; the row has: {found}. Add it")
    value = record[field]
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{where}: {field!r} must be text, not {kind}. Write it as one")
    if not value.strip():
        raise DataError(f"{where}: {field!r} is empty. Fill it in or drop the row")
    return value.strip()


def _number(row: Row, field: str) -> str:
    """The canonical number in a field that holds a JSON number or a number in text."""
    where, record = row
    value = record.get(field)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        value = _text(row, field)
    number = canonical_number(str(value))
    if number is None:
        raise DataError(
            f"{where}: {field!r} is not a number: {str(value)[:60]!r}. Write the "
            "number alone, or a solution that ends in '#### N'"
        )
    return number

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

Any other set of problems is the path of a JSON Lines file, or of several, one a split:

    mine.jsonl            split by question: 80% train, 10% validation, 10% test
    mine/                 a folder with train.jsonl, validation.jsonl and test.jsonl
    mine-{split}.jsonl    the same with other names

A question's hash says to which split of a single file it belongs (:func:`split_of`):
equal questions are in one split, whatever the order of the lines, and stay there when
lines are added. Files of one's own a split are used as they are: to train and report
on the same problems, name the same ones in each.

Every row becomes a problem whose own solution scores as correct. Anything that
stands in the way of that is one error, :class:`DataError`, and names file, line and
what to do. A file with too few rows is an error too: a training file that was cut
off would put training problems into the validation split.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlreason.tasks.answers import (
    canonical_number,
    evaluate_expression,
    extract_answer,
)
from rlreason.tasks.problem import Problem

SPLITS = ("train", "validation", "test")
PROCEDURAL = ("gsm-mini", "svamp-mini")
TASKS = ("gsm8k", "svamp", *PROCEDURAL)
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
    part = _part(split)
    folder = _data_folder()
    if folder is None:
        rows, source = _hub_rows(*_HUB["gsm8k"], part)
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
    part = _part(split)
    folder = _data_folder()
    if folder is None:
        rows, source = _hub_rows(*_HUB["svamp"], part)
    else:
        path = folder / "svamp" / "SVAMP.json"
        rows, source = _json_list_rows(path), str(path)
        _check_count(rows, sum(SVAMP_ROWS.values()), source)
        cut = SVAMP_ROWS["train"]
        rows = rows[:cut] if part == "train" else rows[cut:]
    _check_count(rows, SVAMP_ROWS[part], source)
    rows = _share(rows, split, SVAMP_VALIDATION)
    return [
        _problem(row, f"svamp/{split}/{_text(row, 'ID')}", _svamp_fields)
        for row in rows[:limit]
    ]


def load_jsonl(
    path: str | Path, *, split: str | None = None, limit: int | None = None
) -> list[Problem]:
    """Problems of a JSON Lines file: one object a line, UTF-8, blank lines ignored.

    Fields: ``question``; ``answer``, a number (JSON's or in text) or a solution that
    ends in ``#### N``; optionally ``solution``, to which a missing ``####`` line is
    added. Without a solution the problem's is the ``####`` line alone: enough for
    sampling and scoring, nothing to learn steps from. An id is the file's name and
    the count in the file, "mine/17".

    Args:
        path: The file.
        split: Only the problems whose question belongs there; None is all of them.
        limit: At most so many, the first; None is all.

    Raises:
        DataError: see the module. A file without a problem for one of the splits is
            too small to be split.
    """
    path = _expanded(path)
    rows = list(_jsonl_rows(path, "Check the path, or write the file again"))
    if not rows:
        raise DataError(f"{path} is empty: one problem a line is expected")
    problems = [
        _problem(row, f"{path.stem}/{i}", _jsonl_fields) for i, row in enumerate(rows)
    ]
    if split is not None:
        splits = [split_of(problem.question) for problem in problems]
        if missing := [name for name in SPLITS if name not in splits]:
            raise DataError(
                f"{path} is too small to be split: of its {len(problems):,} problems "
                f"none is for {' and '.join(missing)}. Give it more, or name a folder "
                "with train.jsonl, validation.jsonl and test.jsonl"
            )
        problems = [p for p, s in zip(problems, splits, strict=True) if s == split]
    return problems[:limit]


def load_files(
    name: str, split: str = "train", *, limit: int | None = None
) -> list[Problem]:
    """Problems of the .jsonl file, the folder or the files that ``name`` is a path of.

    Raises:
        DataError: see the module; ``name`` is no such path.
    """
    (path,) = _own_files(name, (split,))
    single = path == _expanded(name)
    return load_jsonl(path, split=split if single else None, limit=limit)


def split_of(question: str) -> str:
    """The split to which a question of a file that is not split belongs.

    By the SHA-256 of its words, whatever the space between them and their case: 80 of
    100 for "train", 10 for "validation", 10 for "test".
    """
    words = " ".join(question.casefold().split())
    digest = hashlib.sha256(words.encode()).digest()
    tenth = int.from_bytes(digest[:8], "big") % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")


def is_here(name: str) -> bool:
    """Whether a task's data are had without asking the hub."""
    return name not in _HUB or _data_folder() is not None


def task_digest(name: str) -> str | None:
    """What a task's data hold, in 12 hexadecimal digits, to name runs by.

    It is the SHA-256 of the files that the task is read from, wherever they lie, or
    of the rows that the hub gives. A file is read again only when its time or size is
    another one. None for the procedural tasks, whose problems follow from the code
    and the knobs.

    Raises:
        DataError: The name is unknown, or nothing can be read.
    """
    name, parts = str(name), ("test", "train")
    if name in PROCEDURAL:
        return None
    if name in _HUB and (folder := _data_folder()) is None:
        digests = [_hub_digest(name, part) for part in parts]
    elif name == "gsm8k":
        digests = _file_digests([f"{folder}/gsm8k/{part}.jsonl" for part in parts])
    elif name == "svamp":
        digests = _file_digests([f"{folder}/svamp/SVAMP.json"])
    else:
        digests = _file_digests(_own_files(name, SPLITS))
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:12]


def check_name(name: str) -> None:
    """Refuse what can be no task, whatever lies where.

    Raises:
        DataError: It is neither a task nor the path of one's own.
    """
    if name not in TASKS:
        _own_files(name, SPLITS)


def lasting_name(name: str) -> str:
    """A task's name as another process takes it: a path from whichever folder."""
    return name if name in TASKS else str(_expanded(name).absolute())


# ----------------------------------------------------------------------------------
# What is asked for

_HUB = {"gsm8k": ("openai/gsm8k", "main"), "svamp": ("ChilleD/SVAMP", None)}
_FILE_REMEDY = (
    "Put the released file there again, or unset RLREASON_DATA to load from the hub"
)


def _part(split: str) -> str:
    """The released part that holds ``split``."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    return "test" if split == "test" else "train"


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


def _own_files(name: str, splits: Sequence[str]) -> list[Path]:
    """The files that a path of the user's own stands for, without doubles."""
    path = _expanded(name)
    if name and path.is_dir():
        names = [f"{path}/{split}.jsonl" for split in splits]
    elif name.endswith(".jsonl"):
        names = [name.replace("{split}", split) for split in splits]
    else:
        raise DataError(
            f"unknown task {name!r}; the tasks are {', '.join(TASKS)}, or the path of "
            "a .jsonl file, or of a folder with train.jsonl, validation.jsonl and "
            "test.jsonl"
        )
    return [_expanded(each) for each in dict.fromkeys(names)]


def _expanded(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))  # Path.expanduser raises for "~nobody"


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


def _hub_rows(name: str, config: str | None, part: str) -> tuple[list[Row], str]:
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


def _json_list_rows(path: Path) -> list[Row]:
    """Rows of a file that is one JSON list of objects, each with its number."""
    content = _read(path, _FILE_REMEDY)
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON, or cut off ({error}). {_FILE_REMEDY}"
        ) from error
    if not isinstance(records, list):
        raise DataError(f"{path}: a JSON list is expected. {_FILE_REMEDY}")
    places = [f"{path}, row {i}" for i in range(len(records))]
    pairs = zip(places, records, strict=True)
    return [(where, _object(record, where, _FILE_REMEDY)) for where, record in pairs]


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


def _file_digests(paths: Sequence[str | Path]) -> list[str]:
    """The SHA-256 of each file, "-" for one that is missing beside another."""
    found = [Path(path) for path in paths]
    some = any(path.exists() for path in found)
    return ["-" if some and not path.exists() else _file_digest(path) for path in found]


def _file_digest(path: Path) -> str:
    try:
        status = path.stat()
        return _digest_of(path.resolve(), status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check it") from error


@lru_cache(maxsize=64)
def _digest_of(path: Path, _mtime_ns: int, _size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=8)
def _hub_digest(name: str, part: str) -> str:
    rows, _ = _hub_rows(*_HUB[name], part)
    text = json.dumps([record for _, record in rows], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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
        found = found.encode("ascii", "backslashreplace").decode()
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

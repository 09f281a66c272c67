"""Loading: every row becomes a problem that its own solution solves, or an error
says which row of which file does not, and what to do.

The released files are not part of the project, so most tests write files of the same
formats and sizes; those that read the real ones run where RLREASON_DATA is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlreason.tasks as tasks
from rlreason.tasks import DataError, Problem, load_problems
from rlreason.tasks.answers import is_correct, operation_key, parse_solution
from rlreason.tasks.loaders import load_jsonl, split_of, task_digest

REAL_DATA = os.environ.get("RLREASON_DATA")
needs_data = pytest.mark.skipif(
    not REAL_DATA, reason="RLREASON_DATA does not name a folder with GSM8K and SVAMP"
)


def gsm8k_row(i: int) -> dict:
    return {
        "question": f"Ann has {i} pens and buys 2. How many has she? ",
        "answer": f"She has {i}+2 = <<{i}+2={i + 2}>>{i + 2} pens.\n#### {i + 2:,}",
    }


def svamp_row(i: int) -> dict:
    return {
        "ID": f"chal-{i}",
        "Body": f"Ann had {i} pens and bought 3 boxes of 2",
        "Question": "How many has she?",
        "Equation": f"( {float(i)} + ( 3.0 * 2.0 ) )",
        "Answer": float(i + 6),
        "Type": "Addition",
    }


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def full_folder(tmp_path_factory) -> Path:
    """A folder of the released layout and size, with made-up rows."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "gsm8k" / "train.jsonl", [gsm8k_row(i) for i in range(7473)])
    write_jsonl(folder / "gsm8k" / "test.jsonl", [gsm8k_row(-i) for i in range(1319)])
    (folder / "svamp").mkdir()
    rows = [svamp_row(i) for i in range(1, 1001)]
    (folder / "svamp" / "SVAMP.json").write_text(json.dumps(rows, indent=4))
    return folder


@pytest.fixture
def folder(full_folder, monkeypatch) -> Path:
    monkeypatch.setenv("RLREASON_DATA", str(full_folder))
    return full_folder


@pytest.fixture
def damaged(full_folder, tmp_path, monkeypatch):
    """A copy of one file of the folder, after ``damage(bytes) -> bytes``."""

    def make(name: str, damage) -> Path:
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(damage((full_folder / name).read_bytes()))
        monkeypatch.setenv("RLREASON_DATA", str(tmp_path))
        return path

    return make


@pytest.fixture
def mine(tmp_path):
    """A JSONL file with the given lines."""

    def make(*lines: str | dict, end: str = "\n") -> str:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path = tmp_path / "mine.jsonl"
        path.write_bytes(("\n".join(texts) + end).encode("utf-8"))
        return str(path)

    return make


def sizes(task: str) -> list[int]:
    return [len(load_problems(task, split)) for split in tasks.SPLITS]


# ----------------------------------------------------------------------------------
# What a task holds


def test_gsm8k_is_split_into_train_validation_and_test(folder):
    assert sizes("gsm8k") == [7217, 256, 1319]
    train, validation = (load_problems("gsm8k", s) for s in ("train", "validation"))
    assert train[-1].answer == str(7216 + 2)
    assert validation[0].answer == str(7217 + 2)
    assert validation[-1].id == "gsm8k/validation/255"


def test_svamp_is_split_into_train_validation_and_test(folder):
    assert sizes("svamp") == [600, 100, 300]
    assert load_problems("svamp", "validation")[0].id == "svamp/validation/chal-601"
    assert load_problems("svamp", "test")[0].id == "svamp/test/chal-701"


@pytest.mark.parametrize("task", ["gsm8k", "svamp"])
def test_p46_splits_share_no_problem_and_ids_are_unique(folder, task):
    problems = [p for split in tasks.SPLITS for p in load_problems(task, split)]
    assert len({problem.id for problem in problems}) == len(problems)
    if task == "svamp":  # the made-up test rows of GSM8K are others than those to train
        assert len({problem.question for problem in problems}) == len(problems)


def test_a_problem_of_gsm8k(folder):
    assert load_problems("gsm8k", limit=1001)[1000] == Problem(
        id="gsm8k/train/1000",
        question="Ann has 1000 pens and buys 2. How many has she?",
        solution="She has 1000+2 = <<1000+2=1002>>1002 pens.\n#### 1,002",
        answer="1002",
    )


def test_a_problem_of_svamp_gets_a_solution_from_its_equation(folder):
    (problem,) = load_problems("svamp", limit=1)
    assert problem == Problem(
        id="svamp/train/chal-1",
        question="Ann had 1 pens and bought 3 boxes of 2 How many has she?",
        solution="3 * 2 = <<3*2=6>>6\n1 + 6 = <<1+6=7>>7\n#### 7",
        answer="7",
    )
    assert all(
        note.valid
        for step in parse_solution(problem.solution).steps
        for note in step.annotations
    )


@pytest.mark.parametrize(
    ("equation", "answer", "operations"),
    [
        ("8.0", 8.0, ()),
        ("( 5.0 - 8.0 )", -3.0, ("5-8",)),
        ("( 4.0 - ( 3.0 - 5.0 ) )", 6.0, ("3-5", "4-(-2)")),
        ("( ( 3.0 - 5.0 ) + 4.0 )", 2.0, ("3-5", "-2+4")),
        ("( 60.0 * ( 55.0 / 15.0 ) )", 220.0, ("55/15", "60*(11/3)")),
        ("( 28.0 * ( 24.0 / 16.0 ) )", 42.0, ("24/16", "28*1.5")),
        (
            "( ( 4.0 - 2.0 ) + 3.0 )",
            1.0,
            (),
        ),  # as in chal-680: not its equation's value
    ],
)
def test_solutions_of_svamp_state_the_answer_and_only_right_arithmetic(
    damaged, equation, answer, operations
):
    def replace(content: bytes) -> bytes:
        rows = json.loads(content)
        rows[0] |= {"Equation": equation, "Answer": answer}
        return json.dumps(rows).encode()

    damaged("svamp/SVAMP.json", replace)
    (problem,) = load_problems("svamp", limit=1)
    solution = parse_solution(problem.solution)
    assert is_correct(problem.solution, str(answer))
    assert solution.operations == operations
    assert all(note.valid for step in solution.steps for note in step.annotations)


def test_limit_takes_the_first_problems_of_a_split(folder):
    everything = load_problems("gsm8k", "validation")
    assert load_problems("gsm8k", "validation", limit=3) == everything[:3]
    assert load_problems("gsm8k", "validation", limit=10**6) == everything


# ----------------------------------------------------------------------------------
# Any JSONL file


def test_a_jsonl_file_may_hold_solutions_numbers_or_both(mine):
    path = mine(
        {"question": "A?", "answer": "<<1+1=2>>\n#### 2"},
        {"question": "B?", "answer": "1,000.50"},
        {"question": "C?", "answer": 7},
        {"question": "D?", "answer": 51.0},
        "",
        {"question": "E?", "answer": "6", "solution": "3+3 = <<3+3=6>>6"},
        {"question": "F?", "answer": "6", "solution": "6\n#### 6.0", "level": 3},
    )
    problems = load_jsonl(path)
    assert [p.answer for p in problems] == ["2", "1000.5", "7", "51", "6", "6"]
    assert [p.id for p in problems] == [f"mine/{i}" for i in range(6)]
    assert problems[1].solution == "#### 1000.5"
    assert problems[4].solution == "3+3 = <<3+3=6>>6\n#### 6"
    assert all(is_correct(p.solution, p.answer) for p in problems)
    assert load_jsonl(path, limit=2) == problems[:2]


def rows_of(n: int) -> list[dict]:
    return [{"question": f"What is {i} and 0?", "answer": i} for i in range(n)]


def questions_of(name: str | Path) -> dict[str, list[str]]:
    return {
        split: [problem.question for problem in load_problems(name, split)]
        for split in tasks.SPLITS
    }


def test_p46_one_file_is_split_by_its_questions_and_no_question_is_in_two(mine):
    path = mine(*rows_of(1000))
    parts = questions_of(path)
    found = [question for part in parts.values() for question in part]
    assert sorted(found) == sorted(row["question"] for row in rows_of(1000))
    shares = [len(part) / 1000 for part in parts.values()]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    ids = {p.id for split in tasks.SPLITS for p in load_problems(path, split)}
    assert len(ids) == 1000
    assert load_problems(path, "test", limit=3) == load_problems(path, "test")[:3]


def test_a_question_stays_in_its_split_in_any_order_and_when_lines_are_added(mine):
    parts = {s: set(q) for s, q in questions_of(mine(*rows_of(500))).items()}
    turned = {s: set(q) for s, q in questions_of(mine(*rows_of(500)[::-1])).items()}
    grown = {s: set(q) for s, q in questions_of(mine(*rows_of(600))).items()}
    assert turned == parts
    assert all(parts[split] < grown[split] for split in tasks.SPLITS)
    # The wrong version: by place in the file, a row before moves test questions
    by_place = [{r["question"] for r in rows_of(500)[::step][-50:]} for step in (1, -1)]
    assert not by_place[0] & by_place[1]


def test_equal_questions_are_in_one_split_however_they_are_spaced(mine):
    twice = [
        {"question": row["question"].replace(" ", "  ").upper(), "answer": 1}
        for row in rows_of(200)
    ]
    parts = questions_of(mine(*rows_of(200), *twice))
    plain = {
        s: {" ".join(q.casefold().split()) for q in part} for s, part in parts.items()
    }
    assert sum(map(len, plain.values())) == 200
    assert all(split_of(q) == split for split, part in parts.items() for q in part)


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_a_file_too_small_to_be_split_is_an_error_in_one_line(mine, split):
    path = mine(*rows_of(3))
    with pytest.raises(DataError) as error:
        load_problems(path, split)
    message = str(error.value)
    assert message.startswith(
        f"{path} is too small to be split: of its 3 problems none"
    )
    assert "folder with train.jsonl, validation.jsonl and test.jsonl" in message
    assert "\n" not in message
    assert len(load_jsonl(path)) == 3


@pytest.mark.parametrize("name", ["", "{split}.jsonl"], ids=["a folder", "a pattern"])
def test_files_of_ones_own_a_split_are_used_as_they_are(tmp_path, name):
    for split in tasks.SPLITS:
        row = {"question": f"{split}?", "answer": "1"}
        write_jsonl(tmp_path / f"{split}.jsonl", [row])
    for split in tasks.SPLITS:
        (problem,) = load_problems(f"{tmp_path}/{name}", split)
        assert (problem.id, problem.question) == (f"{split}/0", f"{split}?")
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"cannot read .*validation\.jsonl: No such file"
    ):
        load_problems(f"{tmp_path}/{name}", "validation")


def test_a_byte_order_mark_and_windows_line_breaks_are_no_part_of_the_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "A?", "answer": "1"}\r\n')
    assert load_jsonl(path) == [Problem("mine/0", "A?", "#### 1", "1")]


# ----------------------------------------------------------------------------------
# What can be wrong with a file: one class, with place and remedy

GOOD = {"question": "A?", "answer": "1"}

BAD_ROWS = {
    "bad JSON": ('{"question": "A?", "answer"}', "not JSON"),
    "an absurd number": ('{"answer": ' + "9" * 5000 + "}", "not JSON"),
    "absurd nesting": ("[" * 100_000, "not JSON"),
    "not an object": ("[1, 2]", "a JSON object is expected, not list"),
    "no question": ({"answer": "1"}, "no field 'question'; the row has: answer"),
    "no answer": ({"question": "A?"}, "no field 'answer'; the row has: question"),
    "a question that is no text": (GOOD | {"question": 5}, "must be text, not int"),
    "an answer that is no text": (GOOD | {"answer": ["1"]}, "must be text, not list"),
    "an answer that is a bool": (GOOD | {"answer": True}, "must be text, not bool"),
    "an answer that is null": (GOOD | {"answer": None}, "must be text, not NoneType"),
    "an empty question": (GOOD | {"question": " "}, "'question' is empty"),
    "an empty answer": (GOOD | {"answer": ""}, "'answer' is empty"),
    "an empty solution": (GOOD | {"solution": ""}, "'solution' is empty"),
    "words for an answer": (GOOD | {"answer": "many"}, "not a number: 'many'"),
    "an infinite answer": ('{"question": "A?", "answer": Infinity}', "not a number"),
    "a mark without a number": (GOOD | {"answer": "#### many"}, "one '#### N'"),
    "two final answers": (GOOD | {"answer": "#### 1\n#### 2"}, "one '#### N'"),
    "another solution": (GOOD | {"solution": "#### 2"}, "states 2 as its final"),
    "half a pair in a number": (GOOD | {"answer": "1\udc00"}, "not a number"),
    "half a pair in a name": (
        {"\ud83d": 1, "answer": "1"},
        "the row has: answer, \\ud83d",
    ),
    "a solution undecided": (GOOD | {"solution": "#### 1 or 2"}, "states None as"),
}


@pytest.mark.parametrize(("row", "what"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_by_file_and_line(mine, row, what):
    path = mine(GOOD, "", row, GOOD)
    with pytest.raises(DataError) as error:
        load_problems(path)
    message = str(error.value)
    assert message.startswith(f"{path}, line 3: ")
    assert what in message
    assert len(message) < 500
    assert message.isprintable()


def test_both_halves_of_a_pair_are_one_character(mine):
    path = mine('{"question": "A \\ud83d\\ude00?", "answer": "1"}')
    assert load_jsonl(path)[0].question == "A \N{GRINNING FACE}?"


def test_a_last_line_that_is_cut_off_is_called_that(mine):
    path = mine(GOOD, '{"question": "A?", "ans', end="")
    with pytest.raises(DataError, match=r"line 2: the file is cut off in this line"):
        load_problems(path)
    assert len(load_jsonl(mine(GOOD, GOOD, end=""))) == 2  # no break, but complete


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "nowhere.jsonl"
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.jsonl: No such file"):
        load_problems(str(path))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error_and_not_an_empty_task(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mine\.jsonl is empty"):
        load_problems(str(path))


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"question": "caf\xe9?"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl, line 2: byte \d+ is not UTF-8"):
        load_problems(str(path))


def drop_last_row(content: bytes) -> bytes:
    return b"".join(content.splitlines(keepends=True)[:-1])


def replace_line(number: int, new: bytes):
    def damage(content: bytes) -> bytes:
        lines = content.split(b"\n")
        lines[number - 1] = new
        return b"\n".join(lines)

    return damage


GSM8K_DAMAGE = {
    "cut off in a row": (lambda content: content[:-40], r"line 7473: .*cut off"),
    "cut off between rows": (drop_last_row, r"is truncated: it holds 7,472 .* 7,473"),
    "too long": (lambda content: content + content, r"another version.* 14,946"),
    "empty": (lambda content: b"", r"is truncated: it holds 0 problems"),
    "bad JSON": (replace_line(12, b"{"), r"line 12: not JSON"),
    "no number": (
        replace_line(12, json.dumps({"question": "A?", "answer": "12"}).encode()),
        r"line 12: 'answer' does not end in one '#### N'",
    ),
    "not UTF-8": (replace_line(12, b"\xff"), r"line 12: byte \d+ is not UTF-8"),
}


@pytest.mark.parametrize(
    ("damage", "what"), GSM8K_DAMAGE.values(), ids=GSM8K_DAMAGE.keys()
)
def test_a_damaged_gsm8k_file_is_named(damaged, damage, what):
    path = damaged("gsm8k/train.jsonl", damage)
    with pytest.raises(DataError, match=what) as error:
        load_problems("gsm8k")
    assert str(path) in str(error.value)
    assert "released" in str(error.value)  # the remedy


def test_a_truncated_file_would_move_training_problems_into_validation(full_folder):
    """Why a file with too few rows is refused: the last 256 are other ones then."""
    lines = (full_folder / "gsm8k" / "train.jsonl").read_text().splitlines()
    whole, cut = set(lines[-256:]), set(lines[:-10][-256:])
    assert len(cut - whole) == 10


SVAMP_DAMAGE = {
    # Line 1 is "[", and a row is eight lines: {, six fields, }.
    "cut off in a row": (lambda content: content[:-60], r"cut off .*line 7999"),
    "cut off between rows": (lambda content: content[:-2], r"cut off .*line 8001"),
    "empty": (lambda content: b"", r"not JSON, or cut off .*line 1 "),
    "an empty list": (lambda content: b"[]", r"it holds 0 problems"),
    "not a list": (lambda content: b'{"ID": 1}', r"a JSON list is expected"),
    "a list of numbers": (
        lambda content: b"[\n1]",
        r"row 0: a JSON object is expected",
    ),
    "bad JSON": (replace_line(13, b'"Question"'), r"not JSON, .*line 14"),
    "a list that stops": (replace_line(9, b"    }]"), r"not JSON, .*Extra data"),
    "a row too few": (
        lambda content: json.dumps(json.loads(content)[1:]).encode(),
        r"is truncated: it holds 999 problems, the release holds 1,000",
    ),
    "no equation": (replace_line(14, b""), r"row 1: no field 'Equation'"),
    "an equation of words": (
        replace_line(14, b'"Equation": "twice",'),
        r"row 1: the equation 'twice' cannot be read",
    ),
    "an equation over zero": (
        replace_line(14, b'"Equation": "( 1.0 / 0.0 )",'),
        r"row 1: the equation .* \(division by zero\)",
    ),
    "no number": (replace_line(15, b'"Answer": "x",'), r"row 1: 'Answer' is not a n"),
}


@pytest.mark.parametrize(
    ("damage", "what"), SVAMP_DAMAGE.values(), ids=SVAMP_DAMAGE.keys()
)
def test_a_damaged_svamp_file_is_named(damaged, damage, what):
    path = damaged("svamp/SVAMP.json", damage)
    with pytest.raises(DataError, match=what) as error:
        load_problems("svamp")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("task", ["gsm8k", "svamp"])
def test_a_missing_file_is_not_looked_for_elsewhere(tmp_path, monkeypatch, task):
    monkeypatch.setenv("RLREASON_DATA", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("hub"))
    with pytest.raises(DataError, match=r"cannot read .* unset RLREASON_DATA"):
        load_problems(task)


def test_a_data_folder_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RLREASON_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"RLREASON_DATA=.*nowhere is not a folder"):
        load_problems("gsm8k")


# ----------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(monkeypatch):
    """A hub with the given tables; it notes what it is asked for."""
    monkeypatch.delenv("RLREASON_DATA", raising=False)
    asked = []

    def serve(tables: dict):
        def load_dataset(name, config=None, *, split):
            asked.append((name, config, split))
            return tables[split]

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return asked

    return serve


def hub_svamp_row(i: int) -> dict:
    """The hub's copy: the same fields as text, and one more."""
    row = svamp_row(i)
    return row | {"Answer": str(i + 6), "question_concat": "not used"}


def test_gsm8k_from_the_hub_equals_gsm8k_from_files(hub, folder, monkeypatch):
    from_files = [load_problems("gsm8k", split) for split in tasks.SPLITS]
    monkeypatch.delenv("RLREASON_DATA")
    asked = hub(
        {
            "train": [gsm8k_row(i) for i in range(7473)],
            "test": [gsm8k_row(-i) for i in range(1319)],
        }
    )
    assert [load_problems("gsm8k", split) for split in tasks.SPLITS] == from_files
    assert asked == [("openai/gsm8k", "main", s) for s in ("train", "train", "test")]


def test_svamp_from_the_hub(hub):
    order = [*range(777, 1001), *range(1, 777)]
    rows = [hub_svamp_row(i) for i in order]
    asked = hub({"train": rows[:700], "test": rows[700:]})
    assert sizes("svamp") == [600, 100, 300]
    assert asked == [("ChilleD/SVAMP", None, s) for s in ("train", "train", "test")]
    (problem,) = load_problems("svamp", limit=1)
    assert problem.id == "svamp/train/chal-777"
    assert operation_key(problem.solution) == ("3*2", "777+6")


def test_a_row_of_the_hub_is_named(hub):
    rows = [hub_svamp_row(i) for i in range(1, 701)]
    rows[5]["Answer"] = ""
    hub({"train": rows})
    with pytest.raises(DataError, match=r"ChilleD/SVAMP.* row 5: 'Answer' is empty"):
        load_problems("svamp")


def test_another_version_on_the_hub_is_refused(hub):
    hub({"train": [gsm8k_row(1)] * 7400})
    with pytest.raises(DataError, match=r"openai/gsm8k.* holds 7,400 problems"):
        load_problems("gsm8k")


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub"),
        FileNotFoundError("no such data set"),
        RuntimeError("the cache is broken"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_hub_that_cannot_be_reached_is_the_same_error(monkeypatch, failure):
    def load_dataset(*_, **__):
        raise failure

    monkeypatch.delenv("RLREASON_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError) as error:
        load_problems("gsm8k")
    message = str(error.value)
    assert error.value.__cause__ is failure
    assert str(failure) in message
    for remedy in ("network", "RLREASON_DATA", "gsm-mini"):
        assert remedy in message


def test_without_a_network_the_error_comes_at_once_and_nothing_is_asked(tmp_path):
    """The real client, offline and with an empty cache, in a process of its own."""
    code = (
        "import socket\n"
        "def refuse(*_, **__): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = refuse\n"
        "from rlreason.tasks import DataError, load_problems\n"
        "try:\n"
        "    load_problems('gsm8k')\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    kept = {k: v for k, v in os.environ.items() if k != "RLREASON_DATA"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | offline,
        cwd=Path(tasks.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot load openai/gsm8k" in done.stdout
    assert "set RLREASON_DATA" in done.stdout


# ----------------------------------------------------------------------------------
# load_problems


@pytest.mark.parametrize("task", [*tasks.TASKS, "mine.jsonl"])
@pytest.mark.parametrize("split", ["dev", "", "Test", "pretrain"])
def test_an_unknown_split_is_an_error_that_names_the_splits(task, split):
    with pytest.raises(DataError, match=r"the splits are train, validation, test"):
        load_problems(task, split)


@pytest.mark.parametrize("name", ["gsm9k", "", "GSM8K", "data/mine.json"])
def test_an_unknown_task_is_an_error_that_names_the_tasks(name):
    with pytest.raises(DataError, match=r"gsm8k, svamp, gsm-mini, svamp-mini.*jsonl"):
        load_problems(name)


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "mine.jsonl"])
def test_a_setting_for_a_task_without_settings_is_an_error(name):
    with pytest.raises(DataError, match=r"has no settings, so not seed"):
        load_problems(name, seed=1)


@pytest.mark.parametrize("name", ["gsm-mini", "svamp-mini"])
@pytest.mark.parametrize("knob", ["stepz", "shifted"])
def test_an_unknown_setting_of_the_procedural_tasks_names_those_there_are(name, knob):
    with pytest.raises(DataError, match=rf"no setting {knob}; .*seed.*steps"):
        load_problems(name, **{knob: 1})


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "gsm-mini", "mine.jsonl"])
@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_an_error(name, limit):
    with pytest.raises(DataError, match=rf"limit={limit} must be at least 1"):
        load_problems(name, limit=limit)


def test_the_procedural_tasks_are_reached_with_their_settings():
    (plain,) = load_problems("gsm-mini", "test", limit=1, seed=3)
    (shifted,) = load_problems("svamp-mini", "test", limit=1, seed=3)
    assert plain.id.startswith("gsm-mini/test/")
    assert shifted.id.startswith("svamp-mini/test/")
    assert plain != load_problems("gsm-mini", "test", limit=1, seed=4)[0]


# ----------------------------------------------------------------------------------
# What a task is named after


def test_a_digest_is_of_what_a_file_holds_and_not_of_its_place(tmp_path):
    paths = [tmp_path / "mine.jsonl", tmp_path / "other" / "yours.jsonl"]
    for path in paths:
        write_jsonl(path, rows_of(5))
    one, other = map(task_digest, paths)
    assert one == other == task_digest(str(paths[0]))
    assert len(one) == 12
    int(one, 16)
    write_jsonl(paths[0], rows_of(6))
    changed = task_digest(paths[0])
    assert changed != one
    text = paths[0].read_text()
    paths[0].write_text(text.replace("0 and", "1 and"))  # as long as before
    os.utime(paths[0], ns=(1, 1))
    assert task_digest(paths[0]) not in (one, changed)


@pytest.mark.parametrize("name", ["", "{split}.jsonl"], ids=["a folder", "a pattern"])
def test_the_digest_of_several_files_tells_which_of_them_holds_what(tmp_path, name):
    task = f"{tmp_path}/{name}"
    write_jsonl(tmp_path / "train.jsonl", rows_of(5))
    alone = task_digest(task)
    write_jsonl(tmp_path / "test.jsonl", rows_of(6))
    tested = task_digest(task)
    (tmp_path / "test.jsonl").rename(tmp_path / "validation.jsonl")
    assert len({alone, tested, task_digest(task)}) == 3


def test_the_digest_of_released_files_is_of_all_that_are_there(damaged):
    path = damaged("gsm8k/train.jsonl", lambda content: content)
    alone = task_digest("gsm8k")
    (path.parent / "test.jsonl").write_bytes(path.read_bytes())
    assert task_digest("gsm8k") != alone
    with pytest.raises(DataError, match=r"cannot read .*SVAMP\.json"):
        task_digest("svamp")


def test_the_digest_of_a_data_set_on_the_hub_is_of_its_rows(hub):
    rows = [hub_svamp_row(i) for i in range(1, 1001)]
    asked = hub({"train": rows[:700], "test": rows[700:]})
    digest = task_digest("svamp")
    assert task_digest("svamp") == digest
    assert len(asked) == 2  # the rows are loaded once


def test_procedural_tasks_have_no_data_and_unknown_ones_no_digest(tmp_path):
    assert task_digest("gsm-mini") is task_digest("svamp-mini") is None
    with pytest.raises(DataError, match=r"unknown task 'gsm9k'"):
        task_digest("gsm9k")
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.jsonl: No such file"):
        task_digest(tmp_path / "nowhere.jsonl")


def test_data_errors_are_value_errors():
    assert issubclass(DataError, ValueError)


def test_importing_the_tasks_imports_no_large_library():
    code = (
        "import sys, rlreason.tasks, rlreason.tasks.gsm_mini\n"
        "print({'torch', 'datasets', 'numpy', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(tasks.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "set()"


# ----------------------------------------------------------------------------------
# The real files


@needs_data
def test_the_real_files_have_the_released_sizes_and_known_answers():
    assert sizes("gsm8k") == [7217, 256, 1319]
    assert sizes("svamp") == [600, 100, 300]
    assert load_problems("gsm8k", limit=1)[0].answer == "72"
    assert load_problems("svamp", limit=1)[0].answer == "51"


@needs_data
def test_one_row_of_svamp_has_an_equation_for_another_answer():
    """Its answer is kept, since everybody reports against it; its steps are not."""
    problems = [p for split in tasks.SPLITS for p in load_problems("svamp", split)]
    bare = {p.id for p in problems if not parse_solution(p.solution).operations}
    assert bare == {"svamp/train/chal-555", "svamp/validation/chal-680"}


@needs_data
@pytest.mark.parametrize("task", ["gsm8k", "svamp"])
def test_p46_no_real_question_is_in_two_splits(task):
    questions = {s: {p.question for p in load_problems(task, s)} for s in tasks.SPLITS}
    train, validation, test = questions.values()
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("load", [tasks.load_gsm8k, tasks.load_svamp])
def test_a_split_that_there_is_not_is_no_other_one(load):
    with pytest.raises(DataError, match="unknown split 'tset'; the splits are train"):
        load("tset")

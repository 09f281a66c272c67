"""What is asked: problems, where they come from, and how an answer is read.

- ``problem``: one word problem
- ``loaders``: GSM8K, SVAMP, any JSONL file; what their content is named
- ``gsm_mini``: word problems without end, made from templates
- ``answers``: final answers, steps and arithmetic of a solution
- ``numerals``: how people write a number, and its one name
- ``prompts``: the text around a problem
"""

from __future__ import annotations

import inspect
from typing import Any

from rlreason.tasks.loaders import (
    PROCEDURAL,
    SPLITS,
    TASKS,
    DataError,
    check_name,
    is_here,
    load_files,
    load_gsm8k,
    load_svamp,
    task_digest,
)
from rlreason.tasks.problem import Problem

__all__ = [
    "SPLITS",
    "TASKS",
    "DataError",
    "Problem",
    "is_here",
    "load_problems",
    "task_digest",
]


def load_problems(
    name: str, split: str = "train", *, limit: int | None = None, **knobs: Any
) -> list[Problem]:
    """The problems of one split of a task.

    Args:
        name: "gsm8k" or "svamp" (hub, or the folder in RLREASON_DATA); "gsm-mini" or
            its shifted variant "svamp-mini" (made on the spot); or the path of a
            .jsonl file, which is split by its questions (80% train, 10% validation,
            10% test), of a folder with a .jsonl file a split, or of such files with
            ``{split}`` in place of the split's name.
        split: "train", "validation" or "test". Test is for reporting only.
        limit: At most so many problems, the first of the split. None is all of them;
            for the tasks that are made without end, 1,000.
        **knobs: Settings of gsm-mini and svamp-mini (``seed``, ``steps``, ...; see
            :func:`rlreason.tasks.gsm_mini.make_problems`). The others have none.

    Raises:
        DataError: Name, split or knob is unknown, or the data is missing or damaged.
            It is a ValueError, and says what is allowed or what to do.
    """
    name = str(name)
    check_name(name)  # first: what is said of knobs would be of no task
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit!r} must be at least 1, or None for all problems")
    if name in PROCEDURAL:
        return _load_mini(name, split, limit, knobs)
    if knobs:
        raise DataError(
            f"the task {name!r} has no settings, so not {', '.join(knobs)}; "
            "gsm-mini and svamp-mini have some. In a profile, say task.knobs: {}"
        )
    if name == "gsm8k":
        return load_gsm8k(split, limit=limit)
    if name == "svamp":
        return load_svamp(split, limit=limit)
    return load_files(name, split, limit=limit)


def _load_mini(
    name: str, split: str, limit: int | None, knobs: dict[str, Any]
) -> list[Problem]:
    """Problems of the procedural task, after a look at the names of the knobs."""
    from rlreason.tasks.gsm_mini import load_gsm_mini, make_problems

    known = inspect.signature(make_problems).parameters.keys() - {"split", "shifted"}
    if unknown := sorted(knobs.keys() - known):
        raise DataError(
            f"the task {name!r} has no setting {', '.join(unknown)}; its settings "
            f"are {', '.join(sorted(known))}"
        )
    return load_gsm_mini(split, shifted=name == "svamp-mini", limit=limit, **knobs)

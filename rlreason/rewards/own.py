"""A reward of the user's own, by name: ``path/to/file.py:function``.

The file is a Python program of the user's, and naming it runs it. Its function is a
``RewardFunction``:

    def reward(rollouts, problems):
        return [(0.0,) * (len(r.tokens) - 1) + (score(r.text),) for r in rollouts]

What it returns is checked at every call, since a reward of the wrong length or a NaN
would be learned from without a word.
"""

from __future__ import annotations

import inspect
import math
import os
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlreason.policy.rollout import Rollout
from rlreason.rewards.base import RewardFunction, made_of
from rlreason.tasks.problem import Problem


class RewardError(ValueError):
    """A reward that cannot be had or used; says what, where, and what mends it."""


def split_spec(spec: str) -> tuple[Path, str]:
    """The file and the function that ``path/to/file.py:function`` names.

    Raises:
        RewardError: It is not of this form, or there is no such file.
    """
    file, function = _parts(spec)
    if not file.endswith(".py") or not function.isidentifier():
        raise RewardError(
            f"the reward {spec!r} names no function of a file: write it as "
            "path/to/file.py:function"
        )
    if not Path(file).is_file():
        raise RewardError(f"the reward {spec!r}: there is no file {file}")
    return Path(file), function


def _parts(spec: str) -> tuple[str, str]:
    file, _, function = spec.rpartition(":")
    return os.path.expanduser(file), function


def lasting_spec(spec: str) -> str:
    """A function's place as another process takes it, from whichever folder."""
    file, function = _parts(spec)
    return f"{Path(file).absolute()}:{function}"


def load_reward(spec: str) -> RewardFunction:
    """Run the user's file and return its function as a reward that is checked.

    Args:
        spec: ``path/to/file.py:function``.

    Raises:
        RewardError: As ``split_spec``; or the file fails when it is run, has no such
            function, or one that does not take (rollouts, problems). The reward raises
            it where the function fails, or returns what is none.
    """
    file, name = split_spec(spec)
    try:
        found = runpy.run_path(str(file))
    except (Exception, SystemExit) as error:  # a script may end itself
        raise RewardError(
            f"the reward {spec!r}: running {file} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    function = found.get(name)
    if not callable(function):
        own = [key for key, value in found.items() if inspect.isfunction(value)]
        raise RewardError(
            f"the reward {spec!r}: {file} has no function {name!r}; it has "
            f"{', '.join(own) or 'none'}"
        )
    try:
        inspect.signature(function).bind([], [])
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"the reward {spec!r} must take (rollouts, problems): {error}"
        ) from None

    def reward(
        rollouts: Sequence[Rollout], problems: Sequence[Problem]
    ) -> list[tuple[float, ...]]:
        try:
            found = function(rollouts, problems)
        except (Exception, SystemExit) as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"the reward {spec!r} failed with {type(error).__name__}: {error} "
                f"({line.filename}, line {line.lineno})"
            ) from error
        try:
            return _checked(found, rollouts)
        except RewardError as error:
            raise RewardError(f"the reward {spec!r} returned {error}") from None

    return made_of(function, reward)


def _checked(rewards: Any, rollouts: Sequence[Rollout]) -> list[tuple[float, ...]]:
    """``rewards`` as tuples of numbers, one a token.

    Raises:
        RewardError: They are something else.
    """
    try:
        rows = [tuple(float(number) for number in row) for row in rewards]
    except (TypeError, ValueError):
        raise RewardError(
            "no rows of numbers: give a list with one tuple a rollout, and in it one "
            "number a token"
        ) from None
    if len(rows) != len(rollouts):
        raise RewardError(f"{len(rows)} rows for {len(rollouts)} rollouts")
    for i, (row, rollout) in enumerate(zip(rows, rollouts, strict=True)):
        if len(row) != len(rollout.tokens):
            raise RewardError(
                f"{len(row)} numbers for the {len(rollout.tokens)} tokens of rollout "
                f"{i}; give one a token, 0.0 where nothing is earned"
            )
        if not all(map(math.isfinite, row)):
            raise RewardError(f"a number that is not finite for rollout {i}")
    return rows

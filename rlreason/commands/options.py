"""Options that several commands share, and what they give."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlreason.execution.executors import EXECUTORS

if TYPE_CHECKING:  # the command line answers --help without waiting for torch
    from rlreason.runs.recipes import Recipe


class FiniteRange(click.FloatRange):
    """A number in a range, neither infinite nor NaN, which no bound refuses."""

    def convert(self, value, param, ctx) -> float:
        """Read it."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


POSITIVE = FiniteRange(min=0, min_open=True)


def _absolute(context: click.Context, option: click.Parameter, profile: str) -> str:
    """A profile that is a file, by its absolute path; a built-in one by its name."""
    return str(Path(profile).absolute()) if Path(profile).suffix else profile


profile_option = click.option(
    "--profile",
    default="tiny",
    show_default=True,
    callback=_absolute,
    metavar="PROFILE",
    help="smoke, tiny, smol, paper, or the path of a YAML file.",
)

executor_option = click.option(
    "--executor",
    type=click.Choice(EXECUTORS),
    default="local",
    show_default=True,
    help="Processes of this machine, tasks of a Ray cluster, or array jobs of Slurm.",
)

jobs_option = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="How many run here at a time. [default: one a core, or GPU]",
)
CELL_LIMIT = 4 * 60 * 60  # seconds; all of profile smol shall take less than one hour
cell_limit_option = click.option(
    "--cell-limit",
    type=click.IntRange(min=0),
    default=CELL_LIMIT,
    show_default=True,
    metavar="SECONDS",
    help="Give up on a cell that runs longer. 0: on none.",
)
count_option = partial(click.option, type=click.IntRange(min=1), show_default=True)

seed_option = click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**32 - 1),
    help="Of everything random.",
)
set_option = click.option(
    "--set",
    "changes",
    nargs=2,
    multiple=True,
    metavar="FIELD VALUE",
    help="Change the profile's recipe, e.g. --set expert_iteration.k 8. Repeatable; "
    "`rlreason settings` lists the fields.",
)


def values_of(changes) -> dict[str, Any]:
    """The changes given on the command line, path to value."""
    from rlreason.publishing.notebooks import parse_value

    return {name: parse_value(value, None) for name, value in changes}


def recipe_of(profile: str, changes) -> Recipe:
    """The profile's recipe with the changes given on the command line."""
    from rlreason.runs.profiles import load_recipe

    return load_recipe(profile, values_of(changes))

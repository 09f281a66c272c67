"""A grid: notebooks or steps, times parameters, times seeds, as a YAML file.

::

    profile: tiny
    seeds: [0, 1, 2]
    runs:
      - steps: [expert-iteration, ppo]
        parameters: {start: [sft, base], ppo.kl.coef: 0.02}
      - notebooks: [05_expert_iteration]
        parameters: {k_by_hand: [4, 8]}

A parameter is a value, or a list of values, each of which is run (one that is a list
itself stands in a list of its own). Those of a step are paths of the profile's recipe,
as in ``rlreason train --set``; those of a notebook are in its parameters cell.

``read_grid`` expands the whole file, and refuses it with all its faults before anything
is started. What is asked for twice is one job, and so is a run that others start from.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from rlreason.execution.jobs import Job
from rlreason.execution.seeds import missing, training_job
from rlreason.publishing.expected import (
    Expected,
    expected_of_notebook,
    expected_of_step,
)
from rlreason.publishing.notebooks import (
    Notebook,
    choose_parameters,
    is_executed,
    notebook_digest,
    output_folder,
    parse_value,
    read_notebook,
    read_record,
    run_command,
)
from rlreason.runs.describe import setting_rows
from rlreason.runs.environment import project_root, results_folder, runs_root
from rlreason.runs.plans import (
    Plan,
    check_inputs,
    folder_of,
    plan_of,
    without_effect,
)
from rlreason.runs.profiles import (
    inputs_digest,
    load_profile,
    load_recipe,
    read_yaml,
)
from rlreason.runs.recipes import Recipe
from rlreason.settings import (
    HASH_LENGTH,
    Settings,
    load_settings,
    ours,
    unknown_key_message,
)

Seed = Annotated[int, Field(ge=0, lt=2**32)]


class GridError(ValueError):
    """A grid that cannot be run as it stands; names all its faults."""


class Runs(Settings):
    """Notebooks or steps that are run with the same parameters."""

    notebooks: list[str] = ours(
        list, "Names in notebooks/, or paths from the grid's file."
    )
    steps: list[str] = ours(list, "As in `rlreason train`.")
    profile: str | None = ours(None, "In place of the grid's.")
    parameters: dict[str, Any] = ours(dict, "Name to value, or to a list of values.")
    seeds: list[Seed] | None = ours(None, "In place of the grid's.")
    cores: int = ours(1, "CPU cores a job, each one thread.", ge=1)
    gpus: int = ours(1, "GPUs a job, where there are any.", ge=0)
    memory: int = ours(0, "Megabytes a job, asked of Ray and Slurm; 0: not said.", ge=0)

    @model_validator(mode="after")
    def _names_something(self) -> Runs:
        if not self.notebooks and not self.steps:
            raise ValueError("name notebooks or steps")
        lists = {**self.parameters, "seeds": self.seeds}
        if empty := [name for name, value in lists.items() if value == []]:
            raise ValueError(f"{', '.join(empty)} has no value")
        return self


class Grid(Settings):
    """The content of a grid's file."""

    profile: str = ours("tiny", "Of all runs that name none.")
    seeds: list[Seed] = ours(lambda: [0], "Of all runs that name none.", min_length=1)
    runs: list[dict[str, Any]] = ours(
        ..., "What is run, each as in Runs.", min_length=1
    )


@dataclass(frozen=True)
class Item:
    """A job of a grid, with what is shown of it.

    Attributes:
        label: What is run, for people; of a run that others need, its folder's name.
        folder: Takes its log, its output where it is a notebook, and its failure.
        digest: Of all that decides its result.
        job: Its ``fresh`` says whether it is done.
        expected: How long it takes, by earlier ones; None: not known.
        result: Where its run folder, or executed notebook, lies; None where it is not.
        plan: Of a step.
        given: Of a notebook, its name, profile and parameters.
    """

    label: str
    folder: Path
    digest: str
    job: Job
    expected: Expected | None
    result: Callable[[], Path | None]
    plan: Plan | None = None
    given: tuple[Notebook, str, dict[str, Any]] | None = None


def read_grid(
    path: Path,
    output: Path,
    *,
    cell_limit: int = 0,
    note: Callable[[str], object] = warnings.warn,
) -> list[Item]:
    """Expand a grid's file; each job once. Writes nothing.

    Args:
        output: Folder that is to take a folder for each job.
        cell_limit: Seconds after which a notebook's cell is given up; 0: none is.
        note: Told what changes no run of a part.

    Raises:
        SettingsError: The file is no grid.
        GridError: A notebook, step, parameter or profile is unknown, or a value does
            not fit; names all of them, with what there is.
    """
    grid = load_settings(Grid, read_yaml(path))
    faults: dict[tuple[int, str], str] = {}
    items: dict[str, Item] = {}
    checked: dict[str, ValueError | None] = {}
    for number, part in enumerate(grid.runs):
        with _noted(faults, number):
            runs = load_settings(Runs, part)
            maker = _Maker(path, output.absolute(), grid, runs, cell_limit, checked)
            before = len(faults)
            choices = list(_choices(runs))
            for name, values in choices:
                which = maker.choice(name, values) if len(choices) > 1 else ""
                with _noted(faults, number, which):
                    for item in maker.items(name, values):
                        old = items.get(item.job.name)
                        # That it is asked for says more than that it is needed
                        if old is None or old.label == old.job.name:
                            items[item.job.name] = item
            if len(faults) == before:
                for line in maker.in_vain():
                    note(f"runs[{number}]: {line}")
    if faults:
        raise GridError("\n  ".join([f"{path} cannot be run:", *faults.values()]))
    return [_with_needs(item, list(items.values())) for item in items.values()]


@contextmanager
def _noted(
    faults: dict[tuple[int, str], str], number: int, choice: str = ""
) -> Iterator[None]:
    """Note what is wrong with a part of a grid, where it is first met, and go on."""
    try:
        yield
    except ValueError as error:  # ours, of whichever room
        where = f"runs[{number}]" + (f", {choice}" if choice else "")
        faults.setdefault((number, str(error)), f"{where}: {error}")


def _choices(runs: Runs) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every notebook and step with every choice of one value a parameter."""
    axes = [v if isinstance(v, list) else [v] for v in runs.parameters.values()]
    for name in [*runs.steps, *runs.notebooks]:
        for values in itertools.product(*axes):
            yield name, dict(zip(runs.parameters, values, strict=True))


def _with_needs(item: Item, items: list[Item]) -> Item:
    """A notebook after those of the grid that it needs, where they fit together."""
    if item.given is None:
        return item
    notebook, profile, given = item.given
    needs = [
        other.job.name
        for other in items
        if other.given is not None
        and other.given[0].name in notebook.needs
        and other.given[1] == profile
        and all(given.get(name, v) == v for name, v in other.given[2].items())
    ]
    return replace(item, job=replace(item.job, needs=tuple(needs)))


@dataclass(frozen=True)
class _Maker:
    """Makes items of one part of a grid.

    Attributes:
        checked: What was looked at, and its fault if it has one: most choices have the
            same base, problems and reward.
    """

    path: Path
    output: Path
    grid: Grid
    runs: Runs
    cell_limit: int
    checked: dict[str, ValueError | None]

    @property
    def profile(self) -> str:
        """One that is a file is seen from the grid's file."""
        name = self.runs.profile or self.grid.profile
        is_file = Path(name).suffix in (".yaml", ".yml")
        return str((self.path.parent / name).resolve()) if is_file else name

    def items(self, name: str, values: dict[str, Any]) -> list[Item]:
        """All seeds of a step, or a notebook, with the runs that they start from."""
        seeds = self.runs.seeds or self.grid.seeds
        if name in self.runs.steps:
            _check_paths(name, values, load_recipe(self.profile))
            recipe = load_recipe(self.profile, values)
            self._check_inputs(recipe)
            plans = {seed: plan_of(name, recipe, seed) for seed in seeds}
            self._check(plans[seeds[0]])
            asked = {folder_of(plan).path.name: plan for plan in plans.values()}
            labels = {
                folder_of(plan).path.name: self.choice(name, values | {"seed": seed})
                for seed, plan in plans.items()
            }
            return [
                self._of_step(plan, run, labels.get(run, run))
                for run, plan in (missing(asked.values()) | asked).items()
            ]
        notebook = self._notebook(name)
        if "seed" in notebook.parameters and "seed" not in values:
            given = [values | {"seed": seed} for seed in seeds]
            return [self._of_notebook(notebook, each) for each in given]
        if self.runs.seeds:
            why = "has its seed as a parameter" if "seed" in values else "has no seed"
            raise GridError(f"{name} {why}: leave out seeds")
        return [self._of_notebook(notebook, values)]

    def _check_inputs(self, recipe: Recipe) -> None:
        key = repr((recipe.policy, recipe.task))
        self._once(key, partial(check_inputs, recipe))

    def _check(self, plan: Plan) -> None:
        """A plan's check, of settings other than those of its algorithm."""
        whole = plan.model_dump(mode="json", exclude={"algorithm", "start", "expert"})
        self._once(json.dumps(whole, sort_keys=True), plan.check)

    def _once(self, key: str, check: Callable[[], object]) -> None:
        """Check it, unless that was done; then its fault is told again."""
        if key not in self.checked:
            try:
                check()
                self.checked[key] = None
            except ValueError as error:
                self.checked[key] = error
        if fault := self.checked[key]:
            raise fault

    def in_vain(self) -> list[str]:
        """Parameters that matter to none of the steps."""
        steps = self.runs.steps
        choices = [values for name, values in _choices(self.runs) if name in steps[:1]]
        idle = without_effect(steps, partial(load_recipe, self.profile), choices)
        why = {"seeds": ": the seeds of a part stand beside its parameters"}
        of = " and ".join(steps)
        return [f"{path} changes no run of {of}{why.get(path, '')}" for path in idle]

    def choice(self, name: str, values: dict[str, Any]) -> str:
        """What is run, for people."""
        words = [f"{n}={json.dumps(v).strip(chr(34))}" for n, v in values.items()]
        return " ".join([name, f"({Path(self.profile).stem})", *words])

    def _placed(self, job: Job, folder: Path) -> Job:
        """A job with what the grid gives it; its log and lock lie in its folder."""
        return replace(
            job,
            cores=self.runs.cores,
            gpus=self.runs.gpus,
            memory=self.runs.memory,
            log=folder / "log.txt",
            lock=folder / "lock",
        )

    # Steps

    def _of_step(self, plan: Plan, name: str, label: str) -> Item:
        def result() -> Path | None:
            run = folder_of(plan)
            return run.path if run.done else None

        folder = self.output / name
        return Item(
            label,
            folder,
            digest=name,
            job=self._placed(training_job(plan, name, folder / "plan.json"), folder),
            expected=expected_of_step(plan, self.profile),
            result=result,
            plan=plan,
        )

    # Notebooks

    def _notebook(self, name: str) -> Notebook:
        """By its name in the project, or by its path from the grid's file."""
        if name.endswith(".ipynb"):
            return read_notebook((self.path.parent / name).resolve())
        folder = project_root() / "notebooks"
        known = sorted(file.stem for file in folder.glob("*.ipynb"))
        if name not in known:
            raise GridError(unknown_key_message("notebooks", [name], known))
        return read_notebook(folder / f"{name}.ipynb")

    def _of_notebook(self, notebook: Notebook, given: dict[str, Any]) -> Item:
        profile, name = self.profile, notebook.name
        scale, label = load_profile(profile), self.choice(name, given)
        own = {**notebook.parameters, **choose_parameters(notebook, scale, {})}
        # What is given and changes nothing makes no other execution of it
        asked, chosen = given, choose_parameters(notebook, scale, given)
        given = {n: v for n, v in asked.items() if v != own[n]}
        results = results_folder(profile)
        inputs = inputs_digest(profile)
        digest = notebook_digest(notebook, scale, given, results=results, inputs=inputs)
        key = [profile, given]
        if notebook.path.parent != project_root() / "notebooks":  # names may repeat
            key.append(str(notebook.path))
        key = json.dumps(key, sort_keys=True).encode()
        folder = self.output / f"{name}-{hashlib.sha256(key).hexdigest()[:HASH_LENGTH]}"
        book = runs_root() / "book" / Path(profile).stem / "notebooks"
        places = (folder, output_folder(profile), book)

        def result() -> Path | None:
            done = (place for place in places if is_executed(name, digest, place))
            return next((place / f"{name}.ipynb" for place in done), None)

        def there() -> bool:
            return result() is not None

        command = run_command(
            notebook, profile_name=profile, folder=folder, cell_limit=self.cell_limit
        )
        for parameter, value in given.items():
            command += ["-p", parameter, _as_text(notebook, parameter, value)]
        others = self.output.glob(f"{name}-*")
        records = (read_record(name, place) for place in {*places, *others})
        job = Job(
            folder.name,
            command,
            fresh=there,
            there=there,
            writes=(folder,),
        )
        return Item(
            label,
            folder,
            digest,
            job=self._placed(job, folder),
            expected=expected_of_notebook(records, profile, chosen),
            result=result,
            given=(notebook, profile, asked),
        )


def _check_paths(step: str, paths: Iterable[str], recipe: Recipe) -> None:
    """Refuse paths that a recipe does not have."""
    known = [f"{row.path}." for row in setting_rows(None, recipe)]
    for path in paths:
        part, whole = path.partition(".")[0], f"{path}."
        if not any(k.startswith(whole) or whole.startswith(k) for k in known):
            near = [k[:-1] for k in known if k.startswith(f"{part}.")]
            parts = list(dict.fromkeys(k.partition(".")[0] for k in known))
            raise GridError(unknown_key_message(step, [path], near or parts))


def _as_text(notebook: Notebook, name: str, value: Any) -> str:
    """A parameter as ``rlreason run -p`` reads it."""
    how = notebook.parameters[name], notebook.kinds[name]
    for text in (repr(value), value):
        if isinstance(text, str) and parse_value(text, *how) == value:
            return text
    raise GridError(f"{notebook.name}: {name} cannot be {value!r}")

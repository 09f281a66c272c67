"""Run a notebook headless: parameters in, an executed notebook and a record out.

Papermill does the work. What is added here: parameters come from a profile and are
checked against the notebook's cell tagged ``parameters`` (papermill passes on whatever
it is given), a failure is told once with its cell and traceback, the output appears
only when it is whole, and a record beside it says what was run and how long it took.

A notebook trains what it needs, or loads it where another one has done so, or waits
where another one is at it. So that no core sits and waits for a long training, it names
the notebooks that are to run before it in its metadata, and beside them the recorded
tables that it shows, which are inputs like its cells::

    "rlreason": {"needs": ["05_expert_iteration"], "records": ["rows"]}
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlreason.execution.schedule import signals_interrupt
from rlreason.runs.environment import (
    PACKAGE,
    ROOMS_OF_RESULTS,
    folders,
    machine,
    make_folder,
    project_root,
    results_folder,
    rooms_digest,
    runs_root,
)
from rlreason.runs.profiles import Profile, inputs_digest, load_profile, named_profile
from rlreason.settings import unknown_key_message

START_LIMIT = 600  # seconds for a kernel to begin, also where much else is running
REQUIRED = object()  # default of a parameter that is computed: any value may be given
# What an output comes from: what decides results, and what chapters show them by
ROOMS_OF_OUTPUTS = (
    *ROOMS_OF_RESULTS,
    "settings.py",
    "experiments",
    "publishing/chapter.py",
    "publishing/figures",
)


class NotebookError(ValueError):
    """A notebook that cannot be run as asked, or that failed."""


@dataclass(frozen=True)
class Notebook:
    """A notebook as it stands in the repository.

    Attributes:
        path: The file.
        needs: Names of the notebooks that are to run before.
        records: Names of what it shows of book/results/PROFILE, NAME.jsonl each.
        parameters: Name to default, in the order of the parameters cell; ``REQUIRED``
            where the default is no literal.
        kinds: Name to the types of its values; none where any plain value may be given.
    """

    path: Path
    needs: tuple[str, ...]
    records: tuple[str, ...]
    parameters: dict[str, Any]
    kinds: dict[str, tuple[type, ...]]

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem


@dataclass(frozen=True)
class Record:
    """What is known of an executed notebook.

    Attributes:
        notebook: Its name.
        profile: The profile's name.
        parameters: Those that were set, by the profile or by hand.
        digest: Hash of all that decides the output; see ``notebook_digest``.
        seconds: Wall-clock time of the execution.
        peak_mb: Largest memory of the kernel in MB, None where the system cannot tell.
        machine: Versions, processor, commit, and when it started.
    """

    notebook: str
    profile: str
    parameters: dict[str, Any]
    digest: str
    seconds: float
    peak_mb: int | None
    machine: dict[str, Any]


# Reading


def read_notebook(path: Path | str) -> Notebook:
    """Read what a notebook needs and takes.

    Raises:
        NotebookError: No such file, not a notebook, or a broken parameters cell.
    """
    path = Path(path)
    content = _read_json(path)
    tagged = [
        "".join(cell["source"])
        for cell in content["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    if len(tagged) > 1:
        raise NotebookError(f"{path} has {len(tagged)} cells tagged parameters")
    assigned = _assignments(tagged[0], path) if tagged else {}
    ours = content["metadata"].get("rlreason", {})
    try:
        needs, records = (tuple(ours.get(name, ())) for name in ("needs", "records"))
    except (AttributeError, TypeError):
        raise NotebookError(
            f"{path}: `rlreason` in its metadata holds lists named needs and records"
        ) from None
    parameters = {name: default for name, (default, _) in assigned.items()}
    kinds = {name: kinds for name, (_, kinds) in assigned.items()}
    return Notebook(path, needs, records, parameters, kinds)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON of a notebook; nbformat would take two seconds to import."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise NotebookError(f"no notebook {path}") from None
    except OSError as error:
        raise NotebookError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise NotebookError(f"{path} is not a notebook: {error}") from None
    if not isinstance(content, dict) or content.get("nbformat") != 4:
        raise NotebookError(f"{path} is not a notebook of format 4")
    match content:
        case {"cells": [*cells], "metadata": {}} if all(map(_is_cell, cells)):
            return content
    raise NotebookError(f"{path} is not a whole notebook: it has no list of cells")


def _is_cell(cell: Any) -> bool:
    match cell:
        case {"cell_type": str(), "source": str() | list(), "metadata": {}}:
            return True
    return False


def find_notebooks(folder: Path) -> list[Notebook]:
    """Return the notebooks of a folder, by name."""
    return [read_notebook(path) for path in sorted(folder.glob("*.ipynb"))]


def _assignments(source: str, path: Path) -> dict[str, tuple[Any, tuple]]:
    """Return name to value and types of the assignments of a parameters cell."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise NotebookError(f"{path}, cell tagged parameters: {error}") from None
    found = {}
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = _literal(value), _kinds_like(_literal(value))
            case ast.AnnAssign(ast.Name(id=name), kind, ast.expr() as value):
                default, named = _literal(value), _kinds_named(ast.unparse(kind))
                found[name] = default, named or _kinds_like(default)
            case _:
                raise NotebookError(
                    f"{path}, cell tagged parameters, line {statement.lineno}: only "
                    "assignments of one name belong there"
                )
    return found


def _literal(value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError):
        return REQUIRED


def _kinds_like(default: Any) -> tuple[type, ...]:
    if default is REQUIRED or default is None:
        return ()
    return (list,) if isinstance(default, (list, tuple)) else (type(default),)


def _kinds_named(annotation: str) -> tuple[type, ...]:
    """The types that e.g. ``int | None`` names; none where one of them is unknown."""
    known = {kind.__name__: kind for kind in (bool, int, float, str, list, dict)}
    words = [word.partition("[")[0].strip() for word in annotation.split("|")]
    kinds = tuple(known.get(word) for word in words if word != "None")
    return () if None in kinds else kinds


# Parameters


def choose_parameters(
    notebook: Notebook, profile: Profile, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters to set: the profile's, and over them those given by hand.

    Args:
        notebook: Whose parameters cell says which there are.
        profile: Its ``common`` values apply where declared; each of those under the
            notebook's name must be.
        given: By hand, e.g. from ``-p``; each must be declared.

    Raises:
        NotebookError: An unknown parameter (lists the known ones), a value of another
            type than the default, or than the cell's annotation says, or the profile.
    """
    special = profile.notebooks.get(notebook.name, {})
    if "profile" in {**special, **given}:
        raise NotebookError(
            f"{notebook.name}: the profile is not set as a parameter; name it with "
            "--profile, or in a grid with profile:"
        )
    for where, values in (("from the profile", special), ("given", given)):
        if unknown := [name for name in values if name not in notebook.parameters]:
            label = f"{notebook.name}, parameters {where}"
            known = list(notebook.parameters)
            raise NotebookError(unknown_key_message(label, unknown, known))
    common = {k: v for k, v in profile.common.items() if k in notebook.parameters}
    chosen = {**common, **special, **given}
    return {
        name: _fitting(f"{notebook.name}: {name}", value, notebook.kinds[name])
        for name, value in chosen.items()
    }


def _fitting(where: str, value: Any, kinds: tuple[type, ...]) -> Any:
    """Return the value, a whole number as a float where that is what is wanted."""
    if value is None:
        return value
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    if kinds and type(value) not in kinds:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise NotebookError(f"{where} is {value!r}, not of type {wanted}")
    if not kinds and not _is_plain(value):
        raise NotebookError(
            f"{where} is {value!r}: a parameter is a number, text, true, false, null, "
            "or a list of these"
        )
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def parse_value(text: str, default: Any, kinds: tuple[type, ...] = ()) -> Any:
    """Read a parameter from the command line; text stays text where that is wanted.

    ``true``, ``false`` and ``null`` may be written as in YAML.
    """
    if isinstance(default, str) or (kinds == (str,) and text not in ("null", "None")):
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None if text in ("null", "None") else text


def unused_keys(profile: Profile, notebooks: Sequence[Notebook]) -> list[str]:
    """Return what a profile sets and no notebook takes."""
    declared = {name for notebook in notebooks for name in notebook.parameters}
    names = {notebook.name for notebook in notebooks}
    return [f"common.{key}" for key in profile.common if key not in declared] + [
        f"notebooks.{key}" for key in profile.notebooks if key not in names
    ]


# Running


def notebook_digest(
    notebook: Notebook,
    profile: Profile,
    given: Mapping[str, Any] | None = None,
    *,
    results: Path | None = None,
    inputs: str = "",
    above: tuple[str, ...] = (),
) -> str:
    """Hash what decides a notebook's output.

    That is its cells, its parameters, the profile's recipe with the files that it
    names, the source that results come from and that shows them, the lock file, the
    recorded tables that it shows, the profiles and YAML files that its parameters name,
    and the same, less the tables, of the notebooks that it needs.

    Args:
        notebook: Which.
        profile: Whose recipe and parameters apply.
        given: Parameters that win over the profile's.
        results: Folder of the recorded tables; see ``results_folder``.
        inputs: What the files hold that the recipe names; see ``inputs_digest``.
        above: The notebooks that led here, each of which needs the next.
    """
    if notebook.name in above:
        circle = " -> ".join([*above, notebook.name])
        raise NotebookError(f"notebooks need each other: {circle}")
    cells = [
        [cell["cell_type"], "".join(cell["source"]), cell["metadata"]]
        for cell in _read_json(notebook.path)["cells"]
    ]
    chosen = choose_parameters(notebook, profile, given or {})
    parts = [
        json.dumps(cells, sort_keys=True).encode(),
        json.dumps(chosen, sort_keys=True).encode(),
        json.dumps(profile.recipe, sort_keys=True).encode(),
        package_digest().encode(),
        _bytes_of(project_root() / "requirements.lock"),
    ]
    if inputs:
        parts.append(inputs.encode())
    for parameter, value in {**notebook.parameters, **chosen}.items():
        if parameter != "profile":  # a demonstration's own, or another file
            parts += named_profile(value)
    if results is not None:
        parts += [_bytes_of(results / f"{name}.jsonl") for name in notebook.records]
    for name in notebook.needs:
        needed = read_notebook(notebook.path.with_name(f"{name}.ipynb"))
        way = (*above, notebook.name)
        digest = notebook_digest(needed, profile, inputs=inputs, above=way)
        parts.append(digest.encode())
    hashes = [hashlib.sha256(part).hexdigest() for part in parts]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


@cache
def package_digest() -> str:
    """Hash the source that decides the outputs of notebooks."""
    return rooms_digest(ROOMS_OF_OUTPUTS, PACKAGE)


def output_folder(profile_name: str) -> Path:
    """Return where executed notebooks of a profile lie if nothing else is said."""
    return runs_root() / "notebooks" / Path(profile_name).stem


def run_command(
    notebook: Notebook, *, profile_name: str, folder: Path, cell_limit: int
) -> list[str]:
    """Return the command of a job that does what ``run_notebook`` does."""
    return [
        *(sys.executable, "-m", "rlreason.cli", "run", str(notebook.path)),
        *("--profile", profile_name, "--output", str(folder)),
        *("--cell-limit", str(cell_limit)),
    ]


def run_notebook(
    notebook: Notebook,
    *,
    profile_name: str = "tiny",
    given: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    cell_limit: int = 0,
) -> Record:
    """Execute a notebook and write it, with its record, to a folder.

    Args:
        notebook: Which.
        profile_name: A built-in profile or the path of one; also the value of the
            notebook's ``profile`` parameter where it declares one.
        given: Parameters that win over the profile's.
        folder: Gets ``<name>.ipynb`` and ``<name>.json``, or ``<name>.failed.ipynb``;
            ``output_folder(profile_name)`` where not given.
        cell_limit: Seconds after which a cell is given up; 0: none is.

    Raises:
        NotebookError: An unknown parameter, or a cell failed or did not end; says
            which, with its source and traceback.
    """
    profile = load_profile(profile_name)
    parameters = choose_parameters(notebook, profile, given or {})
    results = results_folder(profile_name)
    inputs = inputs_digest(profile_name)
    digest = notebook_digest(notebook, profile, given, results=results, inputs=inputs)
    if "profile" in notebook.parameters:
        parameters = {"profile": profile_name, **parameters}
    folder = make_folder(folder or output_folder(profile_name))
    # A name of its own: the same notebook may be running with other parameters
    draft = folder / f"{notebook.name}.{secrets.token_hex(4)}.partial.ipynb"
    where, started = machine(), time.monotonic()
    try:
        with signals_interrupt():  # SIGTERM: neither kernel nor draft outlives it
            _execute(notebook, _changed(notebook, parameters), draft, cell_limit)
        record = Record(
            notebook=notebook.name,
            profile=profile_name,
            parameters=parameters,
            digest=digest,
            seconds=round(time.monotonic() - started, 1),
            peak_mb=_peak_of_children_mb(),
            machine=where,
        )
        _put_in_place(draft, record, folder)
    finally:
        draft.unlink(missing_ok=True)
    return record


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Let imports go on without what they only use where it is there."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]


def _execute(
    notebook: Notebook, parameters: Mapping[str, Any], draft: Path, cell_limit: int
) -> None:
    """Execute a notebook into a draft, in a kernel of this Python.

    Raises:
        NotebookError: A cell failed or took longer than the limit, or the kernel ended.
    """
    with _without("rfc3987_syntax"):  # two seconds: 38 grammars of addresses
        import papermill  # slow to import, and only needed here
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    def as_it_is(path: Path) -> str:  # papermill takes braces for parameters
        return str(path).replace("{", "{{").replace("}", "}}")

    logging.getLogger("papermill").addHandler(logging.NullHandler())  # we tell it
    failed = draft.with_name(f"{notebook.name}.failed.ipynb")
    try:
        papermill.execute_notebook(
            as_it_is(notebook.path),
            as_it_is(draft),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            kernel_manager_class=_own_kernel(),
            shutdown_kernel="immediate",  # at Ctrl-C too, without a word of its own
            cwd=str(notebook.path.parent),
            progress_bar=sys.stderr.isatty(),
            start_timeout=START_LIMIT,
            execution_timeout=cell_limit or None,
            config=Config(KernelManager={"transport_encryption": "auto"}),
        )
    except PapermillExecutionError as error:
        draft.replace(failed)
        raise NotebookError(_failure(notebook, error, failed)) from None
    except TimeoutError:  # nbclient's CellTimeoutError
        cell = _last_begun(draft)
        draft.replace(failed)
        raise NotebookError(
            f"{notebook.name}: code cell {cell} did not end in {cell_limit:,} s; raise "
            f"--cell-limit (0: no limit), or see what it waits for; the notebook up to "
            f"there: {failed}"
        ) from None
    except RuntimeError as error:  # nbclient's DeadKernelError among them
        if "died" not in str(error):
            raise
        raise NotebookError(
            f"{notebook.name}: the kernel died in code cell {_last_begun(draft)}, "
            "perhaps for want of memory; close other programs, run fewer notebooks at "
            "a time (--jobs), or take a smaller profile"
        ) from None


def _own_kernel() -> type:
    """Return a manager that starts kernels of this Python, quiet and in our folders.

    The kernel of name ``python3`` may be one that the user installed for another
    environment.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        display_name="Python 3",
        language="python",
        metadata={"supported_encryption": ["curve"]},
        # `$` begins a variable here. A kernel cannot tell who drives it: no bars
        env={name: folder.replace("$", "$$") for name, folder in folders().items()}
        | {"RLREASON_QUIET": "1"},
    )

    class OwnKernel(AsyncKernelManager):
        kernel_spec = spec

    return OwnKernel


def _last_begun(draft: Path) -> int:
    """Return the number, among code cells, of the last one that papermill began."""
    code = [c for c in _read_json(draft)["cells"] if c["cell_type"] == "code"]
    return sum(bool(c["metadata"]["papermill"].get("start_time")) for c in code)


def _put_in_place(draft: Path, record: Record, folder: Path) -> None:
    """Make a draft the output, with its record: they belong together."""
    place = folder / f"{record.notebook}.json"
    with FileLock(folder / ".lock"):
        # Record last: an output without its record counts as not there
        place.unlink(missing_ok=True)
        draft.replace(folder / f"{record.notebook}.ipynb")
        written = draft.with_suffix(".json")
        written.write_text(json.dumps(asdict(record), indent=2) + "\n")
        written.replace(place)
        (folder / f"{record.notebook}.failed.ipynb").unlink(missing_ok=True)


def _changed(notebook: Notebook, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that differ from the notebook's own defaults."""
    return {k: v for k, v in parameters.items() if notebook.parameters[k] != v}


def _failure(notebook: Notebook, error: Any, draft: Path) -> str:
    """Tell a failed cell once: where, its source, its traceback without colours."""
    traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    return (
        f"{notebook.name}, cell [{error.exec_count}] failed\n\n{error.source}\n\n"
        f"{traceback}\n\nThe notebook up to there: {draft}"
    )


def read_record(name: str, folder: Path) -> Record | None:
    """Return the record of an executed notebook, None where there is none."""
    try:
        return Record(**json.loads((folder / f"{name}.json").read_text()))
    except (OSError, TypeError, ValueError):
        return None


def is_executed(name: str, digest: str, folder: Path) -> bool:
    """Whether a folder holds a notebook's output of this digest, with its record."""
    record = read_record(name, folder)
    output = folder / f"{name}.ipynb"
    return record is not None and record.digest == digest and output.is_file()


def _peak_of_children_mb() -> int | None:
    """Return the largest memory that an ended child process had, i.e. the kernel."""
    if os.name == "nt":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))

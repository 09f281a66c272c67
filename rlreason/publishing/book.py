"""Make the book: execute what has changed, put the pages together, build HTML.

1. Every notebook is executed by papermill, each in a process of its own, as many at a
   time as there are cores (or GPUs), after the notebooks that it needs. One whose
   cells, parameters, library source, recorded tables and lock file are as they were is
   not executed again.
2. The pages of ``book/`` and the executed notebooks are laid side by side, the main
   result on the first of them, with a status page (time and memory of every notebook,
   machine, versions) and the files of MathJax, so that the pages show equations without
   a network.
3. Sphinx builds them with the configuration that jupyter-book makes; every warning is
   an error.

::

    runs/book/<profile>/notebooks/   executed notebooks and their records
    runs/book/<profile>/<source>/    run folders of the training inside the notebooks
    book/_build/<profile>/source/    what Sphinx reads
    book/_build/<profile>/html/      the book

The run folders stand under a digest of the source that results come from: a change of
an algorithm trains anew, a change of a figure does not.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlreason.execution.executors import executor_named
from rlreason.execution.jobs import Executor, Job, Outcome
from rlreason.experiments.rows import read_rows, rows_path, took
from rlreason.publishing.notebooks import (
    Notebook,
    Record,
    find_notebooks,
    is_executed,
    notebook_digest,
    read_record,
    run_command,
    unused_keys,
)
from rlreason.runs.environment import (
    cores,
    files_digest,
    make_folder,
    project_root,
    results_folder,
    runs_root,
    source_digest,
)
from rlreason.runs.profiles import inputs_digest, load_profile

MATHJAX_PACKAGE = "sphinx-mathjax-offline"
MATHJAX_FILES = ("tex-chtml-full.js", "output/chtml/fonts/woff-v2/")
# A paragraph of the first page, in whose place a chapter's first figure is shown
FIRST_FIGURE = re.compile(r"^\*`make book` shows here .*?\]\((.*?)\)\.\*$", re.M | re.S)
# In the repository the notebooks lie beside book/, in the built book within it
FROM_PAGES = ("](../notebooks/", "](notebooks/")
# Without the grammars of addresses that jsonschema would compile: see `notebooks`
QUICKLY = "import sys; sys.modules['rfc3987_syntax'] = None; "
JUPYTER_BOOK = QUICKLY + "from jupyter_book.cli.main import main; main()"
SPHINX = QUICKLY + "from sphinx.cmd.build import main; sys.exit(main(sys.argv[1:]))"
STATUS_PACKAGES = ("numpy", "matplotlib", "papermill", "jupyter-book", "Sphinx")


class BookError(ValueError):
    """The book could not be made: a notebook failed, or Sphinx had something to say."""


@dataclass(frozen=True)
class Book:
    """A book that was built.

    Attributes:
        index: Its first page.
        records: One for each notebook, in reading order.
        executed: Names of the notebooks that were executed this time.
    """

    index: Path
    records: list[Record]
    executed: list[str]


def build_book(
    profile_name: str = "tiny",
    *,
    jobs: int | None = None,
    force: bool = False,
    cell_limit: int = 0,
    executor: str = "local",
    root: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Book:
    """Execute the notebooks and build the HTML book.

    Args:
        profile_name: A built-in profile or the path of one.
        jobs: Notebooks executed at a time; the number of cores where not given. With
            more than one, each runs on a single thread.
        force: Execute, and train, also what has not changed.
        cell_limit: Seconds after which a cell is given up; 0: none is.
        executor: Who executes them: local, ray or slurm.
        root: The folder that holds ``book/`` and ``notebooks/``; the checkout where
            not given.
        report: Called with one line at a time of what is going on.

    Raises:
        NotebookError: The notebooks or the profile are not in order.
        BookError: A notebook failed, or a page has a fault; all are told.
    """
    root = root or project_root()
    if not (root / "book" / "_toc.yml").is_file():
        raise BookError(
            f"no book in {root}: `rlreason book` runs in a checkout of the project"
        )
    notebooks = find_notebooks(root / "notebooks")
    profile = load_profile(profile_name)
    if unused := unused_keys(profile, notebooks):
        raise BookError(f"no notebook takes {', '.join(unused)} of {profile_name}")
    name = Path(profile_name).stem
    folder, build = runs_root() / "book" / name, root / "book" / "_build" / name
    with _alone(folder, report), _alone(build, report):
        if force:
            shutil.rmtree(folder, ignore_errors=True)
        shelf = Shelf(
            profile_name,
            folder,
            jobs or cores(),
            report,
            executor,
            cell_limit=cell_limit,
        )
        results, inputs = results_folder(profile_name), inputs_digest(profile_name)
        digests = {
            n.name: notebook_digest(n, profile, results=results, inputs=inputs)
            for n in notebooks
        }
        executed = shelf.execute(notebooks, digests)
        records = [read_record(n.name, shelf.outputs) for n in notebooks]
        collect_pages(root / "book", folder, build / "source", records)
        build_html(build, report)
        drop_old_runs(folder)
    return Book(build / "html" / "index.html", records, executed)


@contextmanager
def _alone(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder for this process; wait where another one holds it."""
    make_folder(folder.parent)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"waiting for another book, which is being made in {folder} ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# Executing


@dataclass(frozen=True)
class Shelf:
    """Where executed notebooks of a profile lie, and how those that are not get there.

    Attributes:
        profile_name: A built-in profile or the path of one.
        folder: Holds the outputs and the run folders of the notebooks.
        jobs: Notebooks executed at a time; with more than one, each on one thread.
        report: Called with one line at a time of what is going on.
        executor: Carries them out, or the name of one that does.
        cell_limit: Seconds after which a cell is given up; 0: none is.
    """

    profile_name: str
    folder: Path
    jobs: int
    report: Callable[[str], None]
    executor: Executor | str = "local"
    cell_limit: int = 0

    @property
    def outputs(self) -> Path:
        """The folder of executed notebooks and their records."""
        return self.folder / "notebooks"

    def execute(self, notebooks: Sequence[Notebook], digests: dict[str, str]) -> list:
        """Execute those whose output is not of their digest; return their names.

        One that fails does not keep the others from running, only those that need it.

        Raises:
            BookError: Names every notebook that failed, with what it printed.
        """
        for draft in self.outputs.glob("*.partial.*"):
            draft.unlink()  # of a book that was interrupted
        executor = self.executor
        if isinstance(executor, str):
            executor = executor_named(
                executor,
                folder=self.folder,
                cores=self.jobs if self.jobs > 1 else cores(),
                report=lambda job: self.report(f"{job.name} ..."),
                finished=self._tell,
            )
        outcomes = executor.run([self._job(n, digests[n.name]) for n in notebooks])
        faults = [o.message for o in outcomes.values() if not o.ok]
        if faults:
            raise BookError("\n\n".join(faults))
        return [o.name for o in outcomes.values() if o.state == "done"]

    def _job(self, notebook: Notebook, digest: str) -> Job:
        """Run one notebook as ``rlreason run`` does, on a core, or a GPU of its own."""
        command = run_command(
            notebook,
            profile_name=self.profile_name,
            folder=self.outputs,
            cell_limit=self.cell_limit,
        )
        runs = (self.folder / source_digest()).resolve()
        there = partial(is_executed, notebook.name, digest, self.outputs)
        return Job(
            name=notebook.name,
            command=command,
            needs=notebook.needs,
            cores=1 if self.jobs > 1 else cores(),
            gpus=1,
            fresh=there,
            there=there,
            environment={"RLREASON_RUNS": str(runs)},
            writes=tuple(
                self.outputs / f"{notebook.name}.{kind}" for kind in ("ipynb", "json")
            ),
        )

    def _tell(self, outcome: Outcome) -> None:
        if outcome.state == "done":
            self.report(f"{outcome.name} took {outcome.seconds:.0f} s")


def drop_old_runs(folder: Path) -> None:
    """Delete run folders made by source that is no more."""
    for path in folder.iterdir():
        if path.name not in ("notebooks", source_digest()):
            shutil.rmtree(path, ignore_errors=True)


# Putting the pages together


def collect_pages(book: Path, run: Path, target: Path, records: list[Record]) -> None:
    """Lay out what Sphinx reads: pages, notebooks, status, settings, MathJax."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(book, target, ignore=shutil.ignore_patterns("_build"))
    for page in target.glob("*.md"):
        page.write_text(page.read_text("utf8").replace(*FROM_PAGES), "utf8")
    (target / "notebooks").mkdir()
    for record in records:
        name = f"notebooks/{record.notebook}.ipynb"
        content = prepare_notebook(json.loads((run / name).read_text("utf8")))
        (target / name).write_text(json.dumps(content, indent=1), "utf8")
    show_first_figure(target)
    for name, path in mathjax_files().items():
        copy = target / "_extra/_static/mathjax" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (target / "status.md").write_text(status_page(records, run / source_digest()))
    if (target / "settings.md").is_file():  # what stands there says where to look
        (target / "settings.md").write_text(_settings_page(records[0].profile))


def show_first_figure(source: Path) -> None:
    """Put a chapter's first figure on the first page, where that asks for it.

    Below it stands what the chapter says before the figure: its summary. The page in
    the repository links to the chapter, so that it reads without a build.
    """
    page = source / "intro.md"
    text = page.read_text("utf8")
    if not (asked := FIRST_FIGURE.search(text)):
        return
    content = json.loads((source / asked[1]).read_text("utf8"))
    outputs = [o for cell in content["cells"] for o in cell.get("outputs", [])]
    at = next(i for i, o in enumerate(outputs) if "image/png" in o.get("data", {}))
    picture = outputs[at]
    said = [o["data"] for o in [outputs[at + 1], *outputs[:at]] if "data" in o]
    words = ["".join(data.get("text/markdown", "")) for data in said]
    beside = re.compile(r"\]\(([\w-]+\.ipynb)")  # of chapters in the same folder
    words = [beside.sub(rf"]({Path(asked[1]).parent}/\1", text) for text in words]
    file = "_static/first-figure.png"
    (source / file).write_bytes(b64decode("".join(picture["data"]["image/png"])))
    alt = picture["metadata"]["image/png"]["alt"]
    shown = "\n\n".join([f"![{alt}]({file})", *filter(None, words)])
    page.write_text(text.replace(asked[0], shown), "utf8")


def _settings_page(profile: str) -> str:
    # Imported here: no other page of the book has to wait for torch
    from rlreason.runs.describe import settings_page
    from rlreason.runs.profiles import load_recipe

    return settings_page(load_recipe(profile), Path(profile).stem)


def prepare_notebook(content: dict[str, Any]) -> dict[str, Any]:
    """Return an executed notebook as Sphinx wants it; Jupyter shows it as it was.

    A link to ``../book/x.md`` leads from ``notebooks/`` to a page in the repository; in
    the book the pages stand one folder above. What a figure shows, as Jupyter keeps it
    beside the picture (``metadata["image/png"]["alt"]``), MyST reads at the cell.
    """
    content = copy.deepcopy(content)
    for cell in content["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = _lead_to_pages(cell["source"])
        alts = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data:
                data["text/markdown"] = _lead_to_pages(data["text/markdown"])
            of_kinds = output.get("metadata", {}).values()
            alts += [v["alt"] for v in of_kinds if isinstance(v, dict) and "alt" in v]
        if alts:
            shown = cell["metadata"].setdefault("mystnb", {}).setdefault("image", {})
            shown.setdefault("alt", "; ".join(dict.fromkeys(alts)))
    return content


def _lead_to_pages(text: str | list[str]) -> str:
    return "".join(text).replace("](../book/", "](../")


def mathjax_files() -> dict[str, Path]:
    """Return the parts of MathJax that the pages load, by name, from its package."""
    prefix = f"{MATHJAX_PACKAGE}/static/mathjax/"
    found = {}
    for file in metadata.files(MATHJAX_PACKAGE) or []:
        name = file.as_posix().removeprefix(prefix)
        if name.startswith(MATHJAX_FILES):
            found[name] = Path(str(file.locate()))
    return found


def status_page(records: Sequence[Record], runs: Path) -> str:
    """Return the page that says how the book was made, as MyST."""
    last = max(records, key=lambda record: record.machine["started"])
    where = last.machine
    training = [json.loads(p.read_text()) for p in runs.rglob("status.json")]
    rows = read_rows(rows_path(last.profile))
    versions = {"Python": where["python"], **where["packages"]}
    versions |= {name: metadata.version(name) for name in STATUS_PACKAGES}
    return STATUS_PAGE.format(
        profile=last.profile,
        rows="\n".join(
            f"| [](notebooks/{record.notebook}.ipynb) | {record.seconds:.0f} "
            f"| {record.peak_mb or '?'} | {record.machine['started'][:16]} |"
            for record in records
        ),
        training=sum(status["seconds"] for status in training),
        recorded=RECORDED.format(took(rows)) if rows else "",
        processor=where["processor"],
        gpus=", ".join(where["gpus"]) or "none",
        platform=where["platform"],
        commit=where["commit"] or "not known",
        versions="\n".join(
            f"| {name} | {version} |" for name, version in versions.items()
        ),
    )


RECORDED = "\nWhat the pages show from records was made before: {}.\n"
STATUS_PAGE = """\
# How this book was made

Every notebook was executed with the profile `{profile}`, each in a process of its own.

| notebook | seconds | peak memory (MB) | started (UTC) |
|---|--:|--:|---|
{rows}

Training inside the notebooks took {training:.0f} s in all. A notebook that found its
training done, by another notebook or by an earlier execution, does not count it again.
{recorded}
| machine | value |
|---|---|
| processor | {processor} |
| GPU | {gpus} |
| system | {platform} |
| commit | {commit} |

| package | version |
|---|---|
{versions}
"""


# Building


def build_html(build: Path, report: Callable[[str], None]) -> None:
    """Run Sphinx over ``build/source`` unless its files are those of the last time.

    It starts afresh each time: a page with a number from another page's run would
    not be made again when only that number has changed.

    Raises:
        BookError: There was a warning or an error; tells them all.
    """
    source, html, stamp = build / "source", build / "html", build / "built"
    digest = files_digest(source.rglob("*"), relative_to=source)
    if html.is_dir() and stamp.is_file() and stamp.read_text() == digest:
        return
    report("building the pages ...")
    draft, doctrees = build / "html.partial", build / "doctrees"
    for folder in (draft, doctrees):
        shutil.rmtree(folder, ignore_errors=True)
    _python("-c", JUPYTER_BOOK, "config", "sphinx", str(source))
    options = ["-W", "-n", "--keep-going", "-q", "-b", "html", "-d", str(doctrees)]
    _python("-c", SPHINX, *options, str(source), str(draft))
    stamp.unlink(missing_ok=True)
    shutil.rmtree(html, ignore_errors=True)
    draft.rename(html)
    stamp.write_text(digest)


def _python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr or done.stdout).strip()
        raise BookError(f"the pages have faults:\n{told}")

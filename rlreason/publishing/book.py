"""Make the book: execute what has changed, put the pages together, build HTML.

1. Every notebook is executed by papermill, each in a process of its own, as many at a
   time as there are cores, after the notebooks that it needs. One whose cells,
   parameters, library source and lock file are as they were is not executed again.
2. The pages of ``book/`` and the executed notebooks are laid side by side, with a
   status page (time and memory of every notebook, machine, versions) and the files of
   MathJax, so that the pages show equations without a network.
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

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rlreason.publishing.notebooks import (
    Notebook,
    Record,
    find_notebooks,
    notebook_digest,
    read_record,
    unused_keys,
)
from rlreason.runs.environment import (
    cores,
    files_digest,
    project_root,
    runs_root,
    source_digest,
)
from rlreason.runs.profiles import load_profile

MATHJAX_PACKAGE = "sphinx-mathjax-offline"
MATHJAX_FILES = ("tex-chtml-full.js", "output/chtml/fonts/woff-v2/")
# It cannot be run with `python -m`
JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"
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
    root: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Book:
    """Execute the notebooks and build the HTML book.

    Args:
        profile_name: A built-in profile or the path of one.
        jobs: Notebooks executed at a time; the number of cores where not given. With
            more than one, each runs on a single thread.
        force: Execute, and train, also what has not changed.
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
    folder = runs_root() / "book" / name
    if force:
        shutil.rmtree(folder, ignore_errors=True)
    executor = Executor(profile_name, folder, jobs or cores(), report)
    digests = {n.name: notebook_digest(n, profile) for n in notebooks}
    executed = executor.execute(notebooks, digests)
    records = [read_record(n.name, folder / "notebooks") for n in notebooks]
    records.sort(key=lambda record: record.notebook)
    build = root / "book" / "_build" / name
    collect_pages(root / "book", folder, build / "source", records)
    build_html(build, report)
    drop_old_runs(folder)
    return Book(build / "html" / "index.html", records, executed)


# Executing


@dataclass(frozen=True)
class Executor:
    """Executes notebooks of one profile, each in a process of its own."""

    profile_name: str
    folder: Path
    jobs: int
    report: Callable[[str], None]

    def execute(self, notebooks: Sequence[Notebook], digests: dict[str, str]) -> list:
        """Execute those whose output is not of their digest; return their names.

        One that fails does not keep the others from running, only those that need it.

        Raises:
            BookError: Names every notebook that failed, with what it printed.
        """
        waiting = {n.name: n for n in notebooks if not self._fresh(n, digests[n.name])}
        executed, faults = [], []
        running: dict[Future, str] = {}
        with ThreadPoolExecutor(self.jobs) as pool:
            while waiting or running:
                blocked = {*waiting, *running.values()}
                for name, notebook in list(waiting.items()):
                    if blocked.isdisjoint(notebook.needs):
                        running[pool.submit(self._run, waiting.pop(name))] = name
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    name = running.pop(future)
                    if fault := future.result():
                        faults.append(fault)
                        faults += _drop_dependents(name, waiting)
                    else:
                        executed.append(name)
        if faults:
            raise BookError("\n\n".join(faults))
        return executed

    def _fresh(self, notebook: Notebook, digest: str) -> bool:
        record = read_record(notebook.name, self.folder / "notebooks")
        output = self.folder / "notebooks" / f"{notebook.name}.ipynb"
        return record is not None and record.digest == digest and output.is_file()

    def _run(self, notebook: Notebook) -> str | None:
        """Run one notebook as ``rlreason run`` does; return what went wrong, if any."""
        self.report(f"{notebook.name} ...")
        output = self.folder / "notebooks"
        command = [sys.executable, "-m", "rlreason.cli", "run", str(notebook.path)]
        command += ["--profile", self.profile_name, "--output", str(output)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self._environment()
        )
        if done.returncode:
            # The kernel writes to stderr too
            _, ours, told = done.stderr.partition("rlreason: ")
            fault = told if ours else f"{notebook.name} failed\n{done.stderr}"
            return fault.strip()
        seconds = read_record(notebook.name, output).seconds
        self.report(f"{notebook.name} took {seconds:.0f} s")
        return None

    def _environment(self) -> dict[str, str]:
        runs = self.folder / source_digest()
        environment = {**os.environ, "RLREASON_RUNS": str(runs.resolve())}
        if self.jobs > 1:
            environment["OMP_NUM_THREADS"] = "1"
        return environment


def _drop_dependents(failed: str, waiting: dict[str, Notebook]) -> list[str]:
    """Take out of ``waiting`` all that needs a failed notebook; return a line each."""
    lines = []
    for name, notebook in list(waiting.items()):
        if failed in notebook.needs and waiting.pop(name, None):
            lines.append(f"{name} was not run: it needs {failed}")
            lines += _drop_dependents(name, waiting)
    return lines


def drop_old_runs(folder: Path) -> None:
    """Delete run folders made by source that is no more."""
    for path in folder.iterdir():
        if path.name not in ("notebooks", source_digest()):
            shutil.rmtree(path, ignore_errors=True)


# Putting the pages together


def collect_pages(book: Path, run: Path, target: Path, records: list[Record]) -> None:
    """Lay out what Sphinx reads: pages, executed notebooks, status page, MathJax."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(book, target, ignore=shutil.ignore_patterns("_build"))
    (target / "notebooks").mkdir()
    for record in records:
        name = f"notebooks/{record.notebook}.ipynb"
        shutil.copy(run / name, target / name)
    for name, path in mathjax_files().items():
        copy = target / "_extra/_static/mathjax" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    status = status_page(records, run / source_digest())
    (target / "status.md").write_text(status)


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
        processor=where["processor"],
        gpus=", ".join(where["gpus"]) or "none",
        platform=where["platform"],
        commit=where["commit"] or "not known",
        versions="\n".join(
            f"| {name} | {version} |" for name, version in versions.items()
        ),
    )


STATUS_PAGE = """\
# How this book was made

Every notebook was executed with the profile `{profile}`, each in a process of its own.

| notebook | seconds | peak memory (MB) | started (UTC) |
|---|--:|--:|---|
{rows}

Training inside the notebooks took {training:.0f} s in all. A notebook that found its
training done, by another notebook or by an earlier execution, does not count it again.

| machine | |
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
    _python("-m", "sphinx", *options, str(source), str(draft))
    stamp.unlink(missing_ok=True)
    shutil.rmtree(html, ignore_errors=True)
    draft.rename(html)
    stamp.write_text(digest)


def _python(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr or done.stdout).strip()
        raise BookError(f"the pages have faults:\n{told}")

"""Run a grid: what is done is left alone, what fails keeps nothing else from running.

::

    runs/batch/<grid>/
        grid.json            whose folder it is
        status.json          every job: state, seconds, where its log and result lie
        index.html           the same to look at, with a picture of each notebook
        <job>/log.txt        all that it printed
        <job>/<name>.ipynb   an executed notebook, with its record
        <job>/failed.json    why it failed; --retry-failed runs it again
        <job>/lock           held by the process that has the job carried out

Trained runs lie where all run folders lie, and a notebook that ``rlreason run`` or
``rlreason book`` has executed with the same parameters is taken from there. So a batch
that was stopped goes on where it was, and of two that are run at the same time on one
folder each carries out what the other does not.
"""

from __future__ import annotations

import shutil
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from html import escape
from os.path import relpath
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from filelock import FileLock

from rlreason.execution.executors import executor_named
from rlreason.execution.jobs import Job, JobError, Outcome
from rlreason.execution.recording import Progress, in_words
from rlreason.publishing.expected import least_seconds
from rlreason.publishing.grid import GridError, Item
from rlreason.runs.environment import cores as all_cores
from rlreason.runs.environment import make_folder
from rlreason.runs.files import read_json, write_atomically, write_json
from rlreason.settings import canonical_json

ORDER = ("running", "failed", "blocked", "waiting", "done", "fresh")  # in the table


def run_batch(
    items: Sequence[Item],
    output: Path,
    *,
    executor: str = "local",
    cores: int | None = None,
    retry_failed: bool = False,
    report: Callable[[str], object] = print,
    terminal: TextIO | None = None,
) -> tuple[dict[str, Outcome], str]:
    """Carry out the jobs of a grid; see ``grid.read_grid``.

    Args:
        output: The folder that the items were made for.
        executor: local, ray or slurm.
        cores: How many of this machine may be in use, where it is local.
        retry_failed: Run also those that failed before.
        report: Called with a line for each job that comes to its end.
        terminal: Takes a table of all jobs, kept up to date, in place of the lines.

    Returns:
        Outcomes by name; and what of the folder could not be written, or nothing.

    Raises:
        JobError: The executor cannot be had here.
    """
    for item in items:
        make_folder(item.folder)
    board = Board(items, output, cores or all_cores(), report, terminal)
    board.show()
    there = executor_named(
        executor,
        folder=output,
        cores=cores,
        report=board.begin,
        finished=board.finished,
    )
    jobs = [replace(i.job, fresh=partial(_is_done, i, retry_failed)) for i in items]
    try:
        return there.run(jobs), board.unwritten
    except BaseException:
        board.stopped()
        raise


def claim(output: Path, grid: Path) -> None:
    """Write down whose a folder is, which has its name from the file of a grid.

    Raises:
        GridError: It is that of another grid of the same name.
    """
    note, own = make_folder(output) / "grid.json", str(grid.resolve())
    other = Path(read_json(note).get("grid", own))
    if other.exists() and not other.samefile(grid):  # one that is gone has moved here
        raise GridError(
            f"{output} is the folder of another grid, {other}: give --output"
        )
    write_json(note, {"grid": own})


def _is_done(item: Item, retry_failed: bool) -> bool:
    """Whether an item is done, asked by who holds it; if not, its plan is written.

    Raises:
        JobError: It failed before, and is not to be tried again.
    """
    if item.job.fresh():
        return True
    if has_failed(item) and not retry_failed:
        told = read_json(item.folder / "failed.json")["told"]
        raise JobError(f"{told}\n(that was before: --retry-failed runs it again)")
    if item.plan is not None:
        text = canonical_json(item.plan)
        (item.folder / "plan.json").write_text(text, encoding="utf8")
    return False


def has_failed(item: Item) -> bool:
    """Whether it failed when it was last tried, as it stands now."""
    return read_json(item.folder / "failed.json").get("digest") == item.digest


def plan_lines(
    items: Sequence[Item], *, cores: int = 0, gpus: int = 0
) -> Iterator[str]:
    """What a batch would do, and how long it would take, for the terminal.

    Args:
        cores, gpus: That may be in use; 0: as many as are wanted.
    """
    width = max(len(item.label) for item in items)
    todo = []
    for item in items:
        if item.result() is not None:
            state = "done"
        else:
            todo.append(item)
            state = "failed before" if has_failed(item) else "to do"
            state += f", expected {item.expected or 'unknown'}"
        yield f"{item.label:<{width}}  {state}"
    known = {i.job.name: i.expected.seconds for i in todo if i.expected is not None}
    least = least_seconds([i.job for i in todo], known, cores=cores, gpus=gpus)
    there = [f"{cores} cores"] if cores else []
    there += [f"{gpus} GPUs"] if gpus else []
    yield f"{len(todo)} of {len(items)} jobs to do"
    if todo and not known:
        yield "expected hours are not known: nothing alike was run here, or recorded"
        return
    yield (
        f"expected {sum(known.values()) / 3600:.2f} hours of work, at least "
        f"{least / 3600:.2f} hours with {' and '.join(there) or 'room for all at once'}"
        + (f"; of {n} jobs it is not known" if (n := len(todo) - len(known)) else "")
    )


@dataclass
class State:
    """What is known of a job while a batch runs.

    Attributes:
        state: waiting, running, or that of its outcome.
        since: When it came to that, UTC.
        seconds: That it took.
        told: Why it failed.
        result: Where its run folder, or executed notebook, lies.
    """

    state: str = "waiting"
    since: str = ""
    seconds: float = 0.0
    told: str = ""
    result: str = ""


@dataclass
class Board:
    """Keeps what is shown of a batch: a table or lines, ``status.json``, a page.

    No job ends because its state cannot be written.

    Attributes:
        unwritten: What could not be; said once.
    """

    items: Sequence[Item]
    output: Path
    cores: int
    report: Callable[[str], object]
    terminal: TextIO | None
    states: dict[str, State] = field(init=False)
    drawn: int = 0  # lines of the table
    over: bool = False  # stopped before all jobs had their turn
    unwritten: str = ""

    def __post_init__(self) -> None:
        self._items = {item.job.name: item for item in self.items}
        self.states = {name: State() for name in self._items}
        kinds = {i.job.name: i.label.split()[0] for i in self.items}
        told = self.report if self.terminal is None else lambda line: None
        self._progress = Progress(kinds, self.cores, told)

    def begin(self, job: Job) -> None:
        """A job is started."""
        self.states[job.name] = State("running", _now())
        self.show()

    def finished(self, outcome: Outcome) -> None:
        """A job came to its end, and is held until this is written down."""
        item = self._items[outcome.name]
        tried = self.states[outcome.name].state == "running"
        told, result = "" if outcome.ok else outcome.message, item.result()
        self.states[outcome.name] = State(
            outcome.state, _now(), outcome.seconds, told, str(result or "")
        )
        with self._going_on():
            if outcome.ok:
                (item.folder / "failed.json").unlink(missing_ok=True)
                keep_picture(result, item.folder / "picture.png")
            elif tried:
                failure = {"digest": item.digest, "told": told}
                failure |= {"seconds": outcome.seconds}
                write_json(item.folder / "failed.json", failure)
        with self._going_on():
            self._progress.finished(outcome, item.label)
        self.show()

    def stopped(self) -> None:
        """Nothing runs any more: what did, without an outcome, is to be done again."""
        self.over = True
        running = (n for n, s in self.states.items() if s.state == "running")
        self.states |= {name: State() for name in running}
        self.show()

    def show(self) -> None:
        """Bring all that is shown up to date."""
        with self._going_on(), FileLock(self.output / "lock"):  # of another batch
            write_json(self.output / "status.json", self.status())
            page = self.page().encode("utf8", "replace")
            write_atomically(self.output / "index.html", page)
        if self.terminal is not None:
            self._draw(self.terminal)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Note what the system refuses to write, and go on."""
        try:
            yield
        except BrokenPipeError:  # whoever reads has seen enough
            raise
        except OSError as error:
            self.unwritten = self.unwritten or (
                f"not all that {self.output} shows of the batch could be written "
                f"({error}): make room, and give the same command again"
            )

    def status(self) -> dict:
        """The content of ``status.json``."""
        jobs = {
            name: {
                "label": item.label,
                **asdict(self.states[name]),
                "log": str(item.folder / "log.txt"),
            }
            for name, item in self._items.items()
        }
        return {"updated": _now(), "counts": self._counts(), "jobs": jobs}

    def _counts(self) -> dict[str, int]:
        counts = Counter(state.state for state in self.states.values())
        return {state: counts[state] for state in ORDER if counts[state]}

    def _summary(self) -> str:
        counts = ", ".join(f"{n} {state}" for state, n in self._counts().items())
        if self.over:
            return f"{counts}; stopped"
        return f"{counts}; {in_words(self._progress.time_left())} left"

    def _draw(self, terminal: TextIO) -> None:
        """Draw the table over the one that stands there; the foremost rows that fit."""
        columns, rows = shutil.get_terminal_size()
        names = sorted(self.states, key=lambda n: ORDER.index(self.states[n].state))
        lines = [self._summary()]
        for name in names[: max(rows - 3, 1)]:
            state = self.states[name]
            when = f"{state.seconds:.0f} s" if state.seconds else state.since[11:19]
            lines.append(f"{state.state:<8} {when:>8}  {self._items[name].label}")
        back = f"\x1b[{self.drawn}F\x1b[J" if self.drawn else ""
        terminal.write(back + "".join(f"{line[: columns - 1]}\n" for line in lines))
        terminal.flush()
        self.drawn = len(lines)

    def page(self) -> str:
        """The content of ``index.html``."""
        rows = [
            self._row(item, self.states[name]) for name, item in self._items.items()
        ]
        open_ = any(s.state in ("waiting", "running") for s in self.states.values())
        goes_on = open_ and not self.over
        again = '<meta http-equiv="refresh" content="10">' if goes_on else ""
        return PAGE.format(
            title=escape(self.output.name),
            again=again,
            summary=escape(self._summary()),
            rows="\n".join(rows),
        )

    def _row(self, item: Item, state: State) -> str:
        picture = item.folder / "picture.png"
        seen = (
            f'<img src="{self._link(picture)}" alt="{escape(item.label)}">'
            if picture.is_file()
            else ""
        )
        links = {"result": state.result, "log": item.folder / "log.txt"}
        shown = " ".join(
            f'<a href="{self._link(path)}">{word}</a>'
            for word, path in links.items()
            if path and Path(path).exists()
        )
        why = f"<pre>{escape(state.told)}</pre>" if state.told else ""
        return (
            f'<tr class="{state.state}"><td>{seen}</td><td>{escape(item.label)}{why}'
            f"</td><td>{state.state}</td><td>{state.seconds:.0f}</td><td>{shown}</td>"
            "</tr>"
        )

    def _link(self, path: Path | str) -> str:
        return escape(quote(Path(relpath(path, self.output)).as_posix()))


def keep_picture(notebook: Path | None, picture: Path) -> None:
    """Write the first image that an executed notebook shows, if it shows one."""
    if notebook is None or notebook.suffix != ".ipynb":
        return
    cells = read_json(notebook).get("cells", [])
    shown = [output for cell in cells for output in cell.get("outputs", [])]
    images = (output.get("data", {}).get("image/png") for output in shown)
    if image := next(filter(None, images), None):
        write_atomically(picture, b64decode("".join(image)))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8">{again}<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: 0.4em 0.8em; border-bottom: 1px solid #ccc; text-align: left; }}
img {{ max-width: 160px; max-height: 110px; }}
pre {{ white-space: pre-wrap; max-width: 60em; max-height: 20em; overflow: auto; }}
.failed td {{ background: #fdd; }} .blocked td {{ background: #fed; }}
.running td {{ background: #eef; }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<table>
<tr><th>picture</th><th>job</th><th>state</th><th>seconds</th><th>files</th></tr>
{rows}
</table>
</body></html>
"""

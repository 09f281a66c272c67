"""Kill short runs again and again: nothing may be lost, doubled or wrong.

    python tests/kills.py --kills 200       (also: make kills)

lets two processes make the same batch of runs (SFT, expert iteration, PPO, RCRL, a
reward model, kept answers) in one folder, and kills one or the other at random moments,
until the batch is done; then the next batch, until there were so many kills. Rows,
weights and answers must be those of a batch that nothing disturbed, to the bit.

    python tests/kills.py --writes

lets a shorter run die at each of its writes in turn, and once more fill the disk there.

Processes are forked, so that none has to load torch. What is forked must have one
thread: this file is run as a program also by the tests.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tiny_models import tiny_policy
from toys import TOY_PROBLEMS, die, run_toy, toy_policy, toy_recipe, written

from rlreason.policy.rollout import Prompt, Rollout
from rlreason.policy.sampler import Asked
from rlreason.runs import files
from rlreason.runs import folder as module
from rlreason.runs import steps as train
from rlreason.runs.folder import RunFolder, RunFolderError
from rlreason.runs.kept_rollouts import kept_answers
from rlreason.settings import Settings

# --- Writes --------------------------------------------------------------------------

NEED_ROOM = ("open", "os.mkdir", "os.rename", "save_file", "write", "flush", "fsync")
WRITING = os.O_WRONLY | os.O_RDWR


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class Writes:
    """Lets a fault happen at one of the writes of this process, which it counts.

    Args:
        root: Only files below it count, by the names that Python's audit gives.
        at: The write at which ``fault`` is called, from 1 on.
        fault: Given the kind of the write, and what leaves it half done.
    """

    def __init__(
        self,
        root: Path,
        at: int | None = None,
        fault: Callable[[str, Callable[[], Any]], None] | None = None,
    ) -> None:
        self.root, self.at, self.fault = str(root), at, fault
        self.seen: list[str] = []
        self.failing = False

    def point(self, kind: str, half: Callable[[], Any] = lambda: None) -> None:
        """A write is about to be made; what makes it half is none itself."""
        if self.failing:
            return
        self.seen.append(kind)
        if self.fault is not None and len(self.seen) >= (self.at or 0):
            self.failing = True
            try:
                self.fault(kind, half)
            finally:
                self.failing = False

    def __enter__(self) -> Writes:
        """Watch, until the block ends."""
        whole = module.save_file, Path.write_bytes, module.open_at, os.fsync

        def save(tensors, path):
            self.point("save_file", lambda: Path(path).touch())
            whole[0](tensors, path)
            half = Path(path).stat().st_size // 2
            self.point("save_file", lambda: os.truncate(path, half))

        def write(path, content):
            half = content[: len(content) // 2]
            self.point("write", lambda: whole[1](path, half))
            return whole[1](path, content)

        def restore() -> None:
            module.save_file, Path.write_bytes, module.open_at, os.fsync = whole

        module.save_file, Path.write_bytes = save, write
        module.open_at = lambda *given: _Log(whole[2](*given), self)
        os.fsync = lambda descriptor: self.point("fsync")
        _WATCHING.append(self)
        self._restore = restore
        return self

    def __exit__(self, *_: Any) -> None:
        _WATCHING.remove(self)
        self._restore()


_WATCHING: list[Writes] = []
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def _audit(event: str, given: tuple) -> None:
    """Told by Python of what it is about to do; such a hook cannot be taken back."""
    for writes in _WATCHING:
        opens = event == "open" and given[2] & WRITING
        if (opens or event in _CHANGES) and not isinstance(given[0], int):
            # What rmtree removes has a name that is relative to a folder
            removed = event in ("os.remove", "os.rmdir")
            if removed or os.fspath(given[0]).startswith(writes.root):
                writes.point(event)


class _Log:
    """A log whose rows come to the disk one by one, or half."""

    def __init__(self, file, writes: Writes) -> None:
        self.file, self.writes, self.rows = file, writes, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, row: bytes) -> None:
        self.file.write(row[: len(row) // 2])
        self.rows.append(row[len(row) // 2 :])

    def flush(self) -> None:
        for rest in self.rows:
            self.writes.point("flush", self.file.flush)
            self.file.write(rest)
        self.rows.clear()
        self.file.flush()


class Line(Settings):
    steps: int = 3


def line(root: Path) -> None:
    """A run of milliseconds: it samples, and logs three rows.

    Each group is a block; a checkpoint comes after the first row and the last.
    """
    with RunFolder("line", Line(), root=root, keep=1, save_every=0) as run:
        if run.done:
            return
        saved = run.restore()
        weights = saved.tensors["weights"] if saved else torch.ones(2) * sampled(run)
        for step in range(saved.state["steps"] if saved else 0, Line().steps):
            weights = 2 * weights + step
            run.log("step", step=step, sum=weights.sum())
            if step != 1:
                run.save({"weights": weights}, {"steps": step + 1})


def sampled(run: RunFolder) -> int:
    """The sum of what is drawn, or was: the tokens of two groups."""

    def draw(chosen):
        for i in chosen:
            yield i, [Rollout("p", 0, (1,), (50 + i,), (-0.5,), "", False)]

    groups = run.keep_groups(_asked(), draw, range(2))
    return sum(rollout.tokens[0] for _, (rollout,) in groups)


@cache
def _asked() -> Asked:
    return Asked(tiny_policy(), [Prompt("p", (1,))] * 2, [1, 1], 1.0, 1, 0, None)


def left(root: Path) -> dict[str, bytes]:
    """All files that a run left, but for those that hold times and processes."""
    differ = ("status.json", "environment.json", "timing.jsonl")
    differ += ("bookmark.json", "hashes.json")
    files = {
        str(path.relative_to(root)): b"" if path.name in differ else path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }
    (run,) = root.iterdir()
    rows = len((run / "timing.jsonl").read_bytes().splitlines())
    done = json.loads((run / "status.json").read_text())["status"] == "done"
    return files | {"rows of timing": str(rows).encode(), "done": str(done).encode()}


def dies(root: Path, at: int) -> bool:
    """Kill a run at a write, which is half done. Did it die?"""

    def fault(kind: str, half: Callable[[], Any]) -> None:
        half()
        die()

    def run() -> None:
        with Writes(root, at, fault):
            line(root)

    return in_child(run) == -signal.SIGKILL


def fills(root: Path, at: int) -> bool:
    """Let the disk be full from a write on, and make room again. Was it worded?"""
    held = []

    def fault(kind: str, half: Callable[[], Any]) -> None:
        if kind in NEED_ROOM:
            half()
            raise SafetensorError(str(full())) if kind == "save_file" else full()

    with Writes(root, at, fault) as writes:
        try:
            line(root)
            needs_room = writes.seen[at - 1] in NEED_ROOM
        except (OSError, RunFolderError) as error:
            held.append(error)  # as a notebook does, with all that was not written
            needs_room = "No space left" not in str(error)
    line(root)
    held.clear()
    gc.collect()
    return not needs_room


def read_only(folder: Path) -> dict[str, Any]:
    """What runs that are new, begun and done say to a disk that takes nothing."""

    def refuse(kind: str, half: Callable[[], Any]) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    line(folder / "done")
    dies(folder / "begun", 40)
    told = {}
    for name in ("new", "begun", "done"):
        with Writes(folder, 1, refuse) as writes:
            try:
                line(folder / name)
                told[name] = f"fine, with {len(writes.seen)} writes"
            except (OSError, RunFolderError) as error:
                told[name] = f"{type(error).__name__}: {error}"
    return told


def each_write(
    fails: Callable[[Path, int], bool], folder: Path, *, enough: int | None = None
) -> dict[str, Any]:
    """Let a run fail at each of its writes; at which is what it leaves wrong?"""
    folder.mkdir()
    with Writes(folder) as writes:
        line(folder / "undisturbed")
    expected, wrong = left(folder / "undisturbed"), []
    for at, kind in enumerate(writes.seen, start=1):
        root = folder / f"{at}"
        try:
            fine = fails(root, at)
            line(root)  # goes on
            fine = fine and left(root) == expected
        except (OSError, ValueError):
            fine = False
        if not fine:
            wrong.append([at, kind])
        if len(wrong) == enough:
            break
    return {"writes": len(writes.seen), "wrong": wrong}


def in_child(work: Callable[[], Any]) -> int:
    """Do it in a process of its own; return how that ended."""
    _, outcome = os.waitpid(start(work), 0)
    return os.waitstatus_to_exitcode(outcome)


def start(work: Callable[[], Any]) -> int:
    """Begin it in a process of its own; return its number."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


# Wrong versions of a run folder, which these tests must find out


WRONG = ("rows-are-not-cut", "files-in-place")


@contextmanager
def wrong_version(name: str) -> Iterator[None]:
    """Run folders with a fault, for each of which there is a write that shows it."""
    whole = module.open_at, files.write_atomically
    if name == "rows-are-not-cut":
        module.open_at = lambda path, size: path.open("ab")
    else:
        files.write_atomically = lambda path, content: path.write_bytes(content)
    try:
        yield
    finally:
        module.open_at, files.write_atomically = whole


# --- Random moments ------------------------------------------------------------------

TRAIN = {
    "expert-iteration": train.train_expert_iteration,  # and SFT before it
    "ppo": train.train_ppo,
    "rcrl": train.train_rcrl,
    "orm": train.train_reward_model,
}
WORKERS = 2
SMALL = 5  # kills, in the suite
MOST = 30  # kills of a batch


def batch(recipe, root: Path, steps: Iterable[str]) -> dict[str, Any]:
    """Make all runs of the batch, or load those that are done."""
    for step in steps:
        run_toy(TRAIN[step], recipe, root, save_every=2)
    options = {"k": 4, "temperature": 1.0, "max_new_tokens": 24, "seed": 0}
    os.environ["RLREASON_RUNS"] = str(root)
    due, RunFolder.due = RunFolder.due, lambda self: True
    try:
        answers = dict(kept_answers(toy_policy(), TOY_PROBLEMS, **options))
    finally:
        RunFolder.due = due
    # Their log-probabilities are rounded otherwise in other batches: see blocks
    return {i: [rollout.tokens for rollout in each] for i, each in answers.items()}


def result(recipe, root: Path, steps: Iterable[str]) -> dict[str, Any]:
    """What a batch that is done left, with its answers."""
    answers = batch(recipe, root, steps)  # loads
    files = written(root)
    kept = {name for name in files if name.startswith("answers-")}
    rows = {name: content for name, content in files.items() if name not in kept}
    return rows | {"answers": answers}


def compare(found: dict[str, Any], expected: dict[str, Any]) -> Counter:
    """Count what is lost, doubled and wrong."""
    faults = Counter(lost=0, doubled=0, wrong=0)
    faults["lost"] += len(expected.keys() - found.keys())
    faults["doubled"] += len(found.keys() - expected.keys())
    for name in expected.keys() & found.keys():
        if found[name] == expected[name]:
            continue
        if not name.endswith("/metrics"):
            faults["wrong"] += 1
            continue
        rows = [len(files[name].splitlines()) for files in (found, expected)]
        kind = {-1: "lost", 1: "doubled", 0: "wrong"}
        faults[kind[(rows[0] > rows[1]) - (rows[0] < rows[1])]] += 1
    return faults


def random_kills(
    kills: int, folder: Path, steps: Iterable[str], *, seed: int
) -> dict[str, Any]:
    """Kill at random moments until there were so many; compare each batch."""
    rng = random.Random(seed)
    recipe = toy_recipe(folder)
    began = time.monotonic()
    in_child(lambda: batch(recipe, folder / "undisturbed", steps))
    length = time.monotonic() - began
    expected = result(recipe, folder / "undisturbed", steps)
    report = Counter(batches=0, kills=0, lost=0, doubled=0, wrong=0)
    killed_in: Counter = Counter()
    while report["kills"] < kills:
        root = folder / f"batch-{report['batches']}"
        report["kills"] += _disturbed(
            lambda root=root: batch(recipe, root, steps),
            root,
            rng,
            length,
            killed_in,
            most=min(kills - report["kills"], MOST),
        )
        report.update(compare(result(recipe, root, steps), expected))
        report["batches"] += 1
        print(
            f"{report['kills']} kills in {report['batches']} batches", file=sys.stderr
        )
    return {**report, "seconds a batch": round(length, 1), "killed in": dict(killed_in)}


def _disturbed(
    work: Callable[[], Any],
    root: Path,
    rng: random.Random,
    length: float,
    killed_in: Counter,
    most: int,
) -> int:
    """Let workers do the same work until one comes to its end; return the kills."""
    kills, workers = 0, []
    while True:
        while len(workers) < WORKERS:
            workers.append(start(work))
        time.sleep(rng.uniform(0, length / 4))
        ended = [os.waitpid(pid, os.WNOHANG) for pid in workers]
        if any(pid for pid, _ in ended) or kills == most:
            break
        victim = workers.pop(rng.randrange(WORKERS))
        os.kill(victim, signal.SIGKILL)
        _, outcome = os.waitpid(victim, 0)
        if os.waitstatus_to_exitcode(outcome) == -signal.SIGKILL:
            kills += 1
            killed_in[_at_work(root)] += 1
    for pid, (gone, outcome) in zip(workers, ended, strict=True):
        code = os.waitstatus_to_exitcode(outcome if gone else os.waitpid(pid, 0)[1])
        if code:
            raise SystemExit(f"a worker in {root} ended with {code}")
    return kills


def _at_work(root: Path) -> str:
    """The kind of the run that was not done at a kill."""
    for status in root.glob("*/status.json"):
        with suppress(ValueError, FileNotFoundError):
            if json.loads(status.read_text())["status"] != "done":
                return status.parent.name.rpartition("-")[0]
    return "between"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=0, help="at random moments")
    parser.add_argument("--writes", action="store_true", help="fail at each write")
    parser.add_argument("--only", choices=TRAIN, action="append", help="of the batch")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    os.environ["RLREASON_QUIET"] = "1"
    torch.set_num_threads(1)
    sys.addaudithook(_audit)
    gc.freeze()  # what is imported need not be looked through at each write
    os.fsync = lambda descriptor: None  # nobody pulls the plug here
    found = {}
    with tempfile.TemporaryDirectory() as place:
        if chosen.writes:
            for fails in (dies, fills):
                found[fails.__name__] = each_write(fails, Path(place) / fails.__name__)
            found["read-only"] = read_only(Path(place) / "read-only")
            for name in WRONG:  # versions of which at least one write must tell
                with wrong_version(name):
                    told = each_write(fills, Path(place) / name, enough=1)["wrong"]
                found[name] = told
        if chosen.kills:
            folder = Path(place) / "random"
            folder.mkdir()
            found["random"] = random_kills(
                chosen.kills, folder, chosen.only or TRAIN, seed=chosen.seed
            )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""A run is a folder: settings, metrics, checkpoints, environment, status.

``RunFolder`` is the ``Recorder`` of real runs. Its folder is named after the kind of
experiment and the hash of its settings, so that a run that is done is not run twice::

    with RunFolder("sft", settings) as run:
        if not run.done:
            train_sft(policy, problems, settings=settings, recorder=run)
    weights = run.restore().tensors

::

    runs/sft-1f0c9a.../
        settings.json       the settings, canonical
        metrics.jsonl       what the algorithm logged; equal runs, equal bits (CPU)
        timing.jsonl        seconds since the start of the run, one row a row of metrics
        checkpoints/000012/ weights.safetensors, state.json, bookmark.json, hashes.json
        rollouts/           what was sampled since the last checkpoint, see ``blocks``
        environment.json    versions, device, commit, threads, for every session
        status.json         running, done or failed; seconds
        lock                held by the process that writes; others wait for it

A killed run leaves complete checkpoints and some rows too many. The next one cuts
``metrics.jsonl`` back to where the last complete checkpoint was taken and goes on from
there. A checkpoint is written beside its place, forced to disk, and renamed: it is
there wholly or not at all. One that no longer holds what was written, by its hashes, is
not gone on from: the one before it is. There is no pickle in a run folder.

What is sampled for hours is kept while more is, in blocks: the next session draws what
is missing, and a checkpoint that holds what came of them takes their place.

What this leaves out: several processes that write one run (data parallel training logs
from its first process alone), and network file systems without working locks.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlreason.algorithms.recorder import Checkpoint
from rlreason.policy.parallel import Group
from rlreason.policy.progress import tell
from rlreason.policy.sampler import Asked, Draw
from rlreason.runs.blocks import Blocks
from rlreason.runs.contents import sha256_of
from rlreason.runs.environment import (
    environment,
    runs_root,
    source_digest,
    version_of,
)
from rlreason.runs.files import draft_of, force_path, write_atomically, write_json
from rlreason.runs.stopping import heeding
from rlreason.settings import (
    SettingsError,
    canonical_json,
    identity,
    load_settings,
    settings_hash,
)

PARTS = ("weights.safetensors", "state.json", "bookmark.json")  # of a checkpoint
HASHES = "hashes.json"


class RunFolderError(ValueError):
    """A run folder that cannot be used: of other settings, damaged, or not writable."""


class RunFolder:
    """One run on disk; a context manager while it is written, and a ``Recorder``.

    Args:
        kind: What is run, e.g. ``"sft"``; the first part of the folder's name.
        settings: A ``Settings`` instance or a frozen dataclass; all that decides the
            run's result.
        root: Folder of run folders; ``runs_root()`` where not given.
        keep: How many of the newest checkpoints stay.
        save_every: Seconds from one checkpoint to the next one that is ``due()``; also
            the most work that a kill can cost. 0: always due.
    """

    def __init__(
        self,
        kind: str,
        settings: Any,
        *,
        root: Path | str | None = None,
        keep: int = 2,
        save_every: float = 30.0,
    ) -> None:
        if keep < 1:
            raise RunFolderError(f"keep={keep}: a run needs at least one checkpoint")
        self.path = Path(root or runs_root()) / f"{kind}-{settings_hash(settings)}"
        self.settings = settings
        self._keep = keep
        self._save_every = save_every
        self._lock = FileLock(self.path / "lock")
        self._metrics: BinaryIO | None = None
        self._timing: BinaryIO | None = None
        self._stages: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r}, {self.status.get('status', 'new')})"

    # What can be asked of a run at any time, also while another process writes it

    @property
    def status(self) -> dict[str, Any]:
        """The content of ``status.json``; empty for a run that never began."""
        return _read_json(self.path / "status.json") or {}

    @property
    def done(self) -> bool:
        """True when the run came to its end."""
        return self.status.get("status") == "done"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All rows logged so far; of a running run, those written to the disk."""
        return _read_rows(self.path / "metrics.jsonl")

    @property
    def timing(self) -> list[dict[str, Any]]:
        """One row for each row of ``metrics``: seconds of work when it was logged.

        Also the seconds of each stage since the row before, see ``clock``.
        """
        return _read_rows(self.path / "timing.jsonl")

    def restore(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, None where there is none."""
        return read_checkpoint(self.path)

    # Writing

    def __enter__(self) -> RunFolder:
        """Take the folder for this process and wind it back; leave it if it is done.

        Where another process is writing this run, wait for it: then the run is done, or
        is taken up where that process was stopped. A SIGTERM within the block ends the
        process at the next checkpoint, see ``stopping``.

        Raises:
            RunFolderError: The folder holds a run of other settings, or of a newer
                version; or all its checkpoints are damaged.
        """
        self._check_what_is_there()
        if self.done:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"no run folder can be made in {self.path.parent}: {error}; point "
                "RLREASON_RUNS to a folder that can be written"
            ) from None
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            pid = self.status.get("pid", "(starting)")
            tell(f"waiting for process {pid}, which is writing {self.path}")
            self._lock.acquire()
        if self.done:  # finished between the look and the lock
            self._lock.release()
            return self
        with ExitStack() as undo:  # `__exit__` is not called where this fails
            undo.callback(self._lock.release)
            undo.callback(self.close_logs)
            self._begin()
            self._stop = undo.enter_context(heeding())
            self._leave = undo.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        """Write the outcome, done or failed, and let the folder go."""
        if self._metrics is None:
            return
        with self._leave:
            self.close_logs()
            if error is None:
                self._drop_rollouts()  # which a kill may have left
                self._write_status("done")
                self._stop.obey()
            else:
                with suppress(OSError):  # a full disk is not to hide what went wrong
                    self._write_status("failed", error=f"{kind.__name__}: {error}")

    def log(self, kind: str, **metrics: Any) -> None:
        """Append one row to ``metrics.jsonl``; NaN and infinity are written as null.

        Raises:
            TypeError: A value is neither number, string, bool, None nor scalar tensor.
        """
        self._require_open()
        plain = {name: _plain(name, value) for name, value in metrics.items()}
        row = {"kind": kind, **plain}
        self._metrics.write(_json_line(row))
        stages = {stage: round(s, 4) for stage, s in self._stages.items()}
        timing = {"seconds": round(self._seconds(), 3), **stages}
        self._stages.clear()
        self._timing.write(_json_line(timing))
        self._metrics.flush()
        self._timing.flush()

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the block's seconds to ``stage`` in the timing of the next row."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = self._stages.get(stage, 0.0) + time.monotonic() - start
            self._stages[stage] = spent

    def due(self) -> bool:
        """True when ``save_every`` seconds have passed since the last checkpoint.

        More where writing one takes long: it shall cost 5% of the time at most. Also
        when this process is asked to end.
        """
        wait = max(self._save_every, 20 * self._save_took)
        return self._stop.asked or time.monotonic() - self._saved_at >= wait

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint, wholly or not at all, and drop the oldest.

        Args:
            tensors: By name, on any device; tensors that share memory are copied.
            state: JSON values; tuples become lists.

        Raises:
            RunFolderError: It cannot be written; those before it stay.
            Stopped: It is written, and this process was asked to end.
        """
        self._require_open()
        latest = self._latest()
        number = 1 if latest is None else int(latest.name) + 1
        final = self._checkpoints / f"{number:06d}"
        with self._saving(final):
            self._write_checkpoint(final, tensors, state)
            self._prune()
            self._drop_rollouts()

    def keep_groups(
        self, asked: Asked, draw: Draw, own: Sequence[int]
    ) -> Iterator[Group]:
        """Keep groups of rollouts in blocks, as often as checkpoints would be taken.

        Raises:
            RunFolderError: A block cannot be written; those before it stay.
            Stopped: It is written, and this process was asked to end.
        """
        self._require_open()
        blocks, fresh = Blocks(self._rollouts, asked), {}
        found, seconds = blocks.read(own)
        self._seconds_before += seconds
        yield from found.items()
        self._save_took = 0.0  # a block is small, whatever the last checkpoint was
        for i, group in draw([i for i in own if i not in found]):
            fresh[i] = group
            if RunFolder.due(self):  # this process, whatever others do
                with self._saving(blocks.folder):
                    blocks.write(fresh, time.monotonic() - self._saved_at)
                fresh.clear()
            yield i, group

    @contextmanager
    def _saving(self, place: Path) -> Iterator[None]:
        """Write what is to be there wholly or not at all, and end if that is asked."""
        began = time.monotonic()
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(draft_of(place), ignore_errors=True)  # it takes room
            raise RunFolderError(
                f"{place} cannot be written ({error}): make room, or let RLREASON_RUNS "
                "be a folder that can be written; the same command goes on from what "
                "was written before"
            ) from None
        self._saved_at = time.monotonic()
        # 0: whoever asks for every checkpoint gets it
        self._save_took = self._saved_at - began if self._save_every else 0.0
        if self._stop.asked:
            tell(f"asked to end: {self.path} is kept up to here, to be gone on with")
        self._stop.obey()

    def _write_checkpoint(
        self, final: Path, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        """Write all of a checkpoint beside its place, then give it its name."""
        bookmark = {
            "metrics_bytes": _force(self._metrics),
            "timing_bytes": _force(self._timing),
            "seconds": round(self._seconds(), 3),
        }
        draft = draft_of(final)
        draft.mkdir(parents=True)
        own = {name: _own(tensor) for name, tensor in tensors.items()}
        save_file(own, draft / "weights.safetensors")
        (draft / "state.json").write_bytes(_json_line(state))
        (draft / "bookmark.json").write_bytes(_json_line(bookmark))
        (draft / HASHES).write_bytes(_json_line(_hashes(draft)))
        for file in [*draft.iterdir(), draft]:
            force_path(file)
        draft.rename(final)
        force_path(self._checkpoints)

    def _prune(self) -> None:
        """Drop all checkpoints but the newest, and what kills left half written."""
        kept = self.complete_checkpoints()[-self._keep :]
        if self._checkpoints.is_dir():
            for path in set(self._checkpoints.iterdir()) - set(kept):
                shutil.rmtree(path, ignore_errors=True)

    def _drop_rollouts(self) -> None:
        """Drop what was sampled before the checkpoint that is there."""
        shutil.rmtree(self._rollouts, ignore_errors=True)

    def _drop_damaged(self) -> None:
        """Drop the newest checkpoints as far as they are damaged; never the last one.

        Raises:
            RunFolderError: All are.
        """
        found, damaged = self.complete_checkpoints(), {}
        while found and (fault := _fault(found[-1])):
            damaged[found.pop()] = fault
        if damaged and not found:
            raise _damaged(*next(iter(damaged.items())))
        for path, fault in damaged.items():
            warnings.warn(
                f"{path} is damaged ({fault}): going on from the checkpoint before it, "
                f"{found[-1].name}",
                stacklevel=4,
            )
            shutil.rmtree(path)

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _rollouts(self) -> Path:
        return self.path / "rollouts"

    def complete_checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first; drafts are not among them."""
        return _complete_checkpoints(self.path)

    def _latest(self) -> Path | None:
        return next(reversed(self.complete_checkpoints()), None)

    def _check_what_is_there(self) -> None:
        """Refuse a folder of other settings; warn of results of other source."""
        written = read_settings(self.path)
        if written is not None and not self._are_mine(written):
            raise RunFolderError(
                f"{self.path / 'settings.json'} does not hold the settings its folder "
                f"is named after: it was changed by hand; delete {self.path} to start "
                "again"
            )
        sessions = _read_json(self.path / "environment.json") or []
        if any(session["source"] != source_digest() for session in sessions):
            warnings.warn(
                f"{self.path} comes from another version of the source; delete it to "
                "run the experiment again",
                stacklevel=3,
            )

    def _are_mine(self, written: Any) -> bool:
        """Whether settings from the disk are the same but for placement.

        Settings that there are no more are passed over: they were neutral, or the
        folder would have another name.
        """
        known = json.loads(canonical_json(self.settings))
        try:
            found = load_settings(type(self.settings), _known_part(written, known))
        except (SettingsError, TypeError):
            return False
        return identity(found) == identity(self.settings)

    def _begin(self) -> None:
        """Wind the logs back to the last checkpoint and open them for appending."""
        self._drop_damaged()
        self._prune()
        latest = self._latest()
        bookmark = _read_json(latest / "bookmark.json") if latest else {}
        self._metrics = open_at(
            self.path / "metrics.jsonl", bookmark.get("metrics_bytes", 0)
        )
        self._timing = open_at(
            self.path / "timing.jsonl", bookmark.get("timing_bytes", 0)
        )
        self._start_clock(bookmark.get("seconds", 0.0))
        settings = canonical_json(self.settings).encode() + b"\n"
        write_atomically(self.path / "settings.json", settings)
        sessions = _read_json(self.path / "environment.json") or []
        write_json(self.path / "environment.json", [*sessions, environment()])
        self._write_status("running")

    def close_logs(self) -> None:
        """Bring both logs to the disk; afterwards nothing can be written."""
        files = [file for file in (self._metrics, self._timing) if file is not None]
        self._metrics = self._timing = None
        with ExitStack() as closing:
            for file in files:  # raw: what a full disk refused is not written later
                closing.callback(file.raw.close)
            for file in files:
                _force(file)

    def _start_clock(self, seconds: float = 0.0) -> None:
        self._seconds_before = seconds
        self._started_at = self._saved_at = time.monotonic()
        self._save_took = 0.0

    def _seconds(self) -> float:
        """Seconds of work that this run's present state took, over all sessions."""
        return self._seconds_before + time.monotonic() - self._started_at

    def _write_status(self, status: str, **more: Any) -> None:
        seconds = round(self._seconds(), 3)
        content = {"status": status, "seconds": seconds, "pid": os.getpid(), **more}
        write_json(self.path / "status.json", content)

    def _require_open(self) -> None:
        if self._metrics is None:
            raise RunFolderError(
                f"{self.path} is not open for writing: use it in a `with` block, and "
                "not after the run is done"
            )


def read_checkpoint(run: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint of a run folder, None without one.

    Raises:
        RunFolderError: It is damaged.
    """
    complete = _complete_checkpoints(run)
    if not complete:
        return None
    latest = complete[-1]
    if fault := _fault(latest):
        raise _damaged(latest, fault)
    try:
        tensors = load_file(latest / "weights.safetensors")
    except (SafetensorError, OSError) as error:  # of a version that kept no hashes
        raise _damaged(latest, str(error)) from None
    return Checkpoint(tensors, _read_json(latest / "state.json"))


def read_settings(run: Path) -> dict[str, Any] | None:
    """Return the settings of a run folder as plain values, None where it is none.

    Raises:
        RunFolderError: It was written by a newer version of this package.
    """
    ours = version_of("rlreason")
    for session in _read_json(run / "environment.json") or []:
        theirs = session["packages"]["rlreason"]
        if ours and theirs and _order(theirs) > _order(ours):
            raise RunFolderError(
                f"{run} was written by rlreason {theirs}, which is newer than this "
                f"{ours}: update rlreason, or let RLREASON_RUNS be another folder"
            )
    return _read_json(run / "settings.json")


def _order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _hashes(checkpoint: Path) -> dict[str, str]:
    return {name: sha256_of(checkpoint / name) for name in PARTS}


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None where it holds what was written."""
    if missing := [name for name in PARTS if not (checkpoint / name).is_file()]:
        return f"without {', '.join(missing)}"
    try:
        written = json.loads((checkpoint / HASHES).read_bytes())
        found = _hashes(checkpoint)
    except FileNotFoundError:
        return None  # of a version that kept no hashes
    except (OSError, ValueError) as error:
        return str(error)
    return None if written == found else "by its hashes, it is not as it was written"


def _damaged(checkpoint: Path, fault: str) -> RunFolderError:
    run = checkpoint.parents[1]
    others = len(_complete_checkpoints(run)) > 1
    remedy = (
        f"delete {run / 'status.json'} to go on from the checkpoint before it"
        if others
        else f"delete {run} to train it again"
    )
    return RunFolderError(f"{checkpoint} is damaged ({fault}); {remedy}")


def _complete_checkpoints(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.isdigit())


def _plain(name: str, value: Any) -> Any:
    """Return a metric as JSON holds it."""
    if hasattr(value, "item"):  # scalar tensors and NumPy numbers
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"metric {name!r} is a {type(value).__name__}, not a number")
    return value


def _own(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU: safetensors refuses views and shared memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _json_line(value: Any) -> bytes:
    return (json.dumps(value, allow_nan=False) + "\n").encode()


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file, None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise RunFolderError(
            f"{path} is damaged ({error}); delete its run folder to start again"
        ) from None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file; a half-written last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise RunFolderError(
            f"{path} is damaged ({error}); delete {path.parent} to train it again"
        ) from None


def _known_part(written: Any, known: Any) -> Any:
    """What is written without keys that are not known, in mappings within mappings."""
    if not isinstance(written, dict) or not isinstance(known, dict):
        return written
    return {
        key: _known_part(value, known[key])
        for key, value in written.items()
        if key in known
    }


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a log for appending, cut back to ``size`` bytes."""
    path.touch()
    found = path.stat().st_size
    if found < size:
        raise RunFolderError(
            f"{path} has {found} bytes, but the last checkpoint was taken at {size}: "
            f"it was changed by hand; delete {path.parent} to start again"
        )
    os.truncate(path, size)
    return path.open("ab")


def _force(file: BinaryIO) -> int:
    """Bring a log to the disk and return its size in bytes."""
    file.flush()
    os.fsync(file.fileno())
    return file.tell()

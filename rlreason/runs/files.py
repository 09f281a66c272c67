"""Files that are there wholly or not at all, and that outlive a loss of power."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlreason.settings import HASH_LENGTH


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; nothing where it is not there, or no JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file; see ``write_atomically``."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a reader sees the old content or the new, never half.

    By one process at a time: who shares a file with others holds a lock. The draft has
    one name, so that what a kill leaves of it is written over and does not gather.
    """
    draft = draft_of(path)
    try:
        draft.write_bytes(content)
        force_path(draft)
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()  # it takes room
        raise


def draft_of(path: Path) -> Path:
    """Where something is written before it gets its name."""
    return path.with_name(f"{path.name}.partial")


def force_path(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The start of a file's SHA-256; read once as long as the file stays as it is."""
    stat = path.stat()
    return _file_digest(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def _file_digest(path: Path, mtime: int, size: int) -> str:
    return sha256_of(path)[:HASH_LENGTH]


def sha256_of(path: Path) -> str:
    """A file's SHA-256, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()

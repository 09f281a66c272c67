"""Where a run takes place: folders, machine, versions, and the state of the source."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from rlreason.settings import SettingsError

PACKAGE = Path(__file__).resolve().parents[1]
REPORTED_PACKAGES = ("rlreason", "torch", "transformers", "tokenizers", "numpy")
FOLDERS = ("RLREASON_RUNS", "RLREASON_DATA", "RLREASON_MODELS")
# The rooms that decide a result; the others compare, place, show and measure
ROOMS_OF_RESULTS = (
    "tasks",
    "mdp.py",
    "policy",
    "rewards",
    "algorithms",
    "evaluation",
    "runs",
    "assets",
)


def runs_root() -> Path:
    """Return the folder of run folders: ``RLREASON_RUNS``, else ``runs``."""
    named = os.environ.get("RLREASON_RUNS")
    return Path(named).expanduser() if named else project_root() / "runs"


def folders() -> dict[str, str]:
    """Return the variables that tell of folders here, for a process in another one."""
    named = {name: os.environ.get(name) for name in FOLDERS}
    named["RLREASON_RUNS"] = str(runs_root())
    return {
        name: str(Path(folder).expanduser().absolute())
        for name, folder in named.items()
        if folder
    }


def make_folder(path: Path) -> Path:
    """Return a folder, which is made where it is not there.

    Raises:
        SettingsError: It cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"the folder {path} cannot be made ({error.strerror}): name another one, "
            "or point RLREASON_RUNS to a folder that can be written"
        ) from None
    return path


def project_root() -> Path:
    """Return the checkout this package is run from, else the working folder."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


def results_folder(profile: str | Path) -> Path:
    """Return where all that is recorded of a profile lies."""
    return project_root() / "book" / "results" / Path(profile).stem


def cores() -> int:
    """Return how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Describe where a run takes place: the machine, torch's device and threads."""
    import torch  # here, since most of this module is asked for without it

    cuda = torch.cuda.is_available()
    return machine() | {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "threads": torch.get_num_threads(),
    }


def machine() -> dict[str, Any]:
    """Describe the machine and the versions, with the time, without loading torch."""
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in REPORTED_PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "gpus": gpus(),
        "commit": commit(),
        "source": source_digest(),
    }


@cache
def gpus() -> list[str]:
    """Return the names of the NVIDIA GPUs, as their driver tells them."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return told.stdout.splitlines()


@cache
def processor() -> str:
    """Return the name of the CPU, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """Return the commit of the checkout, ``+`` behind it where files differ from it."""
    if not (PACKAGE.parent / ".git").exists():
        return None  # installed: a repository around it is somebody else's
    git = ["git", "-C", str(PACKAGE)]
    try:
        named = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", str(PACKAGE)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return named + ("+" if changes.strip() else "")


@cache
def source_digest() -> str:
    """Return a digest of the source and the weights that results come from."""
    return rooms_digest(ROOMS_OF_RESULTS, PACKAGE)[:12]


def rooms_digest(rooms: Iterable[str], package: Path) -> str:
    """Return a digest of modules and sub-packages.

    Profiles are left out: what a run takes from one is among its settings.
    """
    files = []
    for name in rooms:
        path = package / name
        files += [path] if path.is_file() else path.rglob("*")
    profiles = package / "runs" / "profiles"
    return files_digest(
        (file for file in files if profiles not in file.parents), relative_to=package
    )


def files_digest(paths: Iterable[Path], *, relative_to: Path) -> str:
    """Return a SHA-256 over names and contents of files, whatever their order."""
    total = hashlib.sha256()
    for path in sorted(paths):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        name = path.relative_to(relative_to).as_posix()
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


@cache
def version_of(package: str) -> str | None:
    """Return the version of an installed package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

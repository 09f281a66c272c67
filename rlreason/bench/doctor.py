"""What this machine can run, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile

import psutil

from rlreason.runs.environment import PACKAGE, cores, processor, runs_root

GB = 1e9
MEMORY_FOR_TINY = 4 * GB  # two kernels with torch, and the browser of a test
DISK_FOR_TINY = 1 * GB
MEMORY_FOR_SMOL = 12 * GB  # of the GPU
MEMORY_FOR_PAPER = 75 * GB
BUNDLED = ("nano", "nano-xs")
HUB_DATA = {"gsm8k": "openai/gsm8k", "svamp": "ChilleD/SVAMP"}
HUB_MODELS = {
    "smol": "SmolLM2-135M-Instruct",
    "paper": "meta-llama/Llama-2-7b-hf",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REINSTALL = "install again: `pip install -r requirements.lock`"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Its name.
        found: What there is.
        ok: Whether that will do.
        required: Whether the profile tiny needs it.
        remedy: What to do; empty where nothing is to be done.
    """

    what: str
    found: str
    ok: bool = True
    required: bool = False
    remedy: str = ""

    @property
    def mark(self) -> str:
        """``ok``, ``--`` (missing, and not needed for tiny) or ``!!`` (missing)."""
        return "ok" if self.ok else "!!" if self.required else "--"


def examine(package: Path = PACKAGE) -> list[Finding]:
    """Look at everything, most needed first; ``package`` holds the bundled policies."""
    return [
        _python(),
        _torch(),
        _cores(),
        _memory(),
        _disk(),
        *(_bundled(name, package) for name in BUNDLED),
        _gpu(),
        *(_data(task, repo) for task, repo in HUB_DATA.items()),
        *(_model(profile, repo) for profile, repo in HUB_MODELS.items()),
        _browser(),
    ]


def find_browser() -> str | None:
    """Return a Chromium that can be run headless; ``RLREASON_CHROMIUM`` names one."""
    names = (os.environ.get("RLREASON_CHROMIUM", ""), *BROWSERS)
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _python() -> Finding:
    ok = (3, 10) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if ok else "make a new environment with Python 3.10 to 3.13"
    return Finding("Python", platform.python_version(), ok, True, remedy)


def _torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("torch", f"does not load: {error}", False, True, REINSTALL)
    wanted = _pinned("torch")
    ok = wanted is None or torch.__version__.split("+")[0] == wanted
    remedy = "" if ok else f"the lock file says {wanted}; {REINSTALL}"
    return Finding("torch", torch.__version__, ok, False, remedy)


def _pinned(package: str) -> str | None:
    """Return the version that our own metadata pins a package to."""
    for requirement in metadata.requires("rlreason") or []:
        if requirement.startswith(f"{package}=="):
            return requirement.partition("==")[2].split(";")[0].strip()
    return None


def _cores() -> Finding:
    return Finding("CPU", f"{cores()} cores, {processor()}", True, True)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    ok = memory.available >= MEMORY_FOR_TINY
    found = f"{memory.available / GB:.0f} GB free of {memory.total / GB:.0f} GB"
    remedy = "" if ok else "close other programs, or run one notebook at a time"
    return Finding("memory", found, ok, True, remedy)


def _disk() -> Finding:
    """Look at where runs go by writing there; it is made when it is needed."""
    root = runs_root()
    existing = next(path for path in [root, *root.resolve().parents] if path.exists())
    try:
        TemporaryFile(dir=existing).close()
    except OSError as error:
        remedy = "point RLREASON_RUNS to a folder that can be written"
        found = f"{root} cannot hold runs: {error.strerror}"
        return Finding("disk", found, False, True, remedy)
    free = shutil.disk_usage(existing).free
    remedy = "" if free >= DISK_FOR_TINY else "free some, or point RLREASON_RUNS away"
    return Finding(
        "disk", f"{free / GB:.0f} GB free at {root}", not remedy, True, remedy
    )


def _bundled(name: str, package: Path) -> Finding:
    """Look at a bundled policy by opening it: a cut-off file has no readable header."""
    from safetensors import SafetensorError, safe_open

    path = package / "assets" / name / "model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = len(list(file.keys()))
    except (OSError, SafetensorError) as error:
        remedy = (
            "get the file again from the repository, or make it: `rlreason train nano`"
        )
        return Finding(f"policy {name}", f"{error}", False, name == "nano", remedy)
    size = path.stat().st_size / 1e6
    return Finding(f"policy {name}", f"{tensors} tensors, {size:.1f} MB", required=True)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        remedy = "smoke and tiny need none; smol wants one, paper several"
        return Finding("GPU", "none", False, remedy=remedy)
    memory = torch.cuda.get_device_properties(0).total_memory
    count = torch.cuda.device_count()
    found = f"{count} x {torch.cuda.get_device_name(0)}, {memory / GB:.0f} GB each"
    profiles = {"smol": MEMORY_FOR_SMOL, "paper": MEMORY_FOR_PAPER}
    large = [name for name, need in profiles.items() if memory < need]
    remedy = f"too small for {' and '.join(large)}" if large else ""
    return Finding("GPU", found, not large, remedy=remedy)


def _data(task: str, repo: str) -> Finding:
    """Look for a data set where ``load_problems`` would take it from, offline."""
    label = f"data {task}"
    if folder := os.environ.get("RLREASON_DATA"):
        if (Path(folder) / task).is_dir():
            return Finding(label, str(Path(folder) / task))
        remedy = f"put its released files into {folder}/{task}, or unset RLREASON_DATA"
        return Finding(label, f"not in {folder}", False, remedy=remedy)
    if _in_hub_cache(f"datasets--{repo.replace('/', '--')}"):
        return Finding(label, f"{repo} in the Hugging Face cache")
    remedy = (
        "fetched on first use where there is a network; or set RLREASON_DATA to a "
        f"folder with {task}/; smoke and tiny need none"
    )
    return Finding(label, "not on this machine", False, remedy=remedy)


def _model(profile: str, repo: str) -> Finding:
    label = f"policy for {profile}"
    if _in_hub_cache(f"models--{repo.replace('/', '--')}"):
        return Finding(label, f"{repo} in the Hugging Face cache")
    with suppress(ImportError, OSError):  # of torch, which is told above
        from rlreason.policy.load import policy_path

        if (path := policy_path(repo)).is_dir():
            return Finding(label, str(path))
    remedy = f"`rlreason models import {repo}`, or give the folder of another model"
    return Finding(label, f"{repo} is not on this machine", False, remedy=remedy)


def _in_hub_cache(folder: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / folder / "snapshots").is_dir()


def _browser() -> Finding:
    if path := find_browser():
        return Finding("Chromium", path)
    remedy = "tests that open the built pages are skipped; install chromium to run them"
    return Finding("Chromium", "not found", False, remedy=remedy)

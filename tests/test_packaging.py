"""The package is whole, and every set-up installs the same versions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(python: str, platform: str = "linux") -> dict[str, Requirement]:
    """The lines of the lock that a Python version on Linux installs, by name."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_system": platform.capitalize(),
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    lines = [r for r in LOCK if r.marker is None or r.marker.evaluate(environment)]
    names = [normal(line.name) for line in lines]
    assert len(set(names)) == len(names), "a package stands twice"
    return dict(zip(names, lines, strict=True))


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_one_version_of_each_package_within_the_bounds_we_name(python):
    pins = locked(python)
    for pin in pins.values():
        assert [clause.operator for clause in pin.specifier] == ["=="], pin
    extra = PROJECT["optional-dependencies"]["dev"]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extra]):
        pin = pins[normal(requirement.name)]
        (version,) = (clause.version for clause in pin.specifier)
        assert requirement.specifier.contains(version), f"{requirement} and {pin}"


def test_the_lock_names_torch_no_cuda_library_no_address_and_no_hash():
    text = (ROOT / "requirements.lock").read_text()
    assert "\ntorch==2.13.0\n" in text
    assert not re.search(r"nvidia|cuda|triton", text)
    assert not re.search(r"https?:|--hash|--index|--find-links|file:", text)


def test_what_is_installed_here_is_what_the_lock_says():
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for name in ("torch", "transformers", "papermill", "jupyter-book", "pytest"):
        pin = locked(python)[name]
        assert pin.specifier.contains(metadata.version(name)), pin


def test_conda_installs_from_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.lock", "-e ."]


def test_the_wheel_carries_profiles_and_weights(tmp_path):
    # Out of a copy, since setuptools writes its build folder beside the source
    source = tmp_path / "source"
    junk = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rlreason", source / "rlreason", ignore=junk)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps"]
    command += ["--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("smoke", "tiny", "smol", "paper"):
        assert f"rlreason/runs/profiles/{name}.yaml" in names
    for name in ("nano", "nano-xs"):
        assert f"rlreason/assets/{name}/model.safetensors" in names
        assert f"rlreason/assets/{name}/tokenizer.json" in names
    assert not [name for name in names if name.startswith(("tests/", "book/"))]


def test_make_alone_lists_every_target():
    shown = subprocess.run(
        ["make"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    text = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^([a-z]+):", text, flags=re.M):
        assert f"make {target} " in shown


def test_the_version_and_the_licence_are_the_same_everywhere():
    import rlreason

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert rlreason.__version__ == PROJECT["version"] == citation["version"]
    assert PROJECT["license"] == citation["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")

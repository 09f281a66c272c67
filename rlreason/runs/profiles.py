"""Profiles: one set of notebooks, several scales.

A profile is a YAML file of parameters and nothing else: what holds for all notebooks
under ``common``, what holds for one of them under its name. A notebook takes from
``common`` what its parameters cell declares. In its recipe, a path that begins with
``./`` or ``../`` starts at the profile's own file, so that it means one thing wherever
the profile is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field

from rlreason.runs.files import file_digest
from rlreason.settings import Settings, SettingsError, load_settings
from rlreason.tasks import DataError, task_digest

if TYPE_CHECKING:
    from rlreason.runs.recipes import Recipe

Value = bool | int | float | str | list[bool | int | float | str] | None
BUILT_IN = ("smoke", "tiny", "smol", "paper")
PUBLISHED = ("tiny",)  # whose results the book shows


class Profile(Settings):
    """The parameters of one scale.

    Attributes:
        description: One line: which policy, which task, for whom.
        recipe: What is trained and how it is judged, unread; see ``load_recipe``.
        common: Parameters of every notebook that declares them.
        notebooks: Notebook name (file name without ``.ipynb``) to its parameters.
    """

    description: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    common: dict[str, Value] = Field(default_factory=dict)
    notebooks: dict[str, dict[str, Value]] = Field(default_factory=dict)


def load_profile(name: str | Path) -> Profile:
    """Read a built-in profile by its name, or any other by the path of its YAML file.

    Raises:
        SettingsError: No such profile, or the file is not one; says what is wrong.
    """
    return load_settings(Profile, read_yaml(profile_path(name)))


def load_recipe(
    name: str | Path, changes: Mapping[str, Any] | None = None, **fields: Any
) -> Recipe:
    """Read the recipe of a profile, with some values changed.

    Args:
        changes: Dotted path to value, e.g. ``{"expert_iteration.k": 8}``.
        fields: The same as keywords, with two underscores for a dot:
            ``expert_iteration__k=8``. None leaves what the profile says.

    Raises:
        SettingsError: No such profile, no such field, or a value out of range.
    """
    # Imported here: the command line reads profiles, and need not wait for torch
    from rlreason.runs.recipes import Recipe, check_length, put

    values = _from_folder(load_profile(name).recipe, profile_path(name).parent)
    given = {path.replace("__", "."): value for path, value in fields.items()}
    given = {path: value for path, value in given.items() if value is not None}
    given |= changes or {}
    for path, value in given.items():
        put(values, path, value)
    recipe = load_settings(Recipe, values)
    check_length(recipe, given)
    return recipe


def inputs_digest(name: str | Path) -> str:
    """Hash the files that a profile's recipe names: data, policies, own rewards.

    Those of GSM8K and SVAMP too, where RLREASON_DATA says where they lie. Empty where
    it names none. Where they lie is not in it.
    """
    recipe = _from_folder(load_profile(name).recipe, profile_path(name).parent)
    digests = [
        file_digest(file) for value in _texts(recipe) for file in _files_of(value)
    ]
    task = recipe.get("task")
    if os.environ.get("RLREASON_DATA") and isinstance(task, dict):
        with suppress(DataError):  # who reads it says what is wrong
            if read := task_digest(task.get("name", "")):
                digests.append(read)
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""


def named_profile(value: Any) -> list[bytes]:
    """What a profile says whose name, or file, a value is; of another YAML file too."""
    if not isinstance(value, str):
        return []
    is_file = Path(value).suffix in (".yaml", ".yml") and Path(value).is_file()
    if value not in BUILT_IN and not is_file:
        return []
    try:
        recipe = load_profile(value).recipe
        return [json.dumps([recipe, inputs_digest(value)], default=str).encode()]
    except SettingsError:  # whoever reads it as one says what is wrong
        return [Path(value).read_bytes()]


def _texts(value: Any) -> Iterator[str]:
    """All texts of a recipe, in its order."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value


def _files_of(value: str) -> list[Path]:
    """The files that a text means, if it is a path: FILE, FOLDER, FILE.py:FUNCTION."""
    file, _, function = value.rpartition(":")  # as rewards.own does, which needs torch
    path = file if file.endswith(".py") and function else value
    path = Path(os.path.expanduser(path))
    if "{split}" in path.name:
        return sorted(path.parent.glob(path.name.replace("{split}", "*")))
    if value == path.name:  # a name, of a policy say: see policy.load, with torch
        models = os.environ.get("RLREASON_MODELS") or "~/.cache/rlreason"
        imported = Path(models).expanduser() / path
        path = imported if imported.is_dir() else path
    if path.is_dir() and len(path.parts) > 1:
        return sorted(each for each in path.iterdir() if each.is_file())
    return [path] if path.is_file() else []


def profile_path(name: str | Path) -> Path:
    """Return the file of a profile.

    Raises:
        SettingsError: No such profile (lists those there are), or one of a name whose
            results it would replace.
    """
    folder = Path(str(resources.files(__package__) / "profiles"))
    path = folder / f"{name}.yaml" if str(name) in BUILT_IN else Path(name)
    published = folder / f"{path.stem}.yaml"
    if path.stem in BUILT_IN and path.is_file() and not path.samefile(published):
        raise SettingsError(
            f"the profile {name} has the name of a built-in one, whose results it "
            "would replace: give its file another name"
        )
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise SettingsError(
            f"no profile {str(name)!r}: give {', '.join(BUILT_IN)} or the path of a "
            "YAML file"
        )
    return path


def _from_folder(value: Any, folder: Path) -> Any:
    """Return a part of a recipe with its ``./`` and ``../`` starting at a folder."""
    if isinstance(value, dict):
        return {name: _from_folder(part, folder) for name, part in value.items()}
    if isinstance(value, list):
        return [_from_folder(part, folder) for part in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str(folder.resolve() / value)
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping in which every key stands once.

    Raises:
        SettingsError: It does not; says where and why.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf8"), Loader=_StrictLoader)
        json.dumps(values, default=str)  # refuses what holds itself
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a date as a key, say
        raise SettingsError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: not a mapping of keys to values")
    return values


class _StrictLoader(yaml.SafeLoader):
    """YAML as people read it: 1e-4 is a number, a key stands once in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuse a repeated key, of which plain YAML silently keeps the last."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = {str(key) for key in keys if keys.count(key) > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{', '.join(sorted(repeated))} given twice",
                node.start_mark,
            )
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)

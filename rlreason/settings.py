"""Settings: what decides a run, written down, checked, and named by its hash.

One class an algorithm or experiment. A subclass of ``Settings`` or a frozen dataclass:
both are read strictly (an unknown key or a value of the wrong type is an error that
names it) and both have one canonical JSON text, whose SHA-256 names the run folder. Two
settings with the same hash are the same experiment.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

HASH_LENGTH = 12  # hex digits: 48 bits, ample for the runs of one project


class SettingsError(ValueError):
    """Settings that cannot be: an unknown key, a wrong type, a value out of range."""


class Settings(BaseModel):
    """Base of every settings class: frozen, strict about keys, no silent defaults.

    Values are checked on construction and never converted (``"3"`` is no integer, True
    is no number). NaN and infinity are refused, since JSON cannot hold them and no
    setting means them.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
    )


def load_settings(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make settings from plain values, e.g. of a YAML file.

    Args:
        cls: A ``Settings`` subclass or a frozen dataclass.
        values: Field name to value, as JSON or YAML holds them (a list where the field
            is a tuple). Missing fields take their default.

    Raises:
        SettingsError: Names every wrong key or value, and what would have been right.
    """
    known = field_names(cls)
    unknown = [key for key in values if key not in known]
    if unknown:
        raise SettingsError(unknown_key_message(cls.__name__, unknown, known))
    try:
        return TypeAdapter(cls).validate_json(json.dumps(dict(values)), strict=True)
    except ValidationError as error:
        raise SettingsError(describe(error, cls.__name__)) from None


def field_names(cls: type) -> list[str]:
    """Return the names of the fields of a settings class, in their order."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(cls.model_fields)


def unknown_key_message(where: str, unknown: Iterable[str], known: list[str]) -> str:
    """Say which keys are unknown, which one was perhaps meant, and which there are."""
    parts = []
    for key in unknown:
        near = difflib.get_close_matches(key, known, n=1)
        parts.append(repr(key) + (f" (did you mean {near[0]!r}?)" if near else ""))
    known_keys = ", ".join(known) or "none"
    return f"{where}: unknown {', '.join(parts)}; known are: {known_keys}"


def describe(error: ValidationError, where: str) -> str:
    """Put a pydantic error on one line: which field, what was wrong, what was given."""
    faults = []
    for fault in error.errors(include_url=False):
        field = ".".join(str(part) for part in fault["loc"]) or "settings"
        faults.append(f"{field}: {fault['msg']} (given: {fault['input']!r})")
    return f"{where}: " + "; ".join(faults)


def canonical_json(settings: Any) -> str:
    """Return the one JSON text of settings: keys sorted, no spaces, ASCII.

    Floats are written as Python's ``repr``, the shortest text that reads back to the
    same number, so the text is the same on every platform.
    """
    plain = TypeAdapter(type(settings)).dump_python(settings, mode="json")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def settings_hash(settings: Any) -> str:
    """Return the first 12 hex digits of the SHA-256 of ``canonical_json(settings)``."""
    digest = hashlib.sha256(canonical_json(settings).encode()).hexdigest()
    return digest[:HASH_LENGTH]

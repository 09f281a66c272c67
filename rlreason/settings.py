"""Settings: what decides a run, written down, checked, and named by its hash.

One class an algorithm or experiment, a subclass of ``Settings``: it is read strictly
(an unknown key or a value of the wrong type is an error that names it) and has one
canonical JSON text. What of it decides a result is the
``identity``, whose SHA-256 names the run folder: two settings with the same hash are
the same experiment.

A field made by ``setting`` says where its default comes from. It may also say that it
is *placement* (in how many pieces and where something is computed, never what), which
the identity leaves out, or at which *neutral* value it does nothing, where the identity
leaves it out too. So neither a larger micro-batch nor a setting that did not exist when
a result was recorded makes another experiment of it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

T = TypeVar("T", bound="Settings")

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


Source = Literal["paper", "precursor", "ours"]
"""Where a default comes from: the paper, its authors' earlier code, or this project."""

_NO_NEUTRAL = object()


def setting(
    default: Any = ...,
    description: str = "",
    *,
    source: Source,
    placement: bool = False,
    neutral: Any = _NO_NEUTRAL,
    **limits: Any,
) -> Any:
    """A documented field of a settings class.

    Args:
        default: Its value where none is given; ``...``: it must be given. A callable
            makes a nested settings object.
        description: What it means, with its unit.
        source: Where the default comes from.
        placement: It says how a result is computed and not which; see the module.
        neutral: The value at which it does nothing. Pinned when the field is added: it
            stays when the default moves on.
        **limits: As in pydantic's ``Field``: ``ge``, ``gt``, ``le``, ``discriminator``.
    """
    extra: dict[str, Any] = {"source": source, "placement": placement}
    if neutral is not _NO_NEUTRAL:
        extra["neutral"] = neutral
    kind = "default_factory" if callable(default) else "default"
    return Field(
        **{kind: default},
        description=description,
        json_schema_extra=extra,
        **limits,
    )


# Fields whose default comes from there
paper, precursor, ours = (
    partial(setting, source=source) for source in ("paper", "precursor", "ours")
)


def load_settings(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make settings from plain values, e.g. of a YAML file.

    Args:
        cls: A ``Settings`` subclass.
        values: Field name to value, as JSON or YAML holds them (a list where the field
            is a tuple). Missing fields take their default.

    Raises:
        SettingsError: Names every wrong key or value, and what would have been right.
    """
    known = list(cls.model_fields)
    unknown = [key for key in values if key not in known]
    if unknown:
        raise SettingsError(unknown_key_message(cls.__name__, unknown, known))
    try:
        text = json.dumps(dict(values), default=_refuse)
        return cls.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise SettingsError(describe(error, cls.__name__)) from None


def _refuse(value: Any) -> Any:
    """What JSON cannot hold, e.g. a date, which YAML makes of 2024-01-02."""
    raise SettingsError(
        f"{value!r} is a {type(value).__name__}; settings are numbers, text, true, "
        "false, null, lists and mappings. Put text that looks otherwise in quotes"
    )


def unknown_key_message(where: str, unknown: Iterable[str], known: list[str]) -> str:
    """Say which keys are unknown, which one was perhaps meant, and which there are."""
    parts = []
    for key in unknown:
        near = difflib.get_close_matches(str(key), known, n=1)
        parts.append(repr(key) + (f" (did you mean {near[0]!r}?)" if near else ""))
    known_keys = ", ".join(known) or "none"
    return f"{where}: unknown {', '.join(parts)}; known are: {known_keys}"


def describe(error: ValidationError, where: str) -> str:
    """Put a pydantic error on one line: which field, what was wrong, what was given."""
    faults = []
    for fault in error.errors(include_url=False):
        field = ".".join(str(part) for part in fault["loc"])
        said = fault["msg"].removeprefix("Value error, ")
        given = fault["input"]
        # What is wrong with several fields together names them itself
        shown = "" if isinstance(given, dict) else f" (given: {given!r})"
        faults.append(f"{field}: {said}{shown}" if field else f"{said}{shown}")
    return f"{where}: " + "; ".join(faults)


def canonical_json(settings: Settings) -> str:
    """Return the one JSON text of settings: keys sorted, no spaces, ASCII.

    Floats are written as Python's ``repr``, the shortest text that reads back to the
    same number, so the text is the same on every platform.
    """
    plain = settings.model_dump(mode="json")
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def identity(settings: Settings) -> str:
    """Return ``canonical_json`` without placement and without what is neutral."""
    plain = settings.model_dump(mode="json")
    _leave_out(settings, plain)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _leave_out(settings: Any, plain: Any) -> None:
    """Take what is no part of the identity out of ``plain``, the dump of settings."""
    if isinstance(settings, (list, tuple)):
        for value, dumped in zip(settings, plain, strict=True):
            _leave_out(value, dumped)
    if not isinstance(settings, BaseModel):
        return
    for name, field in type(settings).model_fields.items():
        extra = field.json_schema_extra or {}
        value = getattr(settings, name)
        neutral = "neutral" in extra and value == extra["neutral"]
        if extra.get("placement") or neutral:
            del plain[name]
        else:
            _leave_out(value, plain[name])


def settings_hash(settings: Settings) -> str:
    """Return the first 12 hex digits of the SHA-256 of ``identity(settings)``."""
    digest = hashlib.sha256(identity(settings).encode()).hexdigest()
    return digest[:HASH_LENGTH]

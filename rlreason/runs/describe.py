"""All settings of a recipe as a table: for the command line, and a page of the book."""

from __future__ import annotations

import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from pydantic_core import PydanticUndefined

from rlreason.runs.plans import Plan, steps
from rlreason.runs.recipes import Recipe
from rlreason.settings import Settings, SettingsError, unknown_key_message


@dataclass(frozen=True)
class SettingRow:
    """One setting.

    Attributes:
        path: As ``--set`` takes it.
        type: Its Python type, as text.
        default: Of the class; empty where it must be given.
        value: In the recipe; empty where the recipe has another kind of this part.
        meaning: Its description.
        source: paper, precursor or ours; where the default comes from.
    """

    path: str
    type: str
    default: str
    value: str
    meaning: str
    source: str


def setting_rows(algorithm: str | None, recipe: Recipe) -> list[SettingRow]:
    """The settings of a recipe, or of the part that one step has.

    A step that has no part of the recipe, as a package's own, has its settings in
    ``more``.

    Raises:
        SettingsError: No such step or part.
    """
    rows = list(_rows(Recipe, recipe, ""))
    if algorithm is None:
        return rows
    registered = steps()
    step = registered.get(algorithm)
    if step is not None and not step.part:
        return list(_rows_of_package(step, recipe.more.get(algorithm, {})))
    part = step.part if step else algorithm
    chosen = [row for row in rows if f"{row.path}.".startswith(f"{part}.")]
    if not chosen:
        known = sorted({*registered, *Recipe.model_fields})
        raise SettingsError(unknown_key_message("settings of", [algorithm], known))
    return chosen


def describe_settings(algorithm: str | None, recipe: Recipe) -> str:
    """The table for a terminal of 88 columns."""
    lines = []
    for row in setting_rows(algorithm, recipe):
        default = f" = {row.default}" if row.default else ", must be given"
        now = f", here {row.value}" if row.value not in ("", row.default) else ""
        lines.append(f"{row.path}: {row.type}{default}{now}  [{row.source}]")
        lines += textwrap.wrap(
            row.meaning, 84, initial_indent="    ", subsequent_indent="    "
        )
    return "\n".join(lines)


def settings_page(recipe: Recipe, profile: str) -> str:
    """The table as a page in Markdown, a section a part."""
    parts: dict[str, list[SettingRow]] = {}
    for row in setting_rows(None, recipe):
        parts.setdefault(row.path.partition(".")[0], []).append(row)
    alone = [rows[0] for rows in parts.values() if len(rows) == 1]
    sections = {"recipe": alone} | {n: r for n, r in parts.items() if len(r) > 1}
    lines = [
        "# Every setting",
        "",
        "What decides a run, with its default and where that comes from: the *paper* "
        "(read there, at second hand, or from memory: `paper.yaml` says which), its "
        "authors' earlier code (*precursor*), or this project (*ours*). The column in "
        f"the middle is what the profile `{profile}` says. `rlreason settings` prints "
        "the same; `--set FIELD VALUE` changes one.",
    ]
    for name, rows in sections.items():
        lines += ["", f"## {name}", ""]
        lines += ["| setting | type | default | here | meaning | from |"]
        lines += ["|---|---|---|---|---|---|"]
        for row in rows:
            cells = (f"`{row.path}`", row.type, row.default, row.value, row.meaning)
            lines.append(f"| {' | '.join(map(_cell, cells))} | {row.source} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _rows(cls: type[Settings], values: Any, above: str) -> Iterator[SettingRow]:
    """The fields of a class; of a part that is one of several kinds, of each kind."""
    for name, field in cls.model_fields.items():
        path = f"{above}{name}"
        value = getattr(values, name, None) if values is not None else None
        nested = _settings_classes(field.annotation)
        if len(nested) != 1 or type(None) in typing.get_args(field.annotation):
            yield _row(path, field, values, value)
        for kind in nested:
            yield from _rows(
                kind, value if isinstance(value, kind) else None, f"{path}."
            )


def _rows_of_package(step: type[Plan], given: dict[str, Any]) -> Iterator[SettingRow]:
    """The fields of a step's algorithm, or where it has none those of its plan.

    What the plan has no default for, the step's own code may have one for.
    """
    above = f"more.{step.model_fields['step'].default}."
    own = {n: f for n, f in step.model_fields.items() if n not in Plan.model_fields}
    classes = {name: _settings_classes(field.annotation) for name, field in own.items()}
    if nested := classes.get("algorithm"):
        rows = list(_rows(nested[0], None, above))
    else:  # less where it starts
        names = [n for n in own if not any(issubclass(c, Plan) for c in classes[n])]
        rows = [_row(f"{above}{name}", own[name], None, None) for name in names]
    for row in rows:
        name = row.path.removeprefix(above)
        yield replace(
            row,
            default=row.default or "as the step has it",
            value=_text(given[name]) if name in given else "",
            source=row.source or "its package",
        )


def _row(path: str, field: Any, values: Any, value: Any) -> SettingRow:
    extra = field.json_schema_extra or {}
    default = field.get_default(call_default_factory=True)
    return SettingRow(
        path=path,
        type=_type(field.annotation),
        default="" if default is PydanticUndefined else _text(default),
        value="" if values is None else _text(value),
        meaning=field.description or "",
        source=extra.get("source", ""),
    )


def _text(value: Any) -> str:
    """A value as one would write it; of settings their kind."""
    if isinstance(value, Settings):
        return str(getattr(value, "kind", "on"))
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


def _type(annotation: Any) -> str:
    """A type in a few words: ``int or None``, ``"sparse" or "dense"``."""
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type, arguments)))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if annotation is type(None):
        return "None"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "mapping"
    return (
        "mapping"
        if origin is dict
        else getattr(annotation, "__name__", str(annotation))
    )


def _settings_classes(annotation: Any) -> list[type[Settings]]:
    """The settings classes that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    found: list[type[Settings]] = []
    for argument in typing.get_args(annotation):
        found += [cls for cls in _settings_classes(argument) if cls not in found]
    return found

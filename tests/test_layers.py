"""The way of the data: a module imports only from the rows above its own.

And what the suite relies on.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from conftest import SPREAD
from importlinter import cli

import rlreason


def test_a_module_imports_only_from_the_rows_above_its_own(capsys):
    code = cli.lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert code == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_an_import_against_the_rows_is_found(tmp_path, monkeypatch, capsys):
    # The wrong version: the same contract over a package that breaks it
    package = tmp_path / "upside_down"
    for name in ("tasks", "policy"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "tasks" / "loaders.py").write_text("import upside_down.policy\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_package = "upside_down"\n'
        "[[tool.importlinter.contracts]]\n"
        'name = "rows"\ntype = "layers"\n'
        'layers = ["upside_down.policy", "upside_down.tasks"]\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = cli.lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert code == cli.EXIT_STATUS_ERROR
    assert "upside_down.tasks.loaders -> upside_down.policy" in capsys.readouterr().out


def test_what_is_shared_out_among_processes_is_a_test():
    files = Path(__file__).parent.glob("test_*.py")
    there = [
        n for f in files for n in re.findall(r"^def (test_\w+)", f.read_text(), re.M)
    ]
    assert [there.count(name) for name in SPREAD] == [1] * len(SPREAD)


# Private names


LIBRARY = Path(rlreason.__file__).parent


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_") and name != "_"


def is_own(node: ast.Attribute) -> bool:
    """Whether it is of the object whose method this is."""
    whose = node.value.func if isinstance(node.value, ast.Call) else node.value
    return isinstance(whose, ast.Name) and whose.id in ("self", "super")


def nodes_of(folder: Path, kind: type[ast.AST]) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield path, node


def private_names(folder: Path) -> set[str]:
    """What a package calls its own: functions, classes, constants and attributes."""
    found = set()
    for _, node in nodes_of(folder, (ast.FunctionDef, ast.ClassDef, ast.Name)):
        if not isinstance(node, ast.Name):
            found.add(node.name)
        elif isinstance(node.ctx, ast.Store):
            found.add(node.id)
    for _, node in nodes_of(folder, ast.Attribute):
        if is_own(node):
            found.add(node.attr)
    return set(filter(is_private, found))


def reached_for(folder: Path, names: set[str]) -> list[str]:
    """Where files use private names of others, by import, as attribute or in words."""
    found = []
    for path, node in nodes_of(folder, (ast.alias, ast.Attribute, ast.Constant)):
        if isinstance(node, ast.alias):
            name = node.name
        elif isinstance(node, ast.Attribute):
            name = "" if is_own(node) else node.attr
        else:
            name = node.value if isinstance(node.value, str) else ""
        if name.rpartition(".")[2] in names:
            found.append(f"{path.name}:{node.lineno}: {name}")
    return found


def test_tests_hardly_reach_for_private_names():
    found = reached_for(Path(__file__).parent, private_names(LIBRARY))
    assert len(found) <= 15, "\n".join(found)
    assert found  # else nothing is counted at all


def test_private_names_are_found_however_they_are_reached_for(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a.py").write_text(
        "_LIMIT = 1\ndef _f(): ...\nclass A:\n"
        "    def __init__(self): self._b, self.c = 1, 2\n"
        "    def _repr_html_(self): ...\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "b.py").write_text(
        "from library.a import _f, A\nimport os\nclass B:\n"
        "    def g(self): return self._b, os._exit, A()._repr_html_()\n"
        "A()._b\npatch('library.a._LIMIT', 2)\nset(A, '_b', 'a _b', c=A().c)\n"
    )
    names = private_names(tmp_path / "library")
    assert names == {"_LIMIT", "_f", "_b"}
    found = reached_for(tmp_path / "tests", names)
    assert sorted(line.rpartition(" ")[2] for line in found) == sorted(
        ["_f", "_b", "library.a._LIMIT", "_b"]
    )

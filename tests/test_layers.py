"""The way of the data: a module imports only from the rows above its own.

And what the suite relies on.
"""

from __future__ import annotations

import re
from pathlib import Path

from conftest import SPREAD
from importlinter import cli


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

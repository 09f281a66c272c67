"""Every notebook of the repository runs at the profile smoke, without the network.

Each is an item of its own, so that test processes share them out (see conftest).
"""

from __future__ import annotations

import json
import re

import pytest
from smoke_book import FRESH, REPOSITORY, run_chapter, smoke_root

from rlreason.publishing.notebooks import find_notebooks, read_notebook

NAMES = [notebook.name for notebook in find_notebooks(REPOSITORY / "notebooks")]


@pytest.mark.parametrize("name", NAMES)
def test_a_chapter_runs_and_asks_the_network_for_nothing(
    name, tmp_path_factory, cut_network, monkeypatch
):
    root = smoke_root(tmp_path_factory)
    for variable, value in cut_network.environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("RLREASON_RUNS", str(root / "runs"))
    record = run_chapter(read_notebook(root / "notebooks" / f"{name}.ipynb"))
    assert record.profile == "smoke"
    assert record.peak_mb is None or record.peak_mb > 50 or name != FRESH
    assert cut_network.attempts == []


READS = {"recorded", "recorded_table", "table_page", "load_records"}


@pytest.mark.parametrize("name", NAMES)
def test_a_chapter_names_the_recorded_tables_that_it_shows(name):
    # Else the page would go on showing the old ones when they are recorded anew
    notebook = read_notebook(REPOSITORY / "notebooks" / f"{name}.ipynb")
    cells = json.loads(notebook.path.read_text())["cells"]
    source = "\n".join(
        "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"
    )
    shown = READS & set(re.findall(r"\w+(?=\()", source))
    assert notebook.records == (("rows",) if shown else ())

"""Every notebook of the repository runs at the profile smoke, without the network.

Each is an item of its own, so that test processes share them out (see conftest).
"""

from __future__ import annotations

import pytest
from smoke_book import REPOSITORY, run_chapter, smoke_root

from rlreason.publishing.notebooks import find_notebooks, read_notebook

NAMES = [notebook.name for notebook in find_notebooks(REPOSITORY / "notebooks")]


@pytest.mark.spread
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
    assert record.peak_mb is None or record.peak_mb > 50
    assert cut_network.attempts == []

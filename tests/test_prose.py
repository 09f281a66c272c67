"""Chapters read as prose: in Jupyter as on the page, before they are run and after.

What only MyST understands must not be in a notebook: roles, directives, labels, links
without a text. Numbers of figures and equations count up, and what is referred to is
there. Each executed chapter is rendered by nbconvert alone, and three are opened in
JupyterLab in a headless Chromium.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from html import unescape
from pathlib import Path

import nbformat
import pytest
import yaml
from nbconvert import HTMLExporter
from smoke_book import REPOSITORY, run_chapter, smoke_root
from test_book import Browser, browser  # noqa: F401 - a fixture

from rlreason.publishing.notebooks import find_notebooks, read_notebook

PATHS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in PATHS]
PAGES = sorted((REPOSITORY / "book").glob("*.md"))

RAW = {
    "role": r"(?<![\w^}])\{(?:glue|cite|eq|numref|ref|doc|term)(?::\w+)?\}",
    "directive": r"^ *(?:`{3,}|:{3,}) ?\{[^}]*\}",
    "label": r"^\([\w-]+\)=$|\$\$ *\([\w-]+\)",
    "link without a text": r"(?<!!)\[\]\(",
    "link to a label": r"\]\(#",
    "caption as YAML": r"^---\n(?:name|alt|width):",
}


def raw_markup(text: str) -> list[str]:
    """What Jupyter would show as it stands."""
    return [
        f"{what}: {found.group()}"
        for what, pattern in RAW.items()
        for found in re.finditer(pattern, text, re.MULTILINE)
    ]


@cache
def cells_of(path: Path) -> list:
    return nbformat.read(path, as_version=4).cells


def sources(path: Path) -> str:
    return "\n\n".join(cell.source for cell in cells_of(path))


def joined(source: str) -> str:
    """A chapter's text on one line, strings that stand one under the other joined."""
    return re.sub(r"\s+", " ", re.sub(r'"\n\s*[rf]*"', "", source))


# Sources


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_no_source_has_markup_that_jupyter_does_not_know(path):
    assert raw_markup(sources(path)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "It is {glue:text}`answer`.",
        "See {cite:p}`cobbe2021training`, {eq}`eq-sum` and {ref}`here <limits>`.",
        "```{glue:figure} one\n---\nname: fig\n---\nIt grows.\n```",
        ":::{admonition} Solution\n:::",
        "(limits)=\n## Limits",
        "$$\nx\n$$ (eq-x)",
        "See [](05_expert_iteration.ipynb).",
        "See [below](#limits).",
    ],
)
def test_markup_that_jupyter_does_not_know_is_noticed(wrong):
    assert raw_markup(wrong)


def test_maths_code_and_pictures_are_no_such_markup():
    right = (
        "$x_{ref}$, `{name}`, ![](a.png), $$\nx \\tag{1.1}\n$$\n\n```python\n{1}\n```"
    )
    assert raw_markup(right) == []


def is_hidden(cell) -> bool:
    return bool(cell.metadata.get("jupyter", {}).get("source_hidden"))


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_what_only_speaks_or_shows_is_folded_and_so_is_every_solution(path):
    code = [cell for cell in cells_of(path) if cell.cell_type == "code"]
    speaks = [c for c in code if re.search(r"^(?:say|show)\(", c.source, re.MULTILINE)]
    assert speaks
    for cell in speaks:
        teaches = not is_hidden(cell) and "remove-input" not in tags(cell)
        assert not teaches or cell.source.count("\n") < 8, cell.source
    for cell in code:
        solution = cell.source.startswith("# Solution\n")
        assert solution == ("hide-cell" in tags(cell)), cell.source
        if solution:  # its output says as much as its source
            assert cell.metadata.jupyter == {
                "source_hidden": True,
                "outputs_hidden": True,
            }
        # Folded in Jupyter and in Colab alike, and folded or left out in the book
        folded = {"hide-cell", "hide-input", "remove-input", "remove-cell"} & tags(cell)
        assert is_hidden(cell) == bool(folded), cell.source
        assert is_hidden(cell) == (cell.metadata.get("cellView") == "form")


# Parts, chapters and their numbers


def test_every_chapter_and_page_has_one_place_in_a_numbered_part():
    contents = yaml.safe_load((REPOSITORY / "book" / "_toc.yml").read_text())
    captions = [part["caption"] for part in contents["parts"]]
    roman = ["I", "II", "III", "IV"]
    assert [c.partition(". ")[0] for c in captions[:-1]] == [f"Part {n}" for n in roman]
    assert captions[-1] == "Appendix"
    places = [c["file"] for part in contents["parts"] for c in part["chapters"]]
    there = [f"notebooks/{name}" for name in NAMES]
    there += [page.stem for page in PAGES if page.stem != contents["root"]]
    assert sorted(places) == sorted(there)
    numbered = [place for place in places if re.match(r"notebooks/\d", place)]
    assert numbered == sorted(numbered)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_chapter_has_the_number_of_its_file(path):
    title = cells_of(path)[0].source.splitlines()[0]
    number = re.match(r"# (\d+)\. ", title)
    assert (number[1] if number else "A") == chapter_of(path)


def chapter_numbers() -> dict[str, str]:
    return {path.name: chapter_of(path) for path in PATHS}


@pytest.mark.parametrize("path", [*PATHS, *PAGES], ids=lambda path: path.stem)
def test_a_link_that_names_a_chapter_leads_to_it(path):
    known = chapter_numbers()
    for name, to in links(prose(path)):
        if named := re.fullmatch(r"(?:[Cc]hapter )?(\d+)(?:\. .*)?", name):
            assert named[1] == known[to.rpartition("/")[2]], (name, to)


# Numbers of figures and equations


def numbers(pattern: str, text: str) -> list[tuple[str, int]]:
    return [(chapter, int(place)) for chapter, place in re.findall(pattern, text)]


def chapter_of(path: Path) -> str:
    """The number of a chapter; A is the appendix."""
    return str(int(path.stem[:2])) if path.stem[:2].isdigit() else "A"


FIGURE = r'\bshow\((?:(?!\bshow\().)*?"Figure (\d+|A)\.(\d+)\. '
EQUATION = r"\\tag\{(\d+)\.(\d+)\}"


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
@pytest.mark.parametrize("pattern", [FIGURE, EQUATION])
def test_figures_and_equations_count_up(path, pattern):
    text = joined(sources(path))
    found = numbers(pattern, text)
    assert found == [(chapter_of(path), i + 1) for i in range(len(found))]
    if pattern == FIGURE:
        assert len(found) == len(re.findall(r"\bshow\(", text))


@pytest.mark.parametrize(
    ("named", "pattern"),
    [
        (r"(?i)\bequations? \((\d+)\.(\d+)\)", EQUATION),
        (r"(?i)\bfigures? (\d+|A)\.(\d+)\b", FIGURE),
    ],
)
def test_what_is_referred_to_is_there(named, pattern):
    texts = [joined(sources(path)) for path in PATHS]
    there = {number for text in texts for number in numbers(pattern, text)}
    assert there
    assert {number for text in texts for number in numbers(named, text)} <= there


# What book/known.md says once


ONCE = r"from memory|as far as we|we remember|[Ff]rom development|[Nn]ot run on this"


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_a_chapter_relies_on_the_page_of_what_is_known_and_hedges_no_more(path):
    assert re.findall(ONCE, joined(sources(path))) == []


def test_a_hedge_is_noticed_and_a_mark_is_none():
    assert re.findall(ONCE, "It has 0.7 (the paper's, from memory).")
    assert not re.findall(ONCE, "It has 0.7 (*unverified*), and the log says 0.5.")


# Links


LINK = re.compile(r"\[([^\[\]]+)\]\(([^)\s]+)\)")
CITATION = re.compile(r".* (?:\((?:19|20)\d\d[a-z]?\)|(?:19|20)\d\d[a-z]?)")


def prose(path: Path) -> str:
    """A page's text: of a notebook what is Markdown and what folded cells say."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = cells_of(path)
    return "\n\n".join(
        cell.source for cell in cells if cell.cell_type == "markdown" or is_hidden(cell)
    )


def links(text: str) -> list[tuple[str, str]]:
    return [(re.sub(r"\s+", " ", name), to) for name, to in LINK.findall(text)]


@pytest.mark.parametrize("path", [*PATHS, *PAGES], ids=lambda path: path.stem)
def test_every_link_within_the_book_leads_to_a_file(path):
    for _, to in links(prose(path)):
        if ":" not in to and not to.startswith("#"):
            assert (path.parent / to).is_file(), to


def citations() -> dict[str, set[str]]:
    """Address of a paper to the names it has elsewhere in the book, no brackets."""
    found: dict[str, set[str]] = {}
    for path in [*PATHS, *PAGES]:
        if path.stem == "references":
            continue
        for name, to in links(prose(path)):
            if to.startswith("http") and CITATION.fullmatch(name):
                short = re.sub(r",? \(?(\d{4}[a-z]?)\)?$", r" \1", name)
                found.setdefault(to, set()).add(short)
    return found


def test_what_is_cited_is_in_the_references_and_the_other_way_round():
    listed = [to for _, to in links((REPOSITORY / "book/references.md").read_text())]
    assert len(listed) == len(set(listed))
    assert set(citations()) == set(listed)


def test_a_paper_has_one_name_and_a_name_one_paper():
    names = list(citations().values())
    assert all(len(name) == 1 for name in names), names
    assert len(set.union(*names)) == len(names)


def test_references_are_in_order():
    text = (REPOSITORY / "book" / "references.md").read_text()
    authors = re.findall(r"^- (\S+),", text, re.MULTILINE)
    assert authors == sorted(authors, key=str.casefold)


# Pages without MyST


@cache
def exporter() -> HTMLExporter:
    return HTMLExporter(template_name="classic")


def as_read(notebook) -> str:
    """What nbconvert makes of a notebook, without the sources that are folded.

    Pictures are there without their content, of which there is a lot.
    """
    for cell in notebook.cells:
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            data |= {kind: "" for kind in data if kind == "image/png"}
        if cell.cell_type == "code" and is_hidden(cell):
            cell.source = ""
    html, _ = exporter().from_notebook_node(notebook)
    return html.partition("<body")[2]


def faults(html: str) -> list[str]:
    found = re.findall(r"<a [^>]*href=[^>]*>\s*</a>", html)
    found += re.findall(r"No description has been provided", html)
    shown = re.sub(r"<pre\b.*?</pre>", "", html, flags=re.DOTALL)
    return found + raw_markup(unescape(re.sub(r"<[^>]+>", "", shown)))


@pytest.mark.parametrize("name", NAMES)
def test_an_executed_chapter_reads_as_prose_without_myst(
    name, tmp_path_factory, cut_network, monkeypatch
):
    notebook = executed(name, tmp_path_factory, cut_network, monkeypatch)
    figures = sum(cell.source.count("show(") for cell in notebook.cells)
    # One that stands in a condition is of what may not be recorded yet
    perhaps = sum(cell.source.count("    show(") for cell in notebook.cells)
    html = as_read(notebook)
    assert faults(html) == []
    assert figures - perhaps <= html.count("<img") <= figures


def executed(name, tmp_path_factory, cut_network, monkeypatch):
    """The chapter as it was run at the profile smoke; it is run where it was not."""
    root = smoke_root(tmp_path_factory)
    for variable, value in cut_network.environment.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("RLREASON_RUNS", str(root / "runs"))
    for notebook in find_notebooks(root / "notebooks"):
        if notebook.name == name:
            run_chapter(read_notebook(notebook.path))
    made = root / "runs" / "book" / "smoke" / "notebooks" / f"{name}.ipynb"
    return nbformat.read(made, as_version=4)


def test_a_page_that_does_not_read_as_prose_is_noticed():
    picture = nbformat.v4.new_output(
        "display_data", {"image/png": "iVBORw0KGgo="}, metadata={}
    )
    for cell in (
        nbformat.v4.new_markdown_cell("It is {glue:text}`answer`."),
        nbformat.v4.new_markdown_cell("See [](05_expert_iteration.ipynb)."),
        nbformat.v4.new_code_cell("1", outputs=[picture]),
    ):
        assert faults(as_read(nbformat.v4.new_notebook(cells=[cell])))
    picture.metadata = {"image/png": {"alt": "A dot."}}
    named = nbformat.v4.new_code_cell("'{glue:text}`x`'", outputs=[picture])
    assert faults(as_read(nbformat.v4.new_notebook(cells=[named]))) == []


# JupyterLab


@contextmanager
def jupyter_lab(folder: Path, state: Path):
    """A server of JupyterLab for a folder; gives its address."""
    settings = state / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # All cells are in the page, also those that are not on the screen
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    kinds = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(state / "settings")}
    environment |= {f"JUPYTER_{kind}": str(state / kind) for kind in kinds}
    environment["JUPYTERLAB_WORKSPACES_DIR"] = str(state / "workspaces")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--port=0", "--IdentityProvider.token=", f"--notebook-dir={folder}"]
    with open(state / "log", "w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            time.sleep(0.2)
            if found := list((state / "RUNTIME_DIR").glob("jpserver-*.json")):
                break
            assert server.poll() is None, (state / "log").read_text()
        port = json.loads(found[0].read_text())["port"]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()  # asked to end, it may wait for its extensions for ever
        server.wait()


LOOK = """
(async () => {
  const shown = e => e.getClientRects().length > 0;
  const cells = () => [...document.querySelectorAll(".jp-NotebookPanel .jp-Cell")];
  const rendered = c => !c.classList.contains("jp-MarkdownCell")
    || (c.querySelector(".jp-RenderedMarkdown")?.innerText ?? "").trim();
  for (let i = 0; i < 300; i++) {
    if (cells().length >= %d && cells().every(rendered)) break;
    await new Promise(done => setTimeout(done, 200));
  }
  const code = cells().filter(c => c.classList.contains("jp-CodeCell"));
  return {
    cells: cells().length,
    text: cells().map(c => [...c.querySelectorAll(".jp-RenderedMarkdown")]
                      .filter(shown).map(e => e.innerText).join("\\n")).join("\\n\\n"),
    empty: [...document.querySelectorAll(".jp-RenderedMarkdown a[href]")]
           .filter(a => !a.textContent.trim()).length,
    folded: code.filter(c => ![...c.querySelectorAll(".jp-Cell-inputArea")]
                              .some(shown)).length,
  };
})()
"""


def test_chapters_in_jupyterlab_read_as_prose_with_their_plumbing_folded(
    browser,  # noqa: F811
    tmp_path_factory,
    cut_network,
    monkeypatch,
):
    state, folder = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("opened")
    notebooks = {
        "before": nbformat.read(PATHS[5], as_version=4),  # as in a checkout
        "tour": executed(NAMES[0], tmp_path_factory, cut_network, monkeypatch),
        "background": executed(NAMES[1], tmp_path_factory, cut_network, monkeypatch),
    }
    with jupyter_lab(folder, state) as address:
        for name, notebook in notebooks.items():
            nbformat.write(notebook, folder / f"{name}.ipynb")
            hidden = sum(map(is_hidden, notebook.cells))
            url = f"{address}/lab/tree/{name}.ipynb?reset"
            with browser.page(url) as evaluate:
                view = evaluate(LOOK % len(notebook.cells))
            assert view["cells"] == len(notebook.cells)
            assert raw_markup(view["text"]) == []
            assert view["empty"] == 0
            assert view["folded"] == hidden
            assert len(view["text"]) > 4000
            shows_figures = re.search(r"^Figure \d+\.\d", view["text"], re.MULTILINE)
            assert bool(shows_figures) == (name != "before")

"""The book: what is executed and when, and what a reader's browser shows.

The book of the repository is at the profile smoke, with the network cut off; its
notebooks are run by test_chapters. Every page is opened in headless Chromium. Without a
Chromium these tests are skipped, unless RLREASON_REQUIRE_BROWSER=1 says that there must
be one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import websocket
from accessible import barriers
from smoke_book import run_chapter, smoke_root
from test_notebook_runner import write_notebook

from rlreason.bench.doctor import find_browser
from rlreason.execution.jobs import Outcome
from rlreason.publishing.book import (
    FROM_PAGES,
    BookError,
    Shelf,
    build_book,
    mathjax_files,
    prepare_notebook,
    show_first_figure,
)
from rlreason.publishing.notebooks import (
    Record,
    find_notebooks,
    notebook_digest,
)
from rlreason.runs.profiles import Profile

REPOSITORY = Path(__file__).parents[1]
GLUE = "from myst_nb import glue\nglue('{name}', {value}, display=False)"
PLAIN = Profile(description="test")


# What is executed, and when


class Quick:
    """An executor without kernels: a record is written, or a fault told."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def run(self, jobs):
        return {job.name: self.carry_out(job) for job in jobs}

    def carry_out(self, job) -> Outcome:
        if job.fresh():
            return Outcome(job.name, "fresh")
        self.started.append(job.name)
        path = Path(job.command[4])
        output = Path(job.command[job.command.index("--output") + 1])
        if "1 / 0" in path.read_text():
            told = f"a warning\nrlreason: {job.name} divided by zero"
            return Outcome(job.name, "failed", told)
        output.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, output)
        (notebook,) = (n for n in find_notebooks(path.parent) if n.name == job.name)
        digest = notebook_digest(notebook, PLAIN)
        record = Record(job.name, "smoke", {}, digest, 1.0, 1, {})
        (output / f"{job.name}.json").write_text(json.dumps(record.__dict__))
        return Outcome(job.name, "done")


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf("smoke", tmp_path / "run", 2, lambda line: None, Quick())


def executed(shelf: Shelf, folder: Path) -> list[str]:
    """The names of the notebooks of a folder that a shelf had to execute."""
    found = find_notebooks(folder)
    return shelf.execute(found, {n.name: notebook_digest(n, PLAIN) for n in found})


def test_what_has_not_changed_is_not_executed_again(shelf, tmp_path):
    write_notebook(tmp_path, "base", "1")
    write_notebook(tmp_path, "above", "2", needs=("base",))
    write_notebook(tmp_path, "apart", "3")
    assert sorted(executed(shelf, tmp_path)) == ["above", "apart", "base"]
    assert executed(shelf, tmp_path) == []
    write_notebook(tmp_path, "base", "1 + 1")
    # And what stands on it
    assert sorted(executed(shelf, tmp_path)) == ["above", "base"]
    (shelf.outputs / "apart.ipynb").unlink()
    assert executed(shelf, tmp_path) == ["apart"]


def test_all_failures_are_told_each_in_its_own_words(shelf, tmp_path):
    for name in "ad":
        write_notebook(tmp_path, name, "1 / 0")
    write_notebook(tmp_path, "e")
    with pytest.raises(BookError) as caught:
        executed(shelf, tmp_path)
    assert str(caught.value) == "a divided by zero\n\nd divided by zero"
    assert sorted(shelf.executor.started) == ["a", "d", "e"]


def test_a_notebook_is_a_job_on_one_thread_with_its_runs_under_the_source(
    shelf, tmp_path
):
    jobs = []
    shelf.executor.run = lambda given: jobs.extend(given) or {}
    write_notebook(tmp_path, "a", needs=("b",))
    write_notebook(tmp_path, "b")
    executed(shelf, tmp_path)
    assert {job.name: job.needs for job in jobs} == {"a": ("b",), "b": ()}
    assert {(job.cores, job.gpus) for job in jobs} == {(1, 1)}
    runs = {Path(job.environment["RLREASON_RUNS"]).parent for job in jobs}
    assert runs == {tmp_path / "run"}


def test_a_failing_cell_is_told_once_and_keeps_only_those_that_need_it(tmp_path):
    write_notebook(tmp_path, "a", "1 / 0")
    write_notebook(tmp_path, "b", needs=("a",))
    lines = []
    outputs = tmp_path / "run" / "notebooks"
    outputs.mkdir(parents=True)
    (outputs / "a.123.partial.ipynb").touch()  # of a book that was killed
    with pytest.raises(BookError) as caught:
        executed(Shelf("smoke", tmp_path / "run", 2, lines.append), tmp_path)
    told = str(caught.value)
    assert told.startswith("a, cell [1] failed")
    assert told.count("ZeroDivisionError: division by zero") == 1
    assert told.endswith("b was not begun: it needs a")
    assert lines == ["a ..."]
    assert [p.name for p in outputs.iterdir()] == ["a.failed.ipynb"]


# Notebooks as Sphinx wants them


def test_links_to_pages_and_alt_texts_are_as_the_book_has_them():
    link = "See [it](../book/notation.md#a) and [ours](01_background.ipynb)."
    picture = {
        "data": {"image/png": "AA=="},
        "metadata": {"image/png": {"alt": "A curve", "width": 5}},
    }
    shown = {"data": {"text/markdown": [link, "\n"]}, "metadata": {}}
    code = {"source": "'](../book/x.md)'", "metadata": {"tags": ["a"]}}
    code |= {"cell_type": "code", "outputs": [picture, shown, {"text": link}]}
    prose = {"cell_type": "markdown", "source": ["# A\n", link], "metadata": {}}
    content = {"cells": [prose, code]}
    before = json.dumps(content)
    prepared, right = prepare_notebook(content), content["cells"][1]
    assert json.dumps(content) == before  # a new one is made
    prose, code = prepared["cells"]
    moved = link.replace("../book/", "../")
    assert prose["source"] == f"# A\n{moved}"
    assert code["metadata"] == {
        "tags": ["a"],
        "mystnb": {"image": {"alt": "A curve"}},
    }
    assert code["outputs"][1]["data"]["text/markdown"] == f"{moved}\n"
    assert code["source"] == right["source"]  # code is not prose
    assert code["outputs"][2] == {"text": link}
    assert prepare_notebook(prepared) == prepared


def test_several_pictures_of_a_cell_share_their_texts_and_one_by_hand_stays():
    def cell(alts, metadata):
        outputs = [{"metadata": {"image/svg+xml": {"alt": alt}}} for alt in alts]
        return {"cell_type": "code", "source": "", "metadata": metadata} | {
            "outputs": outputs
        }

    by_hand = {"mystnb": {"image": {"alt": "Mine"}}}
    cells = [cell(["A", "B", "A"], {}), cell(["A"], by_hand), cell([], {})]
    found = [c["metadata"] for c in prepare_notebook({"cells": cells})["cells"]]
    assert found == [{"mystnb": {"image": {"alt": "A; B"}}}, by_hand, {}]


# A book of two pages: numbers across pages, faults of pages, two books at once


def test_the_first_page_shows_a_chapters_first_figure_with_its_words(tmp_path):
    page = (REPOSITORY / "book" / "intro.md").read_text().replace(*FROM_PAGES)
    (tmp_path / "intro.md").write_text(page)
    (tmp_path / "_static").mkdir()
    (tmp_path / "notebooks").mkdir()
    pictures = [
        {
            "data": {"image/png": data},
            "metadata": {"image/png": {"alt": f"Curve {data}"}},
        }
        for data in ("AAAA", "BBBB")
    ]
    said = {"data": {"text/markdown": "**Figure 15.1.** It rises."}}
    answer = "  [A](15_a.ipynb)."  # leads from another folder
    summary = {"data": {"text/markdown": ["- **Which** is best?\n", answer]}}
    outputs = [{"text": "no picture"}, summary, pictures[0], said, pictures[1]]
    cells = [{"source": "prose"}, {"outputs": outputs}]
    chapter = tmp_path / "notebooks" / "15_methods_side_by_side.ipynb"
    chapter.write_text(json.dumps({"cells": cells}))
    show_first_figure(tmp_path)
    text = (tmp_path / "intro.md").read_text()
    (file,) = re.findall(r"!\[Curve AAAA\]\((\S+)\)\n\n\*\*Figure 15\.1\.\*\*", text)
    assert (tmp_path / file).read_bytes() == b64decode("AAAA")
    answer = "- **Which** is best?\n  [A](notebooks/15_a.ipynb).\n"
    assert text.index("It rises.") < text.index(answer)
    assert "shows here" not in text
    show_first_figure(tmp_path)  # a page that does not ask stays as it is
    assert (tmp_path / "intro.md").read_text() == text


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A project with a first page that shows a number from a notebook's run."""
    root = tmp_path_factory.mktemp("small")
    (root / "plain.yaml").write_text("description: nothing is set")
    shutil.copytree(REPOSITORY / "book" / "_static", root / "book" / "_static")
    shutil.copy(REPOSITORY / "book" / "_config.yml", root / "book")
    (root / "book" / "_toc.yml").write_text(
        "format: jb-book\nroot: intro\nchapters:\n"
        "  - file: notebooks/number\n  - file: status\n"
    )
    (root / "book" / "intro.md").write_text(
        "# First\n\nAcross pages {glue:text}`notebooks/number.ipynb::answer:s`, "
        "of [a chapter](../notebooks/number.ipynb).\n"  # as the repository has it
    )
    prose = "# Number\n\nIt is {glue:text}`answer`; see [first](../book/intro.md)."
    source = GLUE.format(name="answer", value="6 * 7")
    write_notebook(root / "notebooks", "number", prose, source)
    return root


@pytest.fixture(scope="module")
def two_books(small):
    """The small book, asked for twice at once; with what was reported."""
    lines = []
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setenv("RLREASON_RUNS", str(small / "runs"))
        asked = [
            pool.submit(
                build_book, str(small / "plain.yaml"), root=small, report=lines.append
            )
            for _ in range(2)
        ]
        return [future.result() for future in asked], lines


def test_of_two_books_at_once_the_second_waits_and_finds_nothing_to_do(two_books):
    books, lines = two_books
    assert sorted(book.executed for book in books) == [[], ["number"]]
    assert books[0].records == books[1].records
    assert sum("waiting for another book" in line for line in lines) == 1
    assert lines.count("building the pages ...") == 1


def test_numbers_come_from_the_run_on_their_page_and_on_others(small, two_books):
    html = two_books[0][0].index.parent
    for page in ("intro.html", "notebooks/number.html"):
        assert '<span class="pasted-text">42</span>' in (html / page).read_text()
    assert 'href="../intro.html"' in (html / "notebooks" / "number.html").read_text()
    assert 'href="notebooks/number.html"' in (html / "intro.html").read_text()


def test_a_fault_of_a_page_is_an_error_and_leaves_the_old_book(
    small, two_books, monkeypatch
):
    monkeypatch.setenv("RLREASON_RUNS", str(small / "runs"))
    old = (two_books[0][0].index.parent / "intro.html").read_bytes()
    page = small / "book" / "intro.md"
    page.write_text(
        "# First\n\n[](nowhere.md) {glue:text}`notebooks/number.ipynb::no:s`\n"
    )
    with pytest.raises(BookError) as caught:
        build_book(str(small / "plain.yaml"), root=small)
    assert "nowhere.md" in str(caught.value)
    assert "'no'" in str(caught.value)
    assert (two_books[0][0].index.parent / "intro.html").read_bytes() == old


def test_a_folder_without_a_book_is_told(tmp_path):
    with pytest.raises(BookError, match="runs in a checkout"):
        build_book("smoke", root=tmp_path)


def test_mathjax_is_there_with_its_fonts():
    files = mathjax_files()
    assert "tex-chtml-full.js" in files
    assert sum(name.endswith(".woff") for name in files) > 15


# The book of the repository


@pytest.fixture(scope="module")
def built(tmp_path_factory, cut_network):
    """The book at the profile smoke, made with the network cut off."""
    root = smoke_root(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cut_network.environment.items():
            patch.setenv(name, value)
        patch.setenv("RLREASON_RUNS", str(root / "runs"))
        for notebook in find_notebooks(root / "notebooks"):
            run_chapter(notebook)
        return build_book("smoke", root=root)


def test_the_book_stands_on_the_chapters_that_were_run(built):
    assert built.executed == []


@pytest.fixture(scope="module")
def pages(built) -> list[Path]:
    html = built.index.parent
    generated = {"index.html", "genindex.html", "search.html"}
    found = [p for p in html.rglob("*.html") if p.name not in generated]
    return [page for page in sorted(found) if "_static" not in page.parts]


def test_the_book_is_made_without_the_network(built, cut_network):
    assert built.index.is_file()
    assert cut_network.attempts == []


def test_the_index_leads_to_the_first_page(built):
    (first,) = re.findall(r"url=([^\"]+)", built.index.read_text())
    assert (built.index.parent / first).is_file()


def test_every_notebook_is_in_the_table_of_contents(built, pages):
    names = {page.stem for page in pages}
    assert {record.notebook for record in built.records} <= names


def test_the_status_page_has_every_notebook_and_the_versions(built):
    text = (built.index.parent / "status.html").read_text()
    for record in built.records:
        assert f"notebooks/{record.notebook}.html" in text
    assert "2.13.0" in text


def test_no_page_loads_scripts_or_styles_over_the_network(pages):
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", page.read_text()):
            assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", tag), page.name


def test_every_page_can_be_found_ones_way_in_without_seeing_it(pages):
    for page in pages:
        assert barriers(page.read_text()) == [], page.name


def test_what_keeps_some_readers_out_is_noticed():
    # The wrong version: a page with every fault that the test above looks for
    bad = """<html><body><p>No title</p><h2>Part</h2><h4>Far below</h4>
    <img src="a.png" alt=" "><a href="b.html"><i class="icon"></i></a>
    <table><tr><th></th><th>value</th></tr></table></body></html>"""
    assert barriers(bad) == [
        "the page does not say its language",
        "picture without words: a.png",
        "empty head of a column: value",
        "link without words: b.html",
        "0 titles",
        "a heading of level 4 right under one of level 2",
    ]
    good = """<html lang="en"><body><h1>Title</h1><h2>Part</h2><h3>Detail</h3>
    <h2>Part</h2><div class="onlyprint"><h1>Title</h1></div>
    <img src="a.png" alt="A curve"><a href="b.html"><img src="a.png" alt="On"></a>
    <a href="#c" title="To this heading"></a>
    <table><tr><th>name</th></tr><tr><td></td></tr></table></body></html>"""
    assert barriers(good) == []
    two = good.replace("h2", "h1")
    assert barriers(two)[0] == "3 titles"


# In the browser


class Browser:
    """A headless Chromium, spoken to over the DevTools protocol."""

    def __init__(self, program: str, folder: Path) -> None:
        switches = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--remote-debugging-port=0",
            f"--user-data-dir={folder}",
        ]
        self.process = subprocess.Popen(
            [program, *switches, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        address = folder / "DevToolsActivePort"
        for _ in range(600):
            if address.is_file() and len(address.read_text().split()) == 2:
                break
            time.sleep(0.1)
        port, path = address.read_text().split()
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{port}{path}", suppress_origin=True, timeout=120
        )
        self.calls = 0
        self.events: list[dict] = []

    def call(self, method: str, session: str | None = None, **params) -> dict:
        """Send a command and return its result; events on the way are kept."""
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.calls:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(json.loads(self.socket.recv()))

    @contextmanager
    def page(self, url: str):
        """Open a page; gives a function that evaluates JavaScript in it."""
        self.events.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session)
        self.events.clear()
        self.call("Page.navigate", session, url=url)
        self.wait_for("Page.loadEventFired")

        def evaluate(expression: str):
            answer = self.call(
                "Runtime.evaluate",
                session,
                expression=expression,
                awaitPromise=True,
                returnByValue=True,
            )
            assert "exceptionDetails" not in answer, answer
            return answer["result"]["value"]

        try:
            yield evaluate
        finally:
            self.call("Target.closeTarget", targetId=target)

    def faults(self) -> list[str]:
        """What the page complained of: exceptions, console errors, failed loads."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            match event["method"]:
                case "Runtime.exceptionThrown":
                    found.append(json.dumps(params["exceptionDetails"]))
                case "Log.entryAdded" if params["entry"]["level"] == "error":
                    found.append(json.dumps(params["entry"]))
                case "Runtime.consoleAPICalled" if params["type"] == "error":
                    found.append(json.dumps(params["args"]))
                case "Network.loadingFailed" if not params.get("canceled"):
                    found.append(json.dumps(params))
        return found

    def addresses(self) -> list[str]:
        """The addresses that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        if os.environ.get("RLREASON_REQUIRE_BROWSER") == "1":
            pytest.fail("RLREASON_REQUIRE_BROWSER=1, but there is no Chromium")
        pytest.skip("no Chromium: install chromium, or set RLREASON_CHROMIUM")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


LOOK = """
(async () => {
  if (window.MathJax) await MathJax.startup.promise;
  const images = [...document.querySelectorAll("article img")];
  images.forEach(image => image.loading = "eager");
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  const equations = [...document.querySelectorAll(".math")];
  return {
    broken: images.filter(i => !i.naturalWidth).map(i => i.src),
    nameless: images.filter(i => !i.alt || /\\.(png|svg)$/.test(i.alt)).map(i => i.src),
    figures: document.querySelectorAll("article img, .cell_output svg").length,
    unset: equations.filter(e => !e.querySelector("mjx-container"))
                    .map(e => e.textContent),
    misset: document.querySelectorAll("mjx-merror").length,
    text: document.querySelector("article").innerText,
  };
})()
"""


@pytest.fixture(scope="module")
def views(browser, pages):
    """Every page as the browser showed it, with what it complained of."""
    found = {}
    for page in pages:
        with browser.page(page.as_uri()) as evaluate:
            view = evaluate(LOOK)
        found[page] = view | {"faults": browser.faults(), "asked": browser.addresses()}
    return found


def test_the_browser_check_sees_what_is_wrong(browser, tmp_path):
    # The wrong version: a page with every fault that the tests below look for
    page = tmp_path / "bad.html"
    page.write_text(
        "<article><img src='gone.png' alt='x'><img src='b.png'>"
        "<span class='math'>\\(x\\)</span>Traceback (most recent call last)</article>"
        "<script>console.error('told'); undefined_name</script>"
        "<script src='http://127.0.0.1:9/none.js'></script>"
    )
    with browser.page(page.as_uri()) as evaluate:
        view = evaluate(LOOK)
    faults = "".join(browser.faults())
    assert len(view["broken"]) == 2
    assert len(view["nameless"]) == 1
    assert view["unset"] == ["\\(x\\)"]
    assert "Traceback" in view["text"]
    for fault in ("told", "undefined_name", "ERR_FILE_NOT_FOUND"):
        assert fault in faults
    assert any(url.startswith("http") for url in browser.addresses())


def test_no_page_is_without_its_figures(built, views):
    executed = built.index.parents[1] / "source" / "notebooks"
    shown = 0
    for page, view in views.items():
        assert view["broken"] == [], page.name
        notebook = executed / f"{page.stem}.ipynb"
        if page.parent.name == "notebooks":
            made = count_figures(nbformat.read(notebook, as_version=4))
            assert view["figures"] >= made, f"{page.name}: {made} figures were made"
            shown += made
    assert shown, "not one notebook has a figure"


def count_figures(notebook) -> int:
    """Pictures that the page must show: what is glued, and outputs not removed."""
    made = 0
    for cell in notebook.cells:
        removed = {"remove-cell", "remove-output"} & set(cell.metadata.get("tags", []))
        for output in cell.get("outputs", []):
            glued = "scrapbook" in output.get("metadata", {})
            picture = any(
                kind.endswith(("image/png", "image/svg+xml"))
                for kind in output.get("data", {})
            )
            made += picture and (glued or not removed)
    return made


def test_every_figure_says_what_it_shows(views):
    for page, view in views.items():
        assert view["nameless"] == [], f"{page.name}: figures without an alt text"


def test_every_equation_is_set(views):
    for page, view in views.items():
        assert view["unset"] == [], page.name
        assert view["misset"] == 0, page.name


def test_no_page_has_a_script_error_or_shows_a_traceback(views):
    for page, view in views.items():
        assert view["faults"] == [], page.name
        assert "Traceback (most recent call last)" not in view["text"], page.name


def test_no_page_asks_the_network_for_anything(views):
    for page, view in views.items():
        outside = [u for u in view["asked"] if not u.startswith(("file:", "data:"))]
        assert outside == [], page.name

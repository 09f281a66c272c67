"""The book: what is executed and when, and what a reader's browser shows.

The book of the repository is built once, at the profile smoke and with the network cut
off, and every page is opened in headless Chromium. Without a Chromium these tests are
skipped, unless RLREASON_REQUIRE_BROWSER=1 says that there must be one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import websocket
from test_notebook_runner import write_notebook

from rlreason.bench.doctor import find_browser
from rlreason.publishing.book import BookError, Executor, build_book, mathjax_files
from rlreason.publishing.notebooks import (
    Record,
    find_notebooks,
    notebook_digest,
    read_record,
)
from rlreason.runs.profiles import Profile

REPOSITORY = Path(__file__).parents[1]
GLUE = "from myst_nb import glue\nglue('{name}', {value}, display=False)"


# What is executed, and when


class Shelf:
    """Notebooks in a folder, and an executor that notes what it runs."""

    def __init__(self, folder: Path, jobs: int = 2) -> None:
        self.notebooks = folder / "notebooks"
        self.reported: list[str] = []
        self.executor = Executor("smoke", folder / "run", jobs, self.reported.append)

    def execute(self) -> list[str]:
        found = find_notebooks(self.notebooks)
        profile = Profile(description="test")
        return self.executor.execute(
            found, {n.name: notebook_digest(n, profile) for n in found}
        )


@pytest.fixture
def quick(monkeypatch):
    """Let notebooks be 'run' without a kernel: a record is written, or a fault told."""

    def run(self, notebook):
        folder = self.folder / "notebooks"
        folder.mkdir(parents=True, exist_ok=True)
        self.report(notebook.name)
        source = notebook.path.read_text()
        if "1 / 0" in source:
            return f"{notebook.name} divided by zero"
        shutil.copy(notebook.path, folder)
        digest = notebook_digest(notebook, Profile(description="test"))
        record = Record(notebook.name, "smoke", {}, digest, 1.0, 1, {})
        (folder / f"{notebook.name}.json").write_text(json.dumps(record.__dict__))
        return None

    monkeypatch.setattr(Executor, "_run", run)


@pytest.mark.usefixtures("quick")
def test_notebooks_run_after_those_that_they_need(tmp_path):
    shelf = Shelf(tmp_path)
    write_notebook(shelf.notebooks, "a", needs=("b", "c"))
    write_notebook(shelf.notebooks, "b", needs=("c",))
    write_notebook(shelf.notebooks, "c")
    shelf.execute()
    assert shelf.reported == ["c", "b", "a"]


@pytest.mark.usefixtures("quick")
def test_what_has_not_changed_is_not_executed_again(tmp_path):
    shelf = Shelf(tmp_path)
    write_notebook(shelf.notebooks, "base", "1")
    write_notebook(shelf.notebooks, "above", "2", needs=("base",))
    write_notebook(shelf.notebooks, "apart", "3")
    assert sorted(shelf.execute()) == ["above", "apart", "base"]
    assert shelf.execute() == []
    write_notebook(shelf.notebooks, "base", "1 + 1")
    assert shelf.execute() == ["base", "above"]  # and what stands on it
    (shelf.executor.folder / "notebooks" / "apart.ipynb").unlink()
    assert shelf.execute() == ["apart"]


@pytest.mark.usefixtures("quick")
def test_a_failure_stops_only_what_needs_it_and_all_are_told(tmp_path):
    shelf = Shelf(tmp_path)
    write_notebook(shelf.notebooks, "a", "1 / 0")
    write_notebook(shelf.notebooks, "b", needs=("a",))
    write_notebook(shelf.notebooks, "c", needs=("b",))
    write_notebook(shelf.notebooks, "d", "1 / 0")
    write_notebook(shelf.notebooks, "e")
    with pytest.raises(BookError) as caught:
        shelf.execute()
    told = str(caught.value)
    for line in (
        "a divided by zero",
        "b was not run: it needs a",
        "c was not run: it needs b",
        "d divided by zero",
    ):
        assert told.count(line) == 1
    assert sorted(shelf.reported) == ["a", "d", "e"]


def test_notebooks_run_at_the_same_time_each_on_one_thread(tmp_path):
    # Each waits for the other's file: one at a time, neither would end
    shelf = Shelf(tmp_path)
    wait = (
        "import os, time, pathlib\nassert os.environ['OMP_NUM_THREADS'] == '1'\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / '{me}').touch()\nlimit = time.time() + 120\n"
        "while not (folder / '{other}').exists() and time.time() < limit:\n"
        "    time.sleep(0.05)\nassert (folder / '{other}').exists()"
    )
    write_notebook(shelf.notebooks, "a", wait.format(me="a", other="b"))
    write_notebook(shelf.notebooks, "b", wait.format(me="b", other="a"))
    assert sorted(shelf.execute()) == ["a", "b"]


def test_a_failing_cell_is_told_once_with_its_notebook(tmp_path):
    shelf = Shelf(tmp_path)
    write_notebook(shelf.notebooks, "a", "1 / 0")
    with pytest.raises(BookError) as caught:
        shelf.execute()
    assert str(caught.value).startswith("a, cell [1] failed")
    assert str(caught.value).count("ZeroDivisionError: division by zero") == 1


# A book of two notebooks: numbers across pages, and faults of pages


@pytest.fixture
def small(tmp_path):
    """A project with a first page that shows a number from a notebook's run."""
    (tmp_path / "plain.yaml").write_text("description: nothing is set")
    shutil.copytree(REPOSITORY / "book" / "_static", tmp_path / "book" / "_static")
    for name in ("_config.yml", "references.bib"):
        shutil.copy(REPOSITORY / "book" / name, tmp_path / "book")
    (tmp_path / "book" / "_toc.yml").write_text(
        "format: jb-book\nroot: intro\nchapters:\n"
        "  - file: notebooks/number\n  - file: status\n"
    )
    (tmp_path / "book" / "intro.md").write_text(
        "# First\n\nAcross pages {glue:text}`notebooks/number.ipynb::answer:s`.\n"
    )
    source = GLUE.format(name="answer", value="6 * 7")
    write_notebook(
        tmp_path / "notebooks",
        "number",
        "# Number\n\nIt is {glue:text}`answer`.",
        source,
    )
    return tmp_path


def test_numbers_come_from_the_run_on_their_page_and_on_others(small):
    built = build_book(str(small / "plain.yaml"), root=small)
    html = built.index.parent
    assert built.executed == ["number"]
    for page in ("intro.html", "notebooks/number.html"):
        assert '<span class="pasted-text">42</span>' in (html / page).read_text()
    # A second call finds nothing to do
    before = (html / "intro.html").stat().st_mtime_ns
    assert build_book(str(small / "plain.yaml"), root=small).executed == []
    assert (html / "intro.html").stat().st_mtime_ns == before


def test_a_fault_of_a_page_is_an_error_and_leaves_the_old_book(small):
    page = small / "book" / "intro.md"
    html = small / "book" / "_build" / "plain" / "html"
    html.mkdir(parents=True)
    (html / "index.html").write_text("the old book")
    page.write_text(
        "# First\n\n[](nowhere.md) {glue:text}`notebooks/number.ipynb::no:s`\n"
    )
    with pytest.raises(BookError) as caught:
        build_book(str(small / "plain.yaml"), root=small)
    assert "nowhere.md" in str(caught.value)
    assert "'no'" in str(caught.value)
    assert (html / "index.html").read_text() == "the old book"


def test_a_profile_with_a_key_that_no_notebook_takes_is_refused(small):
    (small / "plain.yaml").write_text("description: a\ncommon: {typo: 1}")
    with pytest.raises(BookError, match=r"no notebook takes common\.typo"):
        build_book(str(small / "plain.yaml"), root=small)


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
    root = tmp_path_factory.mktemp("book")
    for name in ("book", "notebooks"):
        shutil.copytree(
            REPOSITORY / name,
            root / name,
            ignore=shutil.ignore_patterns("_build", ".*"),
        )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cut_network.environment.items():
            patch.setenv(name, value)
        patch.setenv("RLREASON_RUNS", str(root / "runs"))
        return build_book("smoke", root=root)


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


def test_the_records_of_the_book_say_what_was_run(built):
    folder = built.index.parents[4] / "runs" / "book" / "smoke" / "notebooks"
    for record in built.records:
        assert record == read_record(record.notebook, folder)
        assert record.profile == "smoke"
        assert record.peak_mb is None or record.peak_mb > 50

"""The page in a notebook and, from anywhere else, in the browser of the system."""

import re
import sys
import webbrowser
from html import unescape
from types import ModuleType, SimpleNamespace
from urllib.request import url2pathname

import pytest

from gradclip import (
    ArgumentError,
    CallableSink,
    GradientClipper,
    JsonlSink,
    MemorySink,
    TensorBoardSink,
    show,
)
from tests.support.browser import missing, requests_of
from tests.support.curves import log_run
from tests.support.page import Page

FRAME = re.compile(r'<iframe srcdoc="([^"]*)" width="100%" height="(\d+)" [^<>]*></iframe>')


@pytest.fixture
def addresses_opened(monkeypatch, tmp_path):
    """Return the addresses that the system's browser was asked to open."""
    addresses: list[str] = []
    monkeypatch.setattr(webbrowser, "open", addresses.append)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return addresses


@pytest.fixture
def displayed(monkeypatch):
    """Say that this is a notebook; return what it displays."""
    outputs: list[dict[str, str]] = []
    notebook, display = ModuleType("IPython"), ModuleType("IPython.display")
    shell = SimpleNamespace(kernel=object())
    notebook.get_ipython = lambda: shell
    display.display = lambda content, raw: outputs.append(content)
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return outputs


def names_in(page):
    """Return the names of the runs in a page."""
    return re.findall(r'"overview": \{"format": \d+, "name": "([^"]*)"', page)


def test_from_a_terminal_the_browser_opens_a_file(addresses_opened, tmp_path):
    log_run(tmp_path / "a", 1.0, 2.0)
    path = show(tmp_path / "a")
    assert addresses_opened == [path.as_uri()]
    assert names_in(path.read_text(encoding="utf-8")) == [str(tmp_path / "a")]


def test_in_a_terminal_of_ipython(addresses_opened, displayed, tmp_path):
    """It has no kernel, and displays no HTML."""
    sys.modules["IPython"].get_ipython = lambda: SimpleNamespace()
    log_run(tmp_path / "a", 1.0, 2.0)
    show(tmp_path / "a")
    assert (len(addresses_opened), displayed) == (1, [])


def test_in_a_notebook_the_page_is_the_output(addresses_opened, displayed, tmp_path):
    log_run(tmp_path / "a", 1.0, 2.0)
    assert show(tmp_path / "a", height=700) is None
    [output] = displayed
    page, height = FRAME.fullmatch(output["text/html"]).groups()
    assert names_in(unescape(page)) == [str(tmp_path / "a")]
    assert height == "700"
    assert addresses_opened == []


def names_shown(displayed, *sources):
    """Return the names of the runs that are shown in a notebook."""
    show(*sources)
    return names_in(unescape(displayed.pop()["text/html"]))


def test_everything_that_can_be_shown(displayed, tmp_path):
    """Of a clipper what is in memory, else its folder or file; also after it was closed."""
    log_run(log := MemorySink(), 1.0, 2.0, 3.0)
    assert names_shown(displayed, log) == ["3 steps in memory"]
    log_run(tmp_path / "a", 1.0)
    assert names_shown(displayed, str(tmp_path / "a"), log) == [
        str(tmp_path / "a"),
        "3 steps in memory",
    ]
    folder, file = tmp_path / "b", tmp_path / "c.jsonl"
    sinks = {"1 steps in memory": MemorySink(), str(folder): TensorBoardSink(folder)}
    sinks |= {str(file): JsonlSink(file)}
    calls = CallableSink(lambda numbers, step: None)
    for name, sink in sinks.items():
        assert names_shown(displayed, log_run([calls, sink], 1.0)) == [name]


def test_a_running_clipper_is_flushed(displayed, training):
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=MemorySink()) as clipper:
        run.take(1.0, 2.0)
        assert names_shown(displayed, clipper) == ["2 steps in memory"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (lambda: (), "show() has nothing to show: give a folder or a file of logs, a MemorySink"),
        (lambda: [3], "show() got a int: give a folder or a file of logs, a MemorySink, or a"),
        (lambda: [MemorySink()], "There are no steps to show yet: give this sink to a clipper"),
        (lambda: ["missing"], "missing does not exist: give a directory or a file of logs."),
        (lambda: [log_run(None, 1.0)], "The clipper has no log that can be shown: attach it with"),
    ],
)
def test_what_cannot_be_shown_is_refused(addresses_opened, source, sentence):
    with pytest.raises(ArgumentError) as caught:
        show(*source())
    assert str(caught.value).startswith(sentence)
    assert addresses_opened == []


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_the_page_works_in_the_frame_of_a_notebook(browser, displayed, tmp_path):
    """Nothing is asked of any server."""
    log_run(log := MemorySink(), *[1.0 + step % 3 for step in range(200)], max_norm=2.0)
    show(log)
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<p>A notebook</p>{displayed[0]['text/html']}", encoding="utf-8")
    requests_of(browser)
    browser.get(notebook.as_uri())
    browser.switch_to.frame(browser.find_element("css selector", "iframe"))
    page = Page(browser)
    page.settled()
    assert page.curve("norm")["high"] == [1.0 + step % 3 for step in range(200)]
    complaints = page.complaints()
    browser.switch_to.default_content()
    assert complaints == []
    assert {url2pathname(each.split("?")[0]) for each in requests_of(browser)} <= {
        url2pathname(notebook.as_uri()),
        "about:srcdoc",
    }

"""The page as a tab of a real TensorBoard, in a browser."""

import math
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper, TensorBoardSink
from tests.support.browser import missing, requests_of
from tests.support.curves import curves_in, log_named, log_run
from tests.support.page import Page
from tests.support.tensorboard import eventually, tensorboard

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

ARTEFACTS = Path(__file__).parents[2] / "build" / "artefacts"
HOSTILE = "<img src=x onerror=alert(1)>"
STEPS = 300
PATIENCE = 5.0
"""Seconds between two looks of the page at runs that may grow."""


@pytest.fixture
def open_tab(browser, tmp_path):
    """Return a function that opens the tab of a server on a folder.

    The server asks nobody but itself, and the page complains of nothing.
    """

    @contextmanager
    def open_tab(folder, *options, query=""):
        # Or the page of another test goes on asking, and one at the same address is not loaded.
        browser.get("about:blank")
        requests_of(browser)
        browser.get_log("browser")
        with tensorboard(folder, tmp_path / "messages", *options) as server:
            browser.get(f"{server.address}{query}#gradients")
            frames = "return document.querySelectorAll('iframe').length"
            eventually(lambda: browser.execute_script(frames))
            browser.switch_to.frame(browser.find_element("css selector", "iframe"))
            eventually(lambda: browser.execute_script("return 'gradclipPage' in window"))
            page = Page(browser)
            page.settled()
            eventually(lambda: "are being read" not in page.texts("body")[0])
            yield page
            complaints = [text for text in page.complaints() if "data/plugin" in text]
            browser.switch_to.default_content()
            browser.get("about:blank")
        assert complaints == []
        asked = {each for each in requests_of(browser) if not each.startswith(("data:", "about:"))}
        own = server.address.split("/", 3)[2]
        assert {each.split("/", 3)[2] for each in asked} == {own}

    return open_tab


def runs_of(page):
    return page.texts(".runs .name")


def sentence_in(page, text):
    """Wait until the page says something."""
    return eventually(lambda: [line for line in page.texts("body")[0].split("\n") if text in line])


def check_curves(page, folder, *runs):
    """Compare what is drawn with what TensorBoard reads."""
    page.show(-1, 40)
    for index, run in enumerate(runs):
        logged = curves_in(folder / run)
        for name, tag in (("norm", "pre"), ("clipped_norm", "post"), ("threshold", "threshold")):
            curve = page.curve(name, index)
            points = logged[f"grad_norm/{tag}"][: len(curve["first"])]
            assert len(points) > 30
            assert curve["first"] == [point.step for point in points]
            assert curve["low"] == curve["high"] == [point.value for point in points]


def some_norms(count=STEPS):
    return [1.0 + step % 7 / 4 + (400 if step == count // 2 else 0) for step in range(count)]


@pytest.mark.parametrize("load_fast", ["auto", "false"])
def test_the_tab_shows_every_point_of_both_runs(open_tab, tmp_path, load_fast):
    """With TensorBoard's data server and without it."""
    logs = tmp_path / "logs"
    log_run(logs / "a", *some_norms(), max_norm=2.0)
    log_run(logs / "b" / "inner", *some_norms(60), max_norm=1.5)
    with open_tab(logs, f"--load_fast={load_fast}") as page:
        assert runs_of(page) == ["a", "b/inner"]
        check_curves(page, logs, "a", "b/inner")
        assert page.texts(".notes li") == []
        assert any("The norm was 401.8 at step 150" in text for text in page.texts(".incident"))
        folder = Path(os.environ.get("GRADCLIP_ARTEFACTS") or ARTEFACTS)
        folder.mkdir(parents=True, exist_ok=True)
        assert page.browser.save_screenshot(folder / "tab.png")


def test_a_running_training_is_followed(open_tab, tmp_path, training):
    """New steps and new runs appear; of a run that vanishes the last numbers stay."""
    logs, run = tmp_path / "logs", training()
    with GradientClipper(run.optimizer, 2.0, log=TensorBoardSink(logs / "a")) as clipper:
        run.take(*some_norms(50))
        clipper.flush()
        with open_tab(logs) as page:
            assert page.drawn()["range"]["last"] == 49.5
            run.take(*some_norms(30))
            clipper.flush()
            log_run(logs / "b", *some_norms(40))
            eventually(lambda: page.drawn()["range"]["last"] == 79.5 and len(runs_of(page)) == 2)
            page.show(49.5, 79.5)
            assert page.curve("norm")["high"][-30:] == some_norms(30)
            shutil.rmtree(logs / "b")
            sentence_in(page, "b is gone: its last numbers are shown.")
            assert runs_of(page) == ["a", "b"]


def test_a_hidden_tab_asks_for_nothing(open_tab, browser, tmp_path, training):
    """Once it is seen again it shows what was logged meanwhile."""
    logs, run = tmp_path / "logs", training()
    with GradientClipper(run.optimizer, 2.0, log=TensorBoardSink(logs / "a")) as clipper:
        run.take(*some_norms(50))
        clipper.flush()
        with open_tab(logs) as page:
            hidden = (
                "Object.defineProperty(document, 'hidden', { get: () => %s, configurable: true })"
            )
            browser.execute_script(hidden % "true")
            run.take(*some_norms(30))
            clipper.flush()
            requests_of(browser)
            time.sleep(1.5 * PATIENCE)
            assert [each for each in requests_of(browser) if "data/plugin" in each] == []
            browser.execute_script(hidden % "false")
            eventually(lambda: page.drawn()["range"]["last"] == 79.5)


def test_several_folders_below_a_prefix_that_is_read_only(open_tab, tmp_path):
    """Runs have the names that TensorBoard gives them."""
    log_run(tmp_path / "x" / "one", *some_norms(50))
    log_run(tmp_path / "y", *some_norms(50))
    for place in (tmp_path / "x" / "one", tmp_path / "y"):
        place.chmod(0o555)
    spec = f"--logdir_spec=first:{tmp_path / 'x'},{tmp_path / 'y'}"
    try:
        with open_tab(None, spec, "--path_prefix=/board/here") as page:
            assert runs_of(page) == ["first/one", "."]
            check_curves(page, tmp_path / "x", "one")
    finally:
        for place in (tmp_path / "x" / "one", tmp_path / "y"):
            place.chmod(0o755)


def test_names_stay_text(open_tab, tmp_path):
    log = TensorBoardSink(tmp_path / "logs" / HOSTILE, per_parameter="all", weights_every=1)
    names = [f"{HOSTILE}.weight", "b"]
    optimizer_options = {"max_norm": 2.0}
    log_named(log, names, *[(3.0, 4.0)] * 40, (90.0, math.nan), **optimizer_options)
    with open_tab(tmp_path / "logs") as page:
        assert page.all("img") == []
        assert runs_of(page) == [HOSTILE]
        assert {*page.drawn()["map"]["names"]} == {*names}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_tab_is_as_light_as_tensorboard(open_tab, tmp_path, theme):
    log_run(tmp_path / "logs", *some_norms(50))
    query = "?darkMode=true" if theme == "dark" else ""
    with open_tab(tmp_path / "logs", query=query) as page:
        shown = page.browser.execute_script("return document.querySelector('.gradclip').dataset")
        assert shown["theme"] == theme


def test_other_scalars_can_be_chosen_as_losses(open_tab, tmp_path):
    with SummaryWriter(str(tmp_path / "logs")) as writer:
        log_run(writer, *some_norms(50))
        for step in range(50):
            writer.add_scalar("train/loss", 2.0 - step / 64, step)
    with open_tab(tmp_path / "logs") as page:
        [choice] = page.all(".choice select")
        choice.send_keys("train")
        assert page.curve("value")["high"] == [2.0 - step / 64 for step in range(50)]


def test_what_cannot_be_shown_is_said(open_tab, tmp_path):
    """A folder that is empty or foreign, a damaged file, numbers of a newer version."""
    logs = tmp_path / "logs"
    logs.mkdir()
    with open_tab(logs) as page:
        sentence_in(page, f"There are no event files in {logs}: give a GradientClipper")
        with SummaryWriter(str(logs / "foreign")) as writer:
            writer.add_scalar("accuracy", 0.5, 0)
        sentence_in(page, f"The event files in {logs} have no gradient norms: give a")
        log_run(logs / "damaged", *some_norms(50))
        [file] = (logs / "damaged").iterdir()
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 255
        file.write_bytes(bytes(content))
        sentence_in(page, f"{file}: it is cut short or damaged, and was read up to that point.")
        assert runs_of(page) == ["damaged"]
        with SummaryWriter(str(logs / "newer")) as writer:
            log_run(writer, *some_norms(50))
            writer.add_scalar("grad_norm/curvature", 0.5, 0)
        sentence_in(page, "newer: it has numbers of a newer gradclip: grad_norm/curvature.")
        assert runs_of(page) == ["damaged", "newer"]

"""The pictures in docs/, made from runs of the demo and of an example: ``make pictures``."""

from __future__ import annotations

import base64
import shutil
import tempfile
import time
from contextlib import chdir
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome, Keys

from gradclip.cli.main import main
from tests.support import browser
from tests.support import tensorboard as server
from tests.support.docs import run_example
from tests.support.page import Page, page_file

DOCS = Path(__file__).resolve().parent
STEPS = 100
"""Steps of the runs that charts overlay: with more their curves would hide each other."""
TRIED = "20"
"""The threshold that is tried in a picture."""
_PANELS = """
const panels = [...document.querySelectorAll(".panel")];
const [first] = panels.filter((panel) => panel.querySelector(".trial"));
const [last] = panels.filter((panel) => panel.querySelector(".incident"));
const top = first.getBoundingClientRect().top - 12;
const height = last.getBoundingClientRect().bottom + 12 - top;
return { x: 0, y: top + scrollY, width: innerWidth, height };
"""
OVERLAY = "norm before and after, threshold"


def tensorboard(logs: Path, path: Path) -> None:
    """Save a screenshot of TensorBoard's chart that overlays norms and threshold."""
    curves = {
        f"grad_norm/{name} ({run})"
        for name in ("pre", "post", "threshold")
        for run in ("unclipped", "clipped")
    }
    # Without its data server, TensorBoard gives a curve the same symbol in both runs.
    with (
        server.tensorboard(logs, logs / "messages", "--load_fast=false") as served,
        browser.chromium() as chrome,
    ):
        sharpen(chrome, 1200, 1000, 2)
        browser.open_charts(chrome, served.address)
        server.eventually(lambda: curves <= {*browser.charts_in(chrome).get(OVERLAY, {})})
        card = browser.enlarged(chrome, OVERLAY)
        time.sleep(1)  # it grows slowly
        card.screenshot(str(path))
    make_small(path, 64)


def page(logs: Path, path: Path) -> None:
    """Save the upper part of the interactive page of both runs."""
    with browser.chromium() as chrome:
        sharpen(chrome, 1100, 1250, 1.5)
        opened(chrome, logs / "unclipped", logs / "clipped")
        chrome.save_screenshot(str(path))  # in all colours: few would not do for the map


def threshold(logs: Path, path: Path) -> None:
    """Save the panels of the page of a run where a threshold is tried, its advice and incidents."""
    with browser.chromium() as chrome:
        sharpen(chrome, 1100, 1000, 1.5)
        shown = opened(chrome, logs)
        [field] = shown.all(".trial input[type=text]")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(TRIED, Keys.TAB)
        shown.settled()
        clip = chrome.execute_script(_PANELS)
        options = {"captureBeyondViewport": True, "clip": {**clip, "scale": 1}}
        picture = chrome.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
    path.write_bytes(base64.b64decode(picture))
    make_small(path, 256)


def opened(chrome: Chrome, *runs: Path) -> Page:
    """Open the page of some runs, once it is drawn."""
    file = page_file(runs, runs[0].parent)
    chrome.get(file.absolute().as_uri())
    shown = Page(chrome)
    shown.settled()
    return shown


def tab(logs: Path, path: Path) -> None:
    """Save a screenshot of TensorBoard's tab "Gradients"."""
    with (
        server.tensorboard(logs, logs / "messages") as served,
        browser.chromium() as chrome,
    ):
        sharpen(chrome, 1200, 900, 1.5)
        chrome.get(f"{served.address}#gradients")
        [frame] = server.eventually(lambda: chrome.find_elements("css selector", "iframe"))
        chrome.switch_to.frame(frame)
        server.eventually(lambda: chrome.execute_script("return 'gradclipPage' in window"))
        Page(chrome).settled()
        chrome.switch_to.default_content()
        chrome.save_screenshot(str(path))
    make_small(path, 256)


def sharpen(chrome: Chrome, width: int, height: int, scale: float) -> None:
    """Give a browser a window of a size, without scrollbars, and more dots than pixels."""
    chrome.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def report(logs: Path, path: Path) -> None:
    """Save the picture of the report of both runs."""
    end(main(["report", str(logs / "unclipped"), str(logs / "clipped"), "--plot", str(path)]))
    make_small(path, 256)


def make_small(path: Path, colours: int) -> None:
    """Reduce a picture to few colours."""
    with Image.open(path) as picture:
        few_colours = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    few_colours.save(path, optimize=True)


def end(code: int) -> None:
    """Exit with the exit code of a failed command."""
    if code:
        raise SystemExit(code)


def make() -> None:
    """Run the demo as it is, and for fewer steps, and make every picture."""
    whole, logs, minimal = Path("whole"), Path("demo"), Path("runs/minimal")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        end(main(["demo", "--out", str(whole)]))
        shutil.copy(whole / "demo.png", DOCS)
        make_small(DOCS / "demo.png", 64)
        run_example("minimal.py", str(minimal), cwd=Path(folder))
        threshold(minimal, DOCS / "threshold.png")
        end(main(["demo", "--steps", str(STEPS), "--out", str(logs)]))
        tensorboard(logs, DOCS / "tensorboard.png")
        report(logs, DOCS / "report.png")
        page(logs, DOCS / "page.png")
        tab(logs, DOCS / "tab.png")
        run_example("explosion.py", "--out", str(DOCS / "explosion.png"))


if __name__ == "__main__":
    lacking = browser.missing()
    if lacking:
        raise SystemExit(lacking)
    make()

"""The README's pictures, made from a run of the demo: ``make pictures``."""

from __future__ import annotations

import tempfile
import time
from contextlib import chdir
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome

from gradclip.cli.main import main
from tests.support import browser
from tests.support import tensorboard as server
from tests.support.page import Page

DOCS = Path(__file__).resolve().parent
STEPS = 100
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
    file = logs / "page.html"
    end(main(["report", str(logs / "unclipped"), str(logs / "clipped"), "--html", str(file)]))
    with browser.chromium() as chrome:
        sharpen(chrome, 1100, 1250, 1.5)
        chrome.get(file.absolute().as_uri())
        Page(chrome).settled()
        chrome.save_screenshot(str(path))


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
    """Run the demo for as many steps as its curves stay distinct, and make every picture."""
    logs = Path("demo")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        end(main(["demo", "--steps", str(STEPS), "--out", str(logs)]))
        tensorboard(logs, DOCS / "tensorboard.png")
        report(logs, DOCS / "report.png")
        page(logs, DOCS / "page.png")


if __name__ == "__main__":
    lacking = browser.missing()
    if lacking:
        raise SystemExit(lacking)
    make()

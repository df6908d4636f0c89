"""The README's pictures, made from a run of the demo: ``make pictures``."""

from __future__ import annotations

import tempfile
from contextlib import chdir
from pathlib import Path

from PIL import Image

from gradclip.cli.main import main
from tests.support import browser
from tests.support import tensorboard as server

DOCS = Path(__file__).resolve().parent
STEPS = 100
OVERLAY = "norm before and after, threshold"
MARGIN = 12


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
        browser.chromium(1200, 1000, scale=2) as page,
    ):
        page.show(served.address, OVERLAY, curves)
        left, top, width, height = page.place(OVERLAY)
        page.picture(path, [left - MARGIN, top - MARGIN, width + 2 * MARGIN, height + 2 * MARGIN])
    make_small(path, 64)


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


if __name__ == "__main__":
    lacking = browser.missing()
    if lacking:
        raise SystemExit(lacking)
    make()

"""Make the README's pictures anew from a demo run: ``make pictures``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from gradclip.cli import main
from tests.sinks import browser, server

DOCS = Path(__file__).parent
STEPS = 100
OVERLAY = "norm before and after, threshold"
MARGIN = 12


def tensorboard(logs: Path, path: Path) -> None:
    """Take a picture of the chart that overlays norms and threshold, as TensorBoard shows it."""
    curves = {
        f"grad_norm/{name} ({run})"
        for name in ("pre", "post", "threshold")
        for run in ("unclipped", "clipped")
    }
    # Without its data server TensorBoard gives a curve the same symbol in both runs.
    with (
        server.tensorboard(logs, logs / "messages", "--load_fast=false") as served,
        browser.chromium(1200, 1000, scale=2) as page,
    ):
        page.show(served.address, OVERLAY, curves)
        left, top, width, height = page.place(OVERLAY)
        page.picture(path, [left - MARGIN, top - MARGIN, width + 2 * MARGIN, height + 2 * MARGIN])
    with Image.open(path) as picture:
        few_colours = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few_colours.save(path, optimize=True)


def make() -> None:
    """Run the demo, as long as its curves can be told apart, and make every picture of it."""
    with tempfile.TemporaryDirectory() as folder:
        code = main(["demo", "--steps", str(STEPS), "--out", folder])
        if code:
            raise SystemExit(code)
        tensorboard(Path(folder), DOCS / "tensorboard.png")


if __name__ == "__main__":
    lacking = browser.missing()
    if lacking:
        raise SystemExit(lacking)
    make()

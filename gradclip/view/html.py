"""The page and the runs that it shows in one HTML file, which needs no network."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from math import inf
from pathlib import Path

from ..errors import ArgumentError
from ..report.run import Run
from .arrays import Json
from .assets import script, style
from .run_view import FORMAT, RunView

MOST_BYTES = 2_400_000
"""Size of the runs in a file; longer runs are kept by the extremes of buckets of steps."""
BYTES_OF_BUCKET = 16
"""Bytes that the curves of a bucket take at least, of numbers that are not all alike."""
MAP_VALUES = 400_000
"""Values of parameters in a file, of all maps."""
SCALAR_VALUES = 100_000
"""Values of other scalars in a file, of all runs."""
MOST_MAP_COLUMNS, FEWEST_MAP_COLUMNS = 256, 16
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
body {{ margin: 0; }}
{style}</style>
</head>
<body>
<div id="gradclip">
<noscript>This page draws its curves with JavaScript, which is off here.</noscript>
</div>
<script type="application/json" id="gradclip-runs">{runs}</script>
<script type="module">
{script}
showEmbedded();
</script>
</body>
</html>
"""


def check_page(path: str | os.PathLike[str]) -> None:
    """Check that a page can be written to a path, before the runs are read.

    Raises:
        ArgumentError: The path does not end with .html, is a folder, or is in a folder that does
            not exist.
    """
    name = os.fspath(path)
    needed = "give a file that ends with .html"
    if not name.lower().endswith((".html", ".htm")) or "\0" in name:
        raise ArgumentError(f"The page's path is {name!r}: {needed}.")
    if os.path.isdir(name):
        raise ArgumentError(f"The page's path {name!r} is a folder: {needed}.")
    folder = os.path.dirname(name)
    if folder and not os.path.isdir(folder):
        raise ArgumentError(f"There is no folder {folder!r} for the page: make it, or {needed}.")


def write_page(runs: Sequence[Run], path: str | os.PathLike[str]) -> None:
    """Write a page of some runs.

    Args:
        runs: The runs, at least one.
        path: The file; one that exists is replaced.
    """
    Path(path).write_text(page_of(runs), encoding="utf-8")


def page_of(runs: Sequence[Run]) -> str:
    """Return the page of some runs as HTML.

    It holds every logged number of runs that are not too long, and of others the smallest and the
    largest of each bucket of steps, so that no extreme is lost. Shares of thresholds are counted
    from all steps.
    """
    names = ", ".join(run.name for run in runs)
    return _PAGE.format(
        title=html.escape(f"Gradients of {names}"[:120]),
        style=style(),
        script=script(),
        runs=_embedded(runs),
    )


def _embedded(runs: Sequence[Run]) -> str:
    """Return the runs' answers as JSON that may stand in a script element."""
    views = [RunView(run) for run in runs]
    fixed = [
        {
            "overview": view.overview,
            "parameters": _maps(view, len(views)),
            "scalars": _scalars(view, len(views)),
        }
        for view in views
    ]
    room = MOST_BYTES - len(json.dumps(fixed))
    series = _series_within(views, max(room, MOST_BYTES // 4))
    content = {
        "format": FORMAT,
        "notes": [],
        "runs": [
            {**answers, "series": curves} for answers, curves in zip(fixed, series, strict=True)
        ],
    }
    # A name such as </script> would end the element; JSON may write any letter as a number.
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c")


def _series_within(views: Sequence[RunView], room: int) -> list[Json]:
    """Return the curves of the runs in the smallest buckets that fit into a number of bytes."""
    buckets = max(len(view.run) for view in views)
    # Packing takes a second for a million numbers: sizes that will not fit are not tried.
    while buckets > 1024 and BYTES_OF_BUCKET * len(views) * buckets > room:
        buckets //= 2
    while True:
        series = [view.series(-inf, inf, buckets) for view in views]
        if buckets <= 1024 or len(json.dumps(series)) <= room:
            return series
        buckets //= 2


def _scalars(view: RunView, runs: int) -> dict[str, Json]:
    """Return the other scalars of a run, in fewer buckets the more there are."""
    tags = view.overview["scalars"]
    buckets = max(SCALAR_VALUES // (2 * max(len(tags), 1) * runs), 64)
    return {tag: view.scalar(tag, -inf, inf, buckets) for tag in tags}


def _maps(view: RunView, runs: int) -> dict[str, Json]:
    """Return the maps of the parameters of a run, in fewer columns the more parameters it has."""
    maps = {}
    quantities = view.overview["quantities"]
    for quantity in quantities:
        rows = view.parameters(quantity, 0, 0, 1, most=0)["matching"]
        columns = MAP_VALUES // (max(rows, 1) * len(quantities) * runs)
        columns = min(max(columns, FEWEST_MAP_COLUMNS), MOST_MAP_COLUMNS)
        most = MAP_VALUES // (columns * len(quantities) * runs)
        maps[quantity] = view.parameters(quantity, -inf, inf, columns, most=max(most, 24))
    return maps

"""Pictures of several runs: the check of the path, drawing, and saving."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...errors import ArgumentError
from ..advice import Advice, advised
from ..run import Run
from ..summary import summarized

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
MOST_RUNS = 12
"""Runs in one picture."""


def check_picture(path: str | os.PathLike[str]) -> None:
    """Check that a picture can be drawn at a path, before the runs are read.

    Args:
        path: Path of the picture's file.

    Raises:
        ArgumentError: The path does not end with .png or .svg, is a folder, or is in a folder that
            does not exist.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArgumentError(f"The picture's path is a {type(path).__name__}: give a path.")
    name = os.fspath(path)
    needed = "give a file that ends with .png or .svg"
    if os.path.splitext(name)[1].lower() not in ENDINGS or "\0" in name:
        raise ArgumentError(f"The picture's path is {name!r}: {needed}.")
    if os.path.isdir(name):
        raise ArgumentError(f"The picture's path {name!r} is a folder: {needed}.")
    folder = os.path.dirname(name)
    if folder and not os.path.isdir(folder):
        raise ArgumentError(f"There is no folder {folder!r} for the picture: make it, or {needed}.")
    _require_matplotlib()


def check_runs(runs: Sequence[Run]) -> None:
    """Check that one picture has room for all runs.

    Raises:
        ArgumentError: There are too many runs.
    """
    if len(runs) > MOST_RUNS:
        raise ArgumentError(
            f"Found {len(runs)} runs: a picture has room for {MOST_RUNS}, give fewer."
        )


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "gradclip[report]".') from error


def draw(
    runs: Sequence[Run], path: str | os.PathLike[str], advice: Sequence[Advice] | None = None
) -> Figure:
    """Write a picture of runs, side by side.

    Args:
        runs: The runs, at least one.
        path: File to write, which ends with .png or .svg. An existing file is replaced after
            everything has been drawn.
        advice: Advice for each run; None computes it.

    Returns:
        The picture, for notebooks.

    Raises:
        ArgumentError: The path is not one of a picture, or there are too many runs.
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written; an existing file stays unchanged.
    """
    check_picture(path)
    return _drawn(runs, advice, path)


def figure_of(runs: Sequence[Run], advice: Sequence[Advice] | None = None) -> Figure:
    """Return the picture that `draw` writes, a figure that pyplot does not manage.

    Raises:
        ArgumentError: There are too many runs.
        ImportError: matplotlib is not installed.
    """
    _require_matplotlib()
    return _drawn(runs, advice)


def _drawn(
    runs: Sequence[Run],
    advice: Sequence[Advice] | None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    import matplotlib

    from .figure import laid_out  # not at the top: it imports matplotlib

    check_runs(runs)
    # Axes near the ends of float64 overflow in matplotlib's arithmetic for margins, harmlessly.
    with matplotlib.rc_context(), np.errstate(over="ignore", under="ignore"):
        matplotlib.rcdefaults()  # a style of the user may not fit
        matplotlib.rcParams["svg.hashsalt"] = "gradclip"  # equal pictures have equal bytes
        figure = laid_out(runs, advice or [advised(run, summarized(run)) for run in runs])
        if path is not None:
            _save(figure, os.fspath(path))
    return figure


def _save(figure: Figure, path: str) -> None:
    """Write a figure to a file, completely or not at all."""
    content = io.BytesIO()
    if path.lower().endswith(".svg"):
        figure.savefig(content, format="svg", metadata={"Date": None})
    else:
        figure.savefig(content, format="png", pil_kwargs={"optimize": True})
    target = os.path.realpath(path)  # os.replace would turn a link into a file
    temporary = f"{target}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as file:
            file.write(content.getvalue())
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)

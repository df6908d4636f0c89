"""The page of runs in a notebook, or in a browser from anywhere else."""

from __future__ import annotations

import html
import os
import sys
import tempfile
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from ..report.reading import read_runs
from ..report.run import Run, run_of
from .html import page_of

if TYPE_CHECKING:
    from ..clipper import GradientClipper
    from ..records.sinks.base import Sink
    from ..records.sinks.memory import MemorySink

    Source = str | os.PathLike[str] | MemorySink | GradientClipper

HEIGHT = 1000
"""Height of the page in a notebook, in pixels."""
_FRAME = (
    '<iframe srcdoc="{page}" width="100%" height="{height}" style="border: 0" '
    'allow="clipboard-write" title="Gradients"></iframe>'
)


def show(*sources: Source, height: int = HEIGHT) -> Path | None:
    """Show the interactive page of some runs, as ``gradclip report --html`` writes it.

    In Jupyter, VS Code and Colab the page is the output of the cell, and stays in the notebook when
    it is saved. Elsewhere it is written to a temporary file, which the browser opens.
    <!-- test: tests/page/test_show.py -->

    Examples:
        ```python
        sink = gradclip.MemorySink(per_parameter="all")
        clipper = gradclip.GradientClipper(optimizer, 1.0, log=sink)
        ...  # train
        gradclip.show(clipper)
        ```

    Args:
        sources: A folder or a file of logs, as ``gradclip report`` takes it; a `MemorySink`; or a
            `GradientClipper`, whose logs are flushed and shown. Several are shown side by side.
        height: Height of the page in a notebook, in pixels.

    Returns:
        The file; None in a notebook.

    Raises:
        ArgumentError: No source, an invalid one, or one without a run.
    """
    if not sources:
        raise ArgumentError(f"show() has nothing to show: {_NEEDED}.")
    page = page_of([run for source in sources for run in _runs_of(source)])
    if _is_notebook():
        _display(_FRAME.format(page=html.escape(page), height=int(height)))
        return None
    with tempfile.NamedTemporaryFile(
        "w", prefix="gradclip-", suffix=".html", delete=False, encoding="utf-8"
    ) as file:
        file.write(page)
    path = Path(file.name)
    webbrowser.open(path.as_uri())
    return path


_NEEDED = "give a folder or a file of logs, a MemorySink, or a GradientClipper"


def _runs_of(source: object) -> Sequence[Run]:
    """Return the runs of a source."""
    if isinstance(source, str | os.PathLike):
        return read_runs([source])
    # Only now: these modules import torch, and whoever has such an object has imported them.
    from ..clipper import GradientClipper
    from ..records.sinks.memory import MemorySink

    if isinstance(source, MemorySink):
        return [_run_in_memory(source)]
    if isinstance(source, GradientClipper):
        source.flush()
        return _runs_in(source.sinks)
    raise ArgumentError(f"show() got a {type(source).__name__}: {_NEEDED}.")


def _run_in_memory(sink: MemorySink) -> Run:
    if not sink.steps:
        raise ArgumentError(
            "There are no steps to show yet: give this sink to a clipper as log=, take steps, and "
            "call the clipper's flush()."
        )
    return run_of(sink.steps, f"{len(sink.steps):,} steps in memory")


def _runs_in(sinks: Sequence[Sink]) -> Sequence[Run]:
    """Return the runs of a clipper: those in memory, else those in the first of its files."""
    from ..records.sinks.memory import MemorySink

    for sink in sinks:
        if isinstance(sink, MemorySink):
            return [_run_in_memory(sink)]
    for sink in sinks:
        if (place := getattr(sink, "place", None)) is not None:
            return read_runs([place])
    raise ArgumentError(
        "The clipper has no log that can be shown: attach it with log=MemorySink(), or with a "
        "folder as log=."
    )


def _is_notebook() -> bool:
    """Return whether a notebook shows what this process displays."""
    module: Any = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return getattr(shell, "kernel", None) is not None


def _display(content: str) -> None:
    from IPython.display import display

    # Not as an HTML object, which advises against frames.
    display({"text/html": content, "text/plain": "The page of gradclip"}, raw=True)

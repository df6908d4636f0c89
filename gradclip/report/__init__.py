"""The report on logged runs: summaries of their norms, and advice on the threshold.

``reading.py`` reads the files, with ``event_files.py`` for those of TensorBoard and
``trainer_logs.py`` for those of trainers, whose tags ``tags.py`` knows. ``run.py`` holds a run in
arrays; ``summary.py``, ``losses.py`` and ``incidents.py`` gather its facts, ``kinds.py`` judges
them, ``confidence.py`` says how sure that is, and ``advice.py`` makes it a line of code;
``printing.py`` and ``pictures/`` show it.
Nothing here imports torch, so that the command starts at once.

Called by: records, view, cli.
Imports: errors, records.
"""

from __future__ import annotations

from .reading import read_runs
from .run import Run

__all__ = [
    "Run",
    "advice",
    "clip_rate",
    "event_files",
    "incidents",
    "pictures",
    "printing",
    "read_runs",
    "reading",
    "run",
    "shares",
    "summary",
    "tags",
]

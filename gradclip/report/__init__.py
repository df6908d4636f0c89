"""Reads runs back: what their norms were, and what threshold to take.

``reading.py`` finds the files, ``run.py`` is a run in columns, ``summary.py`` and ``advice.py``
draw conclusions, ``show.py`` prints them, ``pictures/`` draws them. Nothing here needs torch.

Called by: records, cli.
Imports: errors, records.
"""

from __future__ import annotations

from .reading import read_runs
from .run import Run

__all__ = ["Run", "pictures", "printing", "read_runs", "run", "show"]

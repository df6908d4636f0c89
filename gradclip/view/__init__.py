"""The interactive page of logged runs, and the answers that it asks for.

``run_view.py`` answers what the page asks about a run, as JSON: its overview, curves reduced to the
smallest and largest value of each bucket of steps (``series.py``), norms of parameters
(``parameters.py``), and the share of the steps that any threshold would have clipped
(``distribution.py``); ``arrays.py`` packs the numbers. Nothing here imports torch.

Called by: no other room.
Imports: errors, report.
"""

from .run_view import RunView

__all__ = ["RunView"]

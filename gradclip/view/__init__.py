"""The interactive page of logged runs: zoom, thresholds to try, incidents, parameters.

``page/`` is the page: ES modules that ``assets.py`` joins to one script, and a style sheet.
``html.py`` writes it with runs into one file. ``run_view.py`` answers what the page asks about a
run, as JSON: curves reduced to the smallest and largest value of each bucket of steps
(``series.py``), numbers of parameters (``parameters.py``), the share of the steps that any
threshold would have clipped (``distribution.py``), packed by ``arrays.py``.
``plugin.py`` serves the page and its answers as a tab of TensorBoard (``served_runs.py``): from
event files that it follows (``local_runs.py``), or from a sample of TensorBoard's own
(``provided_runs.py``). Nothing here imports torch.

``show.py`` shows the page in a notebook or a browser.

Called by: cli.
Imports: errors, report; `show` also records and clipper.
"""

__all__ = ["html"]

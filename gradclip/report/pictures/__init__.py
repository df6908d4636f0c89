"""Pictures of runs, drawn with matplotlib, which is imported when a picture is asked for.

``picture.py`` checks, draws and saves; ``figure.py`` lays the panels out. Each kind of panel has a
module: ``panels.py`` over the steps, ``distribution.py``, ``heat_map.py``.
"""

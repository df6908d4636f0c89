"""The command line: ``gradclip demo`` and ``gradclip report``.

``main.py`` reads the arguments. Torch, TensorBoard and matplotlib are imported by the command that
needs them, so that ``--help`` and ``report`` start at once.

Called by: no other room.
Imports: errors, records, clipper, report, view.
"""

from .main import main

__all__ = ["main"]

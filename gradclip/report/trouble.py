"""What goes wrong when runs are read."""

from __future__ import annotations

import warnings
from pathlib import Path


def warn_of(path: Path, what: str) -> None:
    """Warn that part of a file cannot be read; the rest is."""
    warnings.warn(f"{path}: {what}.", UserWarning, stacklevel=2)

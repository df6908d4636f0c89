"""What goes wrong when runs are read."""

from __future__ import annotations

import warnings
from pathlib import Path


class Trouble:
    """Says once for each file what could not be read of it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, path: Path, what: str) -> None:
        """Warn of a file; the rest is still read."""
        self.said.append(f"{path}: {what}.")
        warnings.warn(self.said[-1], UserWarning, stacklevel=2)

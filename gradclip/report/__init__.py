"""Reads runs back: what their norms were, and what threshold to take."""

from __future__ import annotations

from .reading import read_runs
from .run import Run

__all__ = ["Run", "read_runs"]

"""The command line: ``gradclip demo`` and ``gradclip report``."""

from .main import main

__all__ = ["main"]

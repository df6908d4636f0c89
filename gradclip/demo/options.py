"""What a user of the demo can choose."""

from __future__ import annotations

import os
from dataclasses import dataclass

CELLS = ("rnn-tanh", "rnn-relu", "lstm", "gru")
"""Recurrent networks to choose from."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of ``gradclip demo``, which the command line has checked."""

    steps: int = 300
    """Steps of each run."""
    seed: int = 2
    max_norm: float = 1.0
    cell: str = "rnn-tanh"
    out: str = "demo"
    """Folder for everything that is written."""

    @property
    def picture(self) -> str:
        """Path of the picture."""
        return os.path.join(self.out, "demo.png")

    def logs(self, run: str) -> str:
        """Return the folder for the TensorBoard logs of a run."""
        return os.path.join(self.out, run)

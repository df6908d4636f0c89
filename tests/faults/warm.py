"""Imported by the process that others are forked from: whatever is made at first use is there."""

import tempfile
from pathlib import Path

import torch

from tests.faults.lives import FLUSH_EVERY, LoggedTraining, sinks

torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    life = LoggedTraining(*sinks(Path(folder)))
    for _ in range(3 * FLUSH_EVERY):
        life.step()
    life.save(Path(folder) / "state.pt")
    life.load(Path(folder) / "state.pt")
    life.clipper.close()
del life

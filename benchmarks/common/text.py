"""Real text, Python's help texts, split into a part to train on and one held out."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gradclip.cli.demo.task import read_text

HELD_OUT = 0.1
"""Share of the text, at its end, that is never trained on."""


@functools.cache
def split_text() -> tuple[Tensor, Tensor, int]:
    """Return the characters for training, those held out, and the size of the alphabet."""
    read = read_text()
    cut = round(len(read.characters) * (1 - HELD_OUT))
    return read.characters[:cut], read.characters[cut:], len(read.alphabet)


def pieces(characters: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return the pieces of a text at some starts, of shape (starts, length + 1)."""
    return characters[starts.unsqueeze(1) + torch.arange(length + 1)]


def spread_pieces(characters: Tensor, count: int, length: int) -> Tensor:
    """Return evenly spread pieces of a text, of shape (count, length + 1)."""
    starts = torch.linspace(0, len(characters) - length - 1, count).long()
    return pieces(characters, starts, length)

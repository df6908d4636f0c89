"""Real text to learn from, which every Python has: the topics of its ``help()``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH = 32
LENGTH = 100


@dataclass(frozen=True, slots=True)
class Text:
    """A text as numbers, one for each character."""

    characters: Tensor
    """Indices into the alphabet, int64, in the order of the text."""
    alphabet: str
    """The distinct characters."""


def read_text() -> Text:
    """Return the texts of ``help()``, about 465,000 characters; each Python has its own."""
    from pydoc_data.topics import topics

    text = "".join(topics.values())
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    return Text(torch.tensor([index[character] for character in text]), alphabet)


def batches(text: Text, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and the characters that follow them, both of shape (batch, length).

    The same seed yields the same batches; torch's own random numbers are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(LENGTH + 1)
    for _ in range(steps):
        starts = torch.randint(len(text.characters) - LENGTH, (BATCH, 1), generator=generator)
        sequences = text.characters[starts + offsets]
        yield sequences[:, :-1], sequences[:, 1:]

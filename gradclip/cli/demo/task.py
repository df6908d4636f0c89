"""The task of the demo: a recurrent network predicts the characters of Python's help texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BATCH = 32
LENGTH = 100


@dataclass(frozen=True, slots=True)
class Text:
    """A text as numbers, one per character."""

    characters: Tensor
    """Indices into the alphabet, int64, in the order of the text."""
    alphabet: str
    """The distinct characters of the text."""


def read_text() -> Text:
    """Return the texts of ``help()``, about 465,000 characters that differ between Pythons."""
    from pydoc_data.topics import topics

    text = "".join(topics.values())
    alphabet = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(alphabet)}
    return Text(torch.tensor([index[character] for character in text]), alphabet)


def batches(text: Text, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and the characters that follow them, both of shape (batch, length).

    The same seed yields the same batches. Torch's global random state is not used.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(LENGTH + 1)
    for _ in range(steps):
        starts = torch.randint(len(text.characters) - LENGTH, (BATCH, 1), generator=generator)
        sequences = text.characters[starts + offsets]
        yield sequences[:, :-1], sequences[:, 1:]


EMBEDDING = 8
HIDDEN = 128
GAIN = 1.2
"""Gain of the recurrent weights: above 1, gradients can grow with every step back in time."""

_CELLS: dict[str, Callable[[], nn.RNNBase]] = {
    "rnn-tanh": lambda: nn.RNN(EMBEDDING, HIDDEN, nonlinearity="tanh", batch_first=True),
    "rnn-relu": lambda: nn.RNN(EMBEDDING, HIDDEN, nonlinearity="relu", batch_first=True),
    "lstm": lambda: nn.LSTM(EMBEDDING, HIDDEN, batch_first=True),
    "gru": lambda: nn.GRU(EMBEDDING, HIDDEN, batch_first=True),
}


class CharacterModel(nn.Module):
    """Embedding, recurrent network, linear layer.

    The embedding is small: a wide one drives the tanh into saturation, where gradients hardly
    explode. One-hot input, the other usual choice, learns much more slowly here.

    Args:
        cell: Kind of recurrent network, one of `CELLS`.
        characters: Size of the alphabet.
    """

    def __init__(self, cell: str, characters: int) -> None:
        super().__init__()
        self.recurrent = _CELLS[cell]()
        # An LSTM has four recurrent matrices in one tensor, a GRU three.
        for matrix in self.recurrent.get_parameter("weight_hh_l0").detach().split(HIDDEN):
            nn.init.orthogonal_(matrix, GAIN)
        # Last: their sizes depend on the text, which differs between Pythons, and so do the random
        # numbers they draw. The recurrent weights stay the same everywhere.
        self.head = nn.Linear(HIDDEN, characters)
        self.embedding = nn.Embedding(characters, EMBEDDING)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the scores of the next characters, of shape (batch, length, alphabet)."""
        states, _ = self.recurrent(self.embedding(characters))
        scores: Tensor = self.head(states)
        return scores


def seeded_model(cell: str, characters: int, seed: int) -> CharacterModel:
    """Return a model with weights from a seed; torch's global random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return CharacterModel(cell, characters)

"""Three tasks that were written after the rule was frozen."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, RMSprop

from benchmarks.experiments.without_tuning.task import Training, seeded
from benchmarks.experiments.without_tuning.tasks.digits import digits

BATCH = 32


def deep(rate: float, steps: int, seed: int) -> Training:
    """Return the training of twelve narrow tanh layers without normalisation on digits, by SGD."""
    images, labels, held_images, held_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (steps, BATCH), generator=generator)

    def network() -> nn.Module:
        sizes = [64, *[48] * 12]
        layers: list[nn.Module] = [nn.Flatten()]
        for inner, outer in itertools.pairwise(sizes):
            layers += [nn.Linear(inner, outer), nn.Tanh()]
            nn.init.orthogonal_(layers[-2].get_parameter("weight"), 1.5)
        return nn.Sequential(*layers, nn.Linear(48, 10))

    model = seeded(network, seed)

    @torch.no_grad()
    def score() -> float:
        return F.cross_entropy(model(held_images), held_labels).item()

    def loss(step: int) -> Tensor:
        return F.cross_entropy(model(images[chosen[step]]), labels[chosen[step]])

    return Training(model, SGD(model.parameters(), lr=rate), loss, score)


@functools.cache
def chaos() -> Tensor:
    """Return 6,000 values of a Mackey-Glass series with noise, around 0.

    Mackey and Glass (1977), in steps of 1 with a delay of 17.
    """
    generator = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(6000, generator=generator)).tolist()
    values = [1.2] * 18
    for _ in range(6000):
        delayed = values[-18]
        values.append(0.9 * values[-1] + 0.2 * delayed / (1 + delayed**10))
    return torch.tensor(
        [value - 1 + added for value, added in zip(values[18:], noise, strict=True)]
    )


LENGTH = 40


class Forecaster(nn.Module):
    """An Elman network that predicts the next value of a series."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.RNN(1, 40, batch_first=True)
        nn.init.orthogonal_(self.recurrent.get_parameter("weight_hh_l0"), 1.3)
        self.head = nn.Linear(40, 1)

    def forward(self, values: Tensor) -> Tensor:
        """Return predictions, of the shape of the values, (batch, length)."""
        states, _ = self.recurrent(values.unsqueeze(2))
        predicted: Tensor = self.head(states).squeeze(2)
        return predicted


def series(rate: float, steps: int, seed: int) -> Training:
    """Return the training of a network that forecasts a chaotic series, by RMSprop."""
    values = chaos()
    learned, held_out = values[:5000], values[5000:].unfold(0, LENGTH + 1, 10)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(learned) - LENGTH, (steps, BATCH), generator=generator)
    model = seeded(Forecaster, seed)
    offsets = torch.arange(LENGTH + 1)

    def loss_of(pieces: Tensor) -> Tensor:
        return F.mse_loss(model(pieces[:, :-1]), pieces[:, 1:])

    @torch.no_grad()
    def score() -> float:
        return loss_of(held_out).item()

    optimizer = RMSprop(model.parameters(), lr=rate)
    return Training(
        model, optimizer, lambda step: loss_of(learned[starts[step].unsqueeze(1) + offsets]), score
    )


class Reader(nn.Module):
    """A GRU that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, 48, batch_first=True)
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of the digits, of shape (batch, 10)."""
        scores: Tensor = self.head(self.recurrent(images.squeeze(1))[0][:, -1])
        return scores


def rows(rate: float, steps: int, seed: int) -> Training:
    """Return the training of a GRU that reads digits row by row, by SGD with momentum."""
    images, labels, held_images, held_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (steps, BATCH), generator=generator)
    model = seeded(Reader, seed)

    @torch.no_grad()
    def score() -> float:
        return F.cross_entropy(model(held_images), held_labels).item()

    def loss(step: int) -> Tensor:
        return F.cross_entropy(model(images[chosen[step]]), labels[chosen[step]])

    return Training(model, SGD(model.parameters(), lr=rate, momentum=0.9), loss, score)

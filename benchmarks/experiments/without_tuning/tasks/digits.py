"""A convolutional network on the handwritten digits that scikit-learn ships."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from benchmarks.experiments.without_tuning.task import Training, seeded

BATCH = 32


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels for training, and those held out, each third image."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    held_out = torch.arange(len(labels)) % 3 == 0
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def network() -> nn.Module:
    """Return a network of two convolutions and two linear layers, without normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def training(rate: float, wrong: float, steps: int, seed: int) -> Training:
    """Return a training by SGD with momentum in which a share of the labels is wrong."""
    images, labels, held_images, held_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.rand(len(labels), generator=generator) < wrong
    labels = torch.where(noisy, torch.randint(10, labels.shape, generator=generator), labels)
    chosen = torch.randint(len(labels), (steps, BATCH), generator=generator)
    model = seeded(network, seed)

    @torch.no_grad()
    def score() -> float:
        return F.cross_entropy(model(held_images), held_labels).item()

    return Training(
        model,
        SGD(model.parameters(), lr=rate, momentum=0.9),
        lambda step: F.cross_entropy(model(images[chosen[step]]), labels[chosen[step]]),
        score,
    )

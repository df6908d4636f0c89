"""Four more tasks that were written after the second form of the rule was frozen."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adamax

from benchmarks.common.text import split_text
from benchmarks.experiments.without_tuning.task import Training, seeded
from benchmarks.experiments.without_tuning.tasks import characters
from benchmarks.experiments.without_tuning.tasks.digits import digits

VIEWED, HIDDEN_PIXELS, TEMPERATURE = 64, 0.4, 0.2
"""Images that are told apart at once, the share of pixels that a view lacks, and the divisor of the
cosines."""


class Encoder(nn.Module):
    """Two convolutions with normalisation, which give a direction for an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 32),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Return vectors of length 1, of shape (batch, 32)."""
        return F.normalize(self.layers(images))


def views(rate: float, steps: int, seed: int) -> Training:
    """Return contrastive learning on two views of each digit that lack other pixels, by SGD.

    The loss is InfoNCE, van den Oord et al. (2018), from the first view to the second and back.
    """
    images, _, held_images, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (steps, VIEWED), generator=generator)
    held_images = held_images[: len(held_images) // VIEWED * VIEWED]
    model = seeded(Encoder, seed)
    matching = torch.arange(VIEWED)

    def loss_of(whole: Tensor, generator: torch.Generator) -> Tensor:
        seen = torch.rand(2, *whole.shape, generator=generator) > HIDDEN_PIXELS
        first, second = model((whole * seen).flatten(0, 1)).chunk(2)
        cosines = first @ second.T / TEMPERATURE
        return (F.cross_entropy(cosines, matching) + F.cross_entropy(cosines.T, matching)) / 2

    @torch.no_grad()
    def score() -> float:
        judge = torch.Generator().manual_seed(seed)
        losses = [loss_of(whole, judge) for whole in held_images.split(VIEWED)]
        return torch.stack(losses).mean().item()

    def loss(step: int) -> Tensor:
        return loss_of(images[chosen[step]], generator)

    optimizer = SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    return Training(model, optimizer, loss, score)


class Gated(nn.Module):
    """A gated convolution over the present and a past character, added to its input."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.convolution = nn.Conv1d(width, 2 * width, 2, dilation=dilation)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs of the shape of the inputs, (batch, width, length)."""
        value, gate = self.convolution(F.pad(inputs, (self.dilation, 0))).chunk(2, 1)
        outputs: Tensor = inputs + self.mix(value.tanh() * gate.sigmoid())
        return outputs


class Dilated(nn.Module):
    """Causal convolutions that look ever further back, van den Oord et al. (2016)."""

    def __init__(self) -> None:
        super().__init__()
        alphabet = split_text()[2]
        self.embedding = nn.Embedding(alphabet, 32)
        self.layers = nn.Sequential(*(Gated(32, 2**depth) for depth in range(4)))
        self.head = nn.Conv1d(32, alphabet, 1)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the scores of the next characters, of shape (batch, length, alphabet)."""
        scores: Tensor = self.head(self.layers(self.embedding(characters).mT).relu()).mT
        return scores


def dilated(rate: float, steps: int, seed: int) -> Training:
    """Return the training of dilated convolutions on characters, by Adamax."""
    optimizer = functools.partial(Adamax, lr=rate)
    return characters.training(Dilated, optimizer, 16, 48, None, steps, seed)


STATES, PRODUCTS = 64, 64


class Multiplicative(nn.Module):
    """A recurrent network whose recurrent matrix depends on the character.

    Sutskever, Martens and Hinton, "Generating Text with Recurrent Neural Networks" (2011).
    """

    def __init__(self) -> None:
        super().__init__()
        alphabet = split_text()[2]
        self.bias = nn.Embedding(alphabet, STATES)
        self.factor = nn.Embedding(alphabet, PRODUCTS)
        self.inner = nn.Linear(STATES, PRODUCTS, bias=False)
        self.outer = nn.Linear(PRODUCTS, STATES, bias=False)
        self.head = nn.Linear(STATES, alphabet)
        nn.init.normal_(self.bias.weight, 0.0, 0.5)
        nn.init.normal_(self.factor.weight, 1.0, 0.3)
        nn.init.orthogonal_(self.inner.weight)
        nn.init.orthogonal_(self.outer.weight)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the scores of the next characters, of shape (batch, length, alphabet)."""
        state = torch.zeros(len(characters), STATES)
        states = []
        for bias, factor in zip(
            self.bias(characters).unbind(1), self.factor(characters).unbind(1), strict=True
        ):
            state = (self.outer(factor * self.inner(state)) + bias).tanh()
            states.append(state)
        scores: Tensor = self.head(torch.stack(states, 1))
        return scores


def multiplicative(rate: float, steps: int, seed: int) -> Training:
    """Return the training of a multiplicative network on characters, by SGD with momentum."""
    optimizer = functools.partial(SGD, lr=rate, momentum=0.9)
    return characters.training(Multiplicative, optimizer, 24, 40, None, steps, seed)


@functools.cache
def halves() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return upper halves of digits and the counts of lower ones, then those held out.

    A pixel of these images counts the black dots, 0 to 16, in a square of a finer image.
    """
    images, _, held_images, _ = digits()
    uppers, lowers = images.flatten(1).chunk(2, 1)
    held_uppers, held_lowers = held_images.flatten(1).chunk(2, 1)
    return uppers, 8 * (lowers + 1), held_uppers, 8 * (held_lowers + 1)


def counts(rate: float, steps: int, seed: int) -> Training:
    """Return Poisson regression of the lower halves of digits on the upper ones, by SGD.

    The network gives the logarithms of the expected counts. The score is the deviance of a pixel.
    """
    uppers, lowers, held_uppers, held_lowers = halves()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(uppers), (steps, 32), generator=generator)

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 32)
        )

    model = seeded(network, seed)

    @torch.no_grad()
    def score() -> float:
        logs = model(held_uppers)
        surplus = torch.xlogy(held_lowers, held_lowers) - held_lowers * logs
        deviances: Tensor = 2 * (surplus - held_lowers + logs.exp())
        return deviances.mean().item()

    def loss(step: int) -> Tensor:
        logs = model(uppers[chosen[step]])
        return F.poisson_nll_loss(logs, lowers[chosen[step]], reduction="none").sum(1).mean()

    return Training(model, SGD(model.parameters(), lr=rate), loss, score)

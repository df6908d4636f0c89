"""Five tasks that were written after the second form of the rule was frozen."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adagrad

from benchmarks.experiments.without_tuning.task import Training, seeded
from benchmarks.experiments.without_tuning.tasks.digits import digits
from gradclip.cli.demo.task import read_text

BATCH = 32


class Block(nn.Module):
    """A layer of relu and a linear one, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs of the shape of the inputs."""
        outputs: Tensor = inputs + self.outer(self.inner(inputs).relu())
        return outputs


DEPTH, WIDTH = 12, 64


@functools.cache
def friedman() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return standardised inputs and targets for training, and those held out, each third one.

    Friedman (1991), his first function of 5 of 10 inputs, with noise.
    """
    from sklearn.datasets import make_friedman1

    made = make_friedman1(3000, noise=2.0, random_state=0)
    inputs, targets = (torch.tensor(each, dtype=torch.float32) for each in made)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = ((targets - targets.mean()) / targets.std()).unsqueeze(1)
    held_out = torch.arange(len(targets)) % 3 == 0
    return inputs[~held_out], targets[~held_out], inputs[held_out], targets[held_out]


def residual(rate: float, steps: int, seed: int) -> Training:
    """Return the training of residual blocks without normalisation, by SGD with momentum."""
    inputs, targets, held_inputs, held_targets = friedman()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(targets), (steps, BATCH), generator=generator)

    def network() -> nn.Module:
        blocks = [Block(WIDTH) for _ in range(DEPTH)]
        return nn.Sequential(nn.Linear(10, WIDTH), *blocks, nn.Linear(WIDTH, 1))

    model = seeded(network, seed)

    @torch.no_grad()
    def score() -> float:
        return F.mse_loss(model(held_inputs), held_targets).item()

    def loss(step: int) -> Tensor:
        return F.mse_loss(model(inputs[chosen[step]]), targets[chosen[step]])

    return Training(model, SGD(model.parameters(), lr=rate, momentum=0.9), loss, score)


ROWS, COLUMNS, RANK, RATED = 100, 60, 5, 512
FREEDOM = 1.5
"""Degrees of freedom of Student's t-distribution, which then has no variance."""
REST = 0.3
"""Standard deviation of what no product of thin matrices can explain: without it the score falls
to almost 0, where a ratio of two scores says little."""


class Factors(nn.Module):
    """Two thin matrices whose product is to be the table."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Parameter(0.5 * torch.randn(ROWS, RANK))
        self.right = nn.Parameter(0.5 * torch.randn(COLUMNS, RANK))

    def forward(self, places: Tensor) -> Tensor:
        """Return the entries at places, which number the table row by row."""
        return (self.left[places // COLUMNS] * self.right[places % COLUMNS]).sum(1)


def factors(rate: float, steps: int, seed: int) -> Training:
    """Return the factorisation of a table, each look at which has new noise, by SGD.

    A third of the entries is never looked at: the score is their squared error.
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, RANK, generator=generator) for size in (ROWS, COLUMNS))
    table = (left @ right.T).flatten()
    table = table / table.std() + REST * torch.randn(len(table), generator=generator)
    order = torch.randperm(len(table), generator=generator)
    held_out, known = order.tensor_split([len(order) // 3])
    chosen = known[torch.randint(len(known), (steps, RATED), generator=generator)]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        noise = 0.5 * torch.distributions.StudentT(FREEDOM).sample((steps, RATED))
    model = seeded(Factors, seed)

    @torch.no_grad()
    def score() -> float:
        return F.mse_loss(model(held_out), table[held_out]).item()

    def loss(step: int) -> Tensor:
        return F.mse_loss(model(chosen[step]), table[chosen[step]] + noise[step])

    return Training(model, SGD(model.parameters(), lr=rate), loss, score)


CODE = 8


class Autoencoder(nn.Module):
    """A variational autoencoder of black and white images, Kingma and Welling (2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 2 * CODE))
        self.decoder = nn.Sequential(nn.Linear(CODE, 96), nn.SiLU(), nn.Linear(96, 64))

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return the mean bound on the code length of an image, in nats.

        Args:
            images: Zeros and ones, of shape (batch, 64).
            noise: Standard normal, of shape (batch, CODE).
        """
        mean, spread = self.encoder(images).chunk(2, 1)
        scores = self.decoder(mean + noise * (spread / 2).exp())
        pixels = F.binary_cross_entropy_with_logits(scores, images, reduction="sum")
        divergence = (mean.square() + spread.exp() - 1 - spread).sum() / 2
        bound: Tensor = (pixels + divergence) / len(images)
        return bound


def autoencoder(rate: float, steps: int, seed: int) -> Training:
    """Return the training of a variational autoencoder of digits, by SGD with momentum."""
    images, _, held_images, _ = digits()
    learned, held_out = ((each > 0).float().flatten(1) for each in (images, held_images))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(learned), (steps, BATCH), generator=generator)
    noise = torch.randn(steps, BATCH, CODE, generator=generator)
    held_noise = torch.randn(len(held_out), CODE, generator=generator)
    model = seeded(Autoencoder, seed)

    @torch.no_grad()
    def score() -> float:
        bound: Tensor = model(held_out, held_noise)
        return bound.item()

    def loss(step: int) -> Tensor:
        bound: Tensor = model(learned[chosen[step]], noise[step])
        return bound

    return Training(model, SGD(model.parameters(), lr=rate, momentum=0.9), loss, score)


SPAN, EVALUATED = 40, 400


@functools.cache
def joined() -> tuple[Tensor, Tensor]:
    """Return the visible characters of Python's help texts, and whether space follows each."""
    text = read_text()
    gaps = torch.tensor([character.isspace() for character in text.alphabet])[text.characters]
    visible = (~gaps).nonzero().squeeze(1)[:-1]
    return text.characters[visible], gaps[visible + 1].float()


class Splitter(nn.Module):
    """A GRU in both directions that finds the ends of words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(read_text().alphabet), 12)
        self.recurrent = nn.GRU(12, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 1)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the logit of an end at each character, of shape (batch, length)."""
        logits: Tensor = self.head(self.recurrent(self.embedding(characters))[0]).squeeze(2)
        return logits


def words(rate: float, steps: int, seed: int) -> Training:
    """Return the training of a network that splits text without spaces into words, by Adagrad."""
    characters, ends = joined()
    cut = len(characters) * 9 // 10
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(cut - SPAN, (steps, BATCH), generator=generator)
    held_starts = torch.linspace(cut, len(characters) - SPAN, EVALUATED).long()
    model = seeded(Splitter, seed)

    def loss_of(starts: Tensor) -> Tensor:
        places = starts.unsqueeze(1) + torch.arange(SPAN)
        return F.binary_cross_entropy_with_logits(model(characters[places]), ends[places])

    @torch.no_grad()
    def score() -> float:
        return loss_of(held_starts).item()

    optimizer = Adagrad(model.parameters(), lr=rate)
    return Training(model, optimizer, lambda step: loss_of(starts[step]), score)


ITEMS, SYMBOLS, WRONG = 12, 8, 0.1
"""Sizes of a set of numbered symbols, and the share of random labels."""


def numbered(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sets, of shape (count, ITEMS, SYMBOLS + 1), and the symbol of the largest number."""
    numbers = torch.randn(count, ITEMS, generator=generator)
    symbols = torch.randint(SYMBOLS, (count, ITEMS), generator=generator)
    largest = symbols.gather(1, numbers.argmax(1, keepdim=True)).squeeze(1)
    wrong = torch.rand(count, generator=generator) < WRONG
    labels = torch.where(wrong, torch.randint(SYMBOLS, (count,), generator=generator), largest)
    return torch.cat((F.one_hot(symbols, SYMBOLS).float(), numbers.unsqueeze(2)), 2), labels


class Chooser(nn.Module):
    """Two layers of a transformer over a set, whose mean gives the symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(SYMBOLS + 1, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(32, SYMBOLS)

    def forward(self, sets: Tensor) -> Tensor:
        """Return the scores of the symbols, of shape (batch, SYMBOLS)."""
        states = self.embedding(sets)
        for layer in self.layers:
            states = layer(states)
        scores: Tensor = self.head(states.mean(1))
        return scores


def largest(rate: float, steps: int, seed: int) -> Training:
    """Return the training of a transformer that finds the largest of a set, by Nesterov's SGD."""
    generator = torch.Generator().manual_seed(seed)
    sets, labels = numbered(steps * BATCH, generator)
    held_sets, held_labels = numbered(10_000, generator)
    model = seeded(Chooser, seed)

    @torch.no_grad()
    def score() -> float:
        return F.cross_entropy(model(held_sets), held_labels).item()

    def loss(step: int) -> Tensor:
        batch = slice(step * BATCH, (step + 1) * BATCH)
        return F.cross_entropy(model(sets[batch]), labels[batch])

    optimizer = SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
    return Training(model, optimizer, loss, score)

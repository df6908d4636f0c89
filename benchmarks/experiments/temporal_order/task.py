"""The temporal order problem: its sequences, and recurrent networks trained side by side.

Of six symbols the first two, A and B, are relevant. A sequence of length L has one of them at a
random position in [L/10, 2L/10) and one in [5L/10, 6L/10); all other positions have one of the
other four symbols at random. After the last symbol the network classifies the sequence as AA, AB,
BA or BB. Section 4 of Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
networks" (2013), https://arxiv.org/abs/1211.5063, after Hochreiter and Schmidhuber (1997).

The initial weights are what the paper calls basic tanh: normal with a standard deviation of 0.1,
biases 0, as in the authors' program (https://github.com/pascanur/trainingRNNs). The spectral radius
of the recurrent weights is then about 0.7: gradients vanish at first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SYMBOLS, RELEVANT, CLASSES, UNITS, SPREAD = 6, 2, 4, 50, 0.1
PURPOSES = ("weights", "training", "checks", "final test")


def generator_for(purpose: str, length: int, seed: int) -> torch.Generator:
    """Return the generator of one seed for one purpose; all streams differ."""
    stream = PURPOSES.index(purpose) * 1000 + length
    return torch.Generator().manual_seed(stream * 10_000 + seed)


def generators_for(purpose: str, length: int, seeds: int) -> list[torch.Generator]:
    """Return the generators of the seeds 0, 1, ..."""
    return [generator_for(purpose, length, seed) for seed in range(seeds)]


def sequences(length: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences and their classes.

    Returns:
        Symbols of shape (length, count), uint8, where A and B are 0 and 1; and classes of shape
        (count,), int64, where AA, AB, BA and BB are 0 to 3.
    """
    shape = (length, count)
    symbols = torch.randint(RELEVANT, SYMBOLS, shape, dtype=torch.uint8, generator=generator)
    classes = torch.zeros(count, dtype=torch.int64)
    for tenth in (1, 5):
        low, high = tenth * length // 10, (tenth + 1) * length // 10
        positions = torch.randint(low, high, (count,), generator=generator)
        shown = torch.randint(RELEVANT, (count,), generator=generator)
        symbols[positions, torch.arange(count)] = shown.to(torch.uint8)
        classes = classes * RELEVANT + shown
    return symbols, classes


def sequences_of_all(
    length: int, count: int, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Draw sequences for each seed from its own generator.

    Returns:
        Symbols of shape (length, seeds, count) and classes of shape (seeds, count).
    """
    symbols, classes = zip(*(sequences(length, count, g) for g in generators), strict=True)
    return torch.stack(symbols, dim=1), torch.stack(classes)


class Networks(nn.Module):
    """One tanh network for each seed: index i of dimension 0 of all parameters is the i-th.

    Args:
        seeds: Number of seeds.
        length: Length of the sequences; another length has other initial weights.
    """

    def __init__(self, seeds: int, length: int) -> None:
        super().__init__()
        generators = generators_for("weights", length, seeds)

        def normal(*shape: int) -> nn.Parameter:
            drawn = [torch.randn(shape, generator=generator) for generator in generators]
            return nn.Parameter(SPREAD * torch.stack(drawn))

        self.recurrent = normal(UNITS, UNITS)
        self.input = normal(SYMBOLS, UNITS)
        self.bias = nn.Parameter(torch.zeros(seeds, 1, UNITS))
        self.output = normal(UNITS, CLASSES)
        self.output_bias = nn.Parameter(torch.zeros(seeds, 1, CLASSES))

    def forward(self, symbols: Tensor) -> Tensor:
        """Return logits of shape (seeds, count, classes) for symbols (length, seeds, count)."""
        table = self.input + self.bias
        state: Tensor = LastState.apply(table, self.recurrent, symbols)  # type: ignore[no-untyped-call]
        return torch.baddbmm(self.output_bias, state, self.output)

    def loss(self, symbols: Tensor, classes: Tensor) -> Tensor:
        """Return the sum of the seeds' mean losses, whose gradients are independent."""
        logits = self(symbols)
        total = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="sum")
        return total / classes.shape[1]

    @torch.no_grad()
    def errors(self, symbols: Tensor, classes: Tensor, seed: int | None = None) -> Tensor:
        """Return the number of wrong answers of each seed; an answer that is not finite is wrong.

        Args:
            symbols: Shape (length, seeds, count).
            classes: Shape (seeds, count).
            seed: The only seed to test, which makes ``seeds`` 1; None for all.
        """
        chosen = slice(None) if seed is None else slice(seed, seed + 1)
        table = self.input[chosen] + self.bias[chosen]
        for last in states(table, self.recurrent[chosen], symbols):
            state = last
        logits = torch.baddbmm(self.output_bias[chosen], state, self.output[chosen])
        right = (logits.argmax(-1) == classes) & logits.isfinite().all(-1)
        return classes.shape[1] - right.sum(1)

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Return for each seed whether all of its parameters are finite."""
        return torch.stack([p.isfinite().flatten(1).all(1) for p in self.parameters()]).all(0)


def rows_of(symbols: Tensor) -> Tensor:
    """Return the rows of symbols of shape (..., seeds, count) in a table of all seeds."""
    return symbols.long() + SYMBOLS * torch.arange(symbols.shape[-2]).unsqueeze(1)


def states(table: Tensor, recurrent: Tensor, symbols: Tensor) -> Iterator[Tensor]:
    """Yield the state after each symbol, of shape (seeds, count, units).

    Args:
        table: Input of each symbol, of shape (seeds, symbols, units).
        recurrent: Shape (seeds, units, units).
        symbols: Shape (length, seeds, count).
    """
    rows, shape = rows_of(symbols), (*symbols.shape[1:], table.shape[2])
    state = None
    for now in rows:
        entering = table.flatten(0, 1).index_select(0, now.flatten()).view(shape)
        state = (entering if state is None else entering.baddbmm_(state, recurrent)).tanh_()
        yield state


class LastState(torch.autograd.Function):
    """The last of `states`, with a backward pass that accumulates weight gradients in place.

    Autograd takes several times as long: it makes one gradient of the weights per symbol.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, recurrent: Tensor, symbols: Tensor) -> Tensor:
        """See `states`."""
        all_states = [*states(table, recurrent, symbols)]
        ctx.save_for_backward(recurrent, rows_of(symbols), *all_states)
        return all_states[-1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of ``table`` and ``recurrent``."""
        recurrent, rows, *all_states = ctx.saved_tensors
        (gradient,) = gradients
        seeds, units = recurrent.shape[:2]
        of_table = recurrent.new_zeros(seeds * SYMBOLS, units)
        of_recurrent, transposed = torch.zeros_like(recurrent), recurrent.mT.contiguous()
        for time in reversed(range(len(all_states))):
            inner = torch.ops.aten.tanh_backward(gradient, all_states[time])
            of_table.index_add_(0, rows[time].flatten(), inner.flatten(0, 1))
            if time:
                of_recurrent.baddbmm_(all_states[time - 1].mT, inner)
                gradient = torch.bmm(inner, transposed)
        return of_table.view(seeds, SYMBOLS, units), of_recurrent, None

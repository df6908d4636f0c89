"""Training in miniature, and TensorBoard's own reader."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curves = dict[str, list[Any]]


class Training:
    """An optimizer whose gradients have the norms they are told to have."""

    def __init__(self) -> None:
        self._parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self._parameter], lr=0.0)

    def take(self, *norms: float) -> None:
        """Take one step with each norm."""
        for norm in norms:
            self._parameter.grad = torch.tensor([0.0, norm], dtype=torch.float64)
            self.optimizer.step()


@pytest.fixture
def training() -> type[Training]:
    return Training


@pytest.fixture
def read() -> Callable[[str | os.PathLike[str]], Curves]:
    """Read every point of every scalar in a directory, as TensorBoard does."""

    def read_all(directory: str | os.PathLike[str]) -> Curves:
        reader = EventAccumulator(os.fspath(directory), size_guidance={"scalars": 0}).Reload()
        return {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"]}

    return read_all


@pytest.fixture
def read_steps(read: Callable[[str], Curves]) -> Callable[[str], dict[str, list[int]]]:
    def read_all(directory: str) -> dict[str, list[int]]:
        return {tag: [p.step for p in points] for tag, points in read(directory).items()}

    return read_all

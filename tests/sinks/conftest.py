"""Training in miniature, and TensorBoard's own reader."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curves = dict[str, list[Any]]


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

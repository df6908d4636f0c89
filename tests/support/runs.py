"""Runs made of given norms, as ``gradclip report`` reads them from logs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradclip.report import Run
from gradclip.report.run import LoggedParameterNorms


def run_with(
    norms: ArrayLike,
    *,
    steps: ArrayLike | None = None,
    threshold: float = math.nan,
    losses: NDArray[np.float64] | None = None,
    parameters: LoggedParameterNorms | None = None,
    name: str = "run",
) -> Run:
    """Return a run; it skipped the steps whose norm is not finite."""
    norms = np.asarray(norms, dtype=np.float64)
    thresholds = np.full(len(norms), threshold)
    steps = np.arange(len(norms)) if steps is None else np.asarray(steps)
    clipped = np.fmin(norms, thresholds)
    skipped = ~np.isfinite(norms)
    return Run(name, steps, norms, clipped, thresholds, skipped, parameters, losses)


def norms_by_name(entries: Sequence[tuple[int, str, float]]) -> LoggedParameterNorms:
    """Return norms of parameters from steps, names and numbers."""
    names = [*dict.fromkeys(name for _, name, _ in entries)]
    steps, named, norms = zip(*entries, strict=True)
    indices = np.array([names.index(name) for name in named], np.int32)
    return LoggedParameterNorms(tuple(names), np.array(steps), indices, np.array(norms))


def quiet(count: int) -> NDArray[np.float64]:
    """Return norms about 1 without a spike."""
    return 1 + 0.05 * np.random.default_rng(0).standard_normal(count)

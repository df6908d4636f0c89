from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradclip.errors import ArgumentError
from gradclip.thresholds import Percentile


def oracle(percentile, window):
    """AutoClip: the percentile of the last norms, the current one included."""

    def limits(norms):
        past, expected = [], []
        for norm in norms:
            usable = norm is not None and math.isfinite(norm)
            past += [norm] if usable else []
            seen = past[-window:] if usable else past[-(window - 1) :]
            expected.append(float(np.percentile(seen, percentile)) if seen else math.inf)
        return expected

    return limits


@pytest.mark.parametrize(
    ("percentile", "window"), [(0, 3), (5, 100), (10.0, 7), (50, 2), (73.21, 5), (100, 4)]
)
def test_it_is_the_percentile_of_the_last_norms(percentile, window, agrees_per_label):
    agrees_per_label(lambda: Percentile(percentile, window), oracle(percentile, window))


def test_the_tenth_percentile_clips_nine_of_ten_stationary_norms(driver):
    norms = torch.rand(2000).exp().tolist()
    limits = driver(Percentile(10)).run([[norm] for norm in norms])
    clipped = [norm > limit for norm, [limit] in zip(norms, limits, strict=True)]
    assert 0.88 < sum(clipped[1000:]) / 1000 < 0.92


def test_labels_of_many_blocks_are_the_same_as_of_one(driver, monkeypatch):
    steps = torch.rand(30, 5, dtype=torch.float64).tolist()
    whole = driver(Percentile(30, window=9), 5).run(steps)
    monkeypatch.setattr("gradclip.thresholds.window._BLOCK", 2 * 8)
    assert driver(Percentile(30, window=9), 5).run(steps) == whole


def test_a_loaded_state_continues_with_the_same_order(driver):
    steps = [[norm] for norm in torch.rand(50, dtype=torch.float64).tolist()]
    first, second = driver(Percentile(20, window=12)), driver(Percentile(20, window=12))
    first.run(steps[:30])
    second.run(steps[10:17])  # whose order has to go
    second.rule.load_state_dict(first.rule.state_dict())
    assert second.run(steps[30:]) == first.run(steps[30:])


@pytest.mark.parametrize("percentile", [-1, 100.5, math.nan, math.inf, True, "10", None])
def test_a_percentile_outside_its_range_is_refused(percentile):
    with pytest.raises(ArgumentError, match="percentile is .*: give a number from 0 to 100"):
        Percentile(percentile)


@pytest.mark.parametrize("window", [1, 0, -3, 10.0, True])
def test_a_window_without_a_past_norm_is_refused(window):
    with pytest.raises(ArgumentError, match="window is .*: give a whole number >= 2"):
        Percentile(window=window)

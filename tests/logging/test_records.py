"""The record of a step as a user reads it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradclip import ClipRecord
from gradclip.records.counting import Counters
from gradclip.records.record import clipped_norms


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def record(norms: Tensor, thresholds: Tensor, coefficients: Tensor) -> ClipRecord:
    return ClipRecord(3, 1e9, norms, thresholds, coefficients)


def test_one_norm_reads_as_scalars() -> None:
    one = record(vector(4.0), vector(1.0), vector(0.25))
    read = (one.norm, one.clipped_norm, one.threshold, one.coefficient, one.nonfinite)
    assert [value.shape for value in read] == [()] * 5
    assert [value.item() for value in read] == [4.0, 1.0, 1.0, 0.25, False]
    assert (one.step, one.wall_time, one.skipped) == (3, 1e9, False)


def test_several_norms_read_as_vectors_in_the_order_of_the_labels() -> None:
    three = record(vector(4.0, 0.5, math.inf), vector(1.0, 2.0, 3.0), vector(0.25, 1.0, 0.0))
    assert three.norm.tolist() == [4.0, 0.5, math.inf]
    assert three.clipped_norm.tolist() == [1.0, 0.5, 0.0]
    assert three.threshold.tolist() == [1.0, 2.0, 3.0]
    assert three.coefficient.tolist() == [0.25, 1.0, 0.0]
    assert three.nonfinite.tolist() == [False, False, True]
    assert three.nonfinite.dtype == torch.bool


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_an_erased_norm_is_0_and_a_kept_one_stays_what_it_is(norm: float) -> None:
    assert clipped_norms(vector(norm), vector(0.0)).item() == 0.0
    assert not math.isfinite(clipped_norms(vector(norm), vector(1.0)).item())
    assert record(vector(norm), vector(1.0), vector(0.0)).nonfinite.item() is True


def test_the_repr_names_what_a_user_reads() -> None:
    text = repr(record(vector(4.0), vector(1.0), vector(0.25)))
    assert text == (
        "ClipRecord(step=3, norm=tensor(4., dtype=torch.float64), "
        "clipped_norm=tensor(1., dtype=torch.float64), "
        "threshold=tensor(1., dtype=torch.float64), "
        "coefficient=tensor(0.2500, dtype=torch.float64), nonfinite=tensor(False))"
    )


def test_records_compare_by_identity_and_cannot_be_changed() -> None:
    one, other = (record(vector(1, 2), vector(1, 1), vector(1, 1)) for _ in range(2))
    assert one == one
    assert one != other
    with pytest.raises(AttributeError):
        one.step = 4  # type: ignore[misc]


def test_the_clip_rate_is_of_finite_norms_and_0_before_the_first() -> None:
    assert Counters().clip_rate == 0.0
    assert Counters(nonfinite_steps=5).clip_rate == 0.0
    assert Counters(clipped=1, finite=4, nonfinite_steps=5).clip_rate == 0.25

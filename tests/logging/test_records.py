"""The record of a step as a user reads it."""

import math

import pytest
import torch

from gradclip import ClipRecord

INF, NAN = math.inf, math.nan


def record_of(norms, thresholds, coefficients):
    vectors = (norms, thresholds, coefficients)
    return ClipRecord(3, 1e9, *(torch.tensor(vector, dtype=torch.float64) for vector in vectors))


def test_one_norm_reads_as_scalars():
    one = record_of([4.0], [1.0], [0.25])
    read = (one.norm, one.clipped_norm, one.threshold, one.coefficient, one.nonfinite)
    assert [value.shape for value in read] == [()] * 5
    assert [value.item() for value in read] == [4.0, 1.0, 1.0, 0.25, False]
    assert (one.step, one.wall_time, one.skipped) == (3, 1e9, False)


def test_several_norms_read_as_vectors():
    three = record_of([4.0, 0.5, INF], [1.0, 2.0, 3.0], [0.25, 1.0, 0.0])
    assert three.norm.tolist() == [4.0, 0.5, INF]
    assert three.clipped_norm.tolist() == [1.0, 0.5, 0.0]
    assert three.threshold.tolist() == [1.0, 2.0, 3.0]
    assert three.coefficient.tolist() == [0.25, 1.0, 0.0]
    assert three.nonfinite.tolist() == [False, False, True]
    assert three.nonfinite.dtype == torch.bool


@pytest.mark.parametrize("norm", [NAN, INF])
def test_norm_of_gradients_set_to_0_is_0(norm):
    """If they were left, it stays NaN or infinite."""
    assert record_of([norm], [1.0], [0.0]).clipped_norm.item() == 0.0
    left = record_of([norm], [1.0], [1.0])
    assert not left.clipped_norm.isfinite()
    assert left.nonfinite.item() is True


def test_repr_names_the_values_a_user_reads():
    numbers = {"norm": "4.", "clipped_norm": "1.", "threshold": "1.", "coefficient": "0.2500"}
    shown = [f"{name}=tensor({number}, dtype=torch.float64)" for name, number in numbers.items()]
    needed = f"ClipRecord({', '.join(['step=3', *shown, 'nonfinite=tensor(False)'])})"
    assert repr(record_of([4.0], [1.0], [0.25])) == needed


def test_records_compare_by_identity_and_cannot_be_changed():
    one, other = record_of([1.0, 2.0], [1.0, 1.0], [1.0, 1.0]), record_of([1.0], [1.0], [1.0])
    assert one == one
    assert one != other
    with pytest.raises(AttributeError):
        one.step = 4

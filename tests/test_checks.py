from __future__ import annotations

import math

import numpy
import pytest
import torch

from gradclip.checks import checked_bound, checked_count, checked_order
from gradclip.errors import ArgumentError


@pytest.mark.parametrize("value", [0, 1, 2.5, numpy.float32(0.5), numpy.float64(3)])
def test_numbers_that_bound_a_magnitude_become_floats(value):
    bound = checked_bound("max_norm", value)
    assert type(bound) is float
    assert bound == value


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, -math.inf])
def test_a_bound_out_of_range_names_what_was_found_and_needed(value):
    with pytest.raises(ArgumentError, match=rf"max_norm is {value!r}: give a finite number >= 0"):
        checked_bound("max_norm", value)


@pytest.mark.parametrize(
    "value", [True, "1.0", None, [1.0], 1j, torch.tensor(1.0), torch.ones(2), torch.float32]
)
def test_a_bound_that_is_no_number_names_its_type(value):
    with pytest.raises(ArgumentError, match=f"of type {type(value).__name__}: give a number >= 0"):
        checked_bound("max_norm", value)


def test_only_where_it_is_allowed_a_bound_may_be_infinite():
    assert checked_bound("max_norm", math.inf, infinite=True) == math.inf
    with pytest.raises(ArgumentError, match="give a finite number >= 0\\."):
        checked_bound("max_norm", math.nan, infinite=True)


@pytest.mark.parametrize("value", [0.5, 1, 2, 3.0, math.inf])
def test_orders_become_floats(value):
    assert checked_order(value) == value
    assert type(checked_order(value)) is float


def test_the_infinity_norm_may_be_spelt_out():
    assert checked_order("inf") == math.inf


@pytest.mark.parametrize("value", [0, -1, -2.0, math.nan, -math.inf, True, "two", None])
def test_a_bad_order_is_refused(value):
    with pytest.raises(ArgumentError, match="norm_type is .*: give a number > 0"):
        checked_order(value)


@pytest.mark.parametrize("value", [-1, 1.0, True, "3", None])
def test_a_count_is_a_whole_number(value):
    with pytest.raises(ArgumentError, match="steps is .*: give a whole number >= 0"):
        checked_count("steps", value)


@pytest.mark.parametrize("value", [2**62, 10**30])
def test_a_count_can_be_gone_on_from(value):
    assert checked_count("steps", 2**62 - 1) == 2**62 - 1
    with pytest.raises(ArgumentError, match=rf"steps is {value}: give .* and < 2\*\*62"):
        checked_count("steps", value)


def test_a_count_has_a_least_value():
    assert checked_count("every", 1, 1) == 1
    with pytest.raises(ArgumentError, match="every is 0: give a whole number >= 1"):
        checked_count("every", 0, 1)

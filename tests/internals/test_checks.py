"""Checks of numbers, and the tree of errors."""

from __future__ import annotations

import inspect
import math
from functools import partial

import numpy
import pytest
import torch

from gradclip import errors
from gradclip.checks import checked_bound, checked_count, checked_order

bound, steps = partial(checked_bound, "max_norm"), partial(checked_count, "steps")
NOT_REAL = "max_norm is {!r} of type {}: give a number >= 0 (of a tensor its float())."


@pytest.mark.parametrize("value", [0, 1, 2.5, numpy.float32(0.5), numpy.float64(3)])
def test_numbers_that_bound_a_magnitude_become_floats(value):
    """Infinity only where it is allowed."""
    assert type(bound(value)) is float
    assert bound(value) == value
    assert bound(math.inf, infinite=True) == math.inf
    assert math.copysign(1, bound(-0.0)) == 1


@pytest.mark.parametrize("value", [0.5, 1, 2, 3.0, math.inf, "inf"])
def test_orders_become_floats(value):
    """The infinity norm may be spelt out."""
    assert type(checked_order(value)) is float
    assert checked_order(value) == float(value)


def test_counts_stay_as_they_are():
    """From the least to what int64 can go on from."""
    assert (steps(0), steps(2**62 - 1), checked_count("every", 1, 1)) == (0, 2**62 - 1, 1)


@pytest.mark.parametrize(
    ("check", "values", "message"),
    [
        (
            bound,
            [-1, -0.5, math.nan, math.inf, -math.inf],
            "max_norm is {!r}: give a finite number >= 0, or None to measure without clipping.",
        ),
        (bound, [True, "1.0", None, [1.0], 1j, torch.tensor(1.0), torch.float32], NOT_REAL),
        (partial(bound, infinite=True), [math.nan], "max_norm is {!r}: give a finite number >= 0."),
        (
            checked_order,
            [0, -1, -2.0, math.nan, -math.inf],
            "norm_type is {!r}: give a number > 0, or inf for the largest element.",
        ),
        (
            checked_order,
            [True, "two", None],
            "norm_type is {!r} of type {}: give a number > 0 or inf (of a tensor its float()).",
        ),
        (
            steps,
            [-1, 1.0, True, "3", None, 2**62, 10**30],
            "steps is {!r}: give a whole number >= 0 and < 2**62.",
        ),
        (
            partial(checked_count, "every", least=1),
            [0],
            "every is {!r}: give a whole number >= 1 and < 2**62.",
        ),
    ],
)
def test_other_values_are_refused(check, values, message):
    """With what was found, its type where that is wrong, and what is needed."""
    for value in values:
        with pytest.raises(errors.ArgumentError) as refused:
            check(value)
        assert str(refused.value) == message.format(value, type(value).__name__)


def test_each_error_can_be_caught_as_its_builtin_kind():
    """The docstring of the module shows the whole tree."""
    kinds = {
        "ArgumentError": ValueError,
        "AttachError": RuntimeError,
        "GradientError": TypeError,
        "EngineUnavailableError": RuntimeError,
        "StateError": ValueError,
        "NonFiniteGradientError": RuntimeError,
        "SkipLimitError": RuntimeError,
    }
    classes = dict(inspect.getmembers(errors, inspect.isclass))
    assert classes.keys() == {*kinds, "GradClipError"}
    for name, builtin in kinds.items():
        assert issubclass(classes[name], errors.GradClipError)
        assert issubclass(classes[name], builtin)
        assert f"── {name} " in errors.__doc__
        assert f"also {builtin.__name__}: " in errors.__doc__

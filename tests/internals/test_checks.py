"""Checks of numbers, and the tree of errors."""

import builtins
import inspect
import math
import re
from functools import partial

import numpy
import pytest
import torch

from gradclip import errors
from gradclip.checks import checked_bound, checked_count, checked_order

bound, steps = partial(checked_bound, "max_norm"), partial(checked_count, "steps")
NOT_FINITE = "max_norm is {!r}: give a finite number >= 0"
NOT_REAL = " is {!r} of type {}: give a number "
NOT_WHOLE = " is {!r}: give a whole number >= "
FLOAT, LARGEST = " (of a tensor its float()).", " and < 2**62."


def test_valid_values_become_floats_and_counts_stay():
    """-0.0 has no sign afterwards, and the infinity norm may be spelt out."""
    for value in (0, 1, 2.5, numpy.float32(0.5), numpy.float64(3)):
        assert (type(bound(value)), bound(value)) == (float, value)
    assert (bound(math.inf, infinite=True), math.copysign(1, bound(-0.0))) == (math.inf, 1)
    for order in (0.5, 1, 2, 3.0, math.inf, "inf"):
        assert (type(checked_order(order)), checked_order(order)) == (float, float(order))
    assert (steps(0), steps(2**62 - 1), checked_count("every", 1, 1)) == (0, 2**62 - 1, 1)


@pytest.mark.parametrize(
    ("check", "values", "message"),
    [
        (bound, [-1, math.nan, math.inf], f"{NOT_FINITE}, or None to measure without clipping."),
        (bound, [True, "1.0", None, 1j, torch.tensor(1.0)], f"max_norm{NOT_REAL}>= 0{FLOAT}"),
        (partial(bound, infinite=True), [math.nan], f"{NOT_FINITE}."),
        (
            checked_order,
            [0, -1, -2.0, math.nan, -math.inf],
            "norm_type is {!r}: give a number > 0, or inf for the largest element.",
        ),
        (checked_order, [True, "two", None], f"norm_type{NOT_REAL}> 0 or inf{FLOAT}"),
        (steps, [-1, 1.0, True, "3", None, 2**62, 10**30], f"steps{NOT_WHOLE}0{LARGEST}"),
        (partial(checked_count, "every", least=1), [0], f"every{NOT_WHOLE}1{LARGEST}"),
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
    kinds = dict(re.findall(r"── (\w+) +also (\w+): ", errors.__doc__))
    classes = dict(inspect.getmembers(errors, inspect.isclass))
    assert classes.keys() == {*kinds, "GradClipError"}
    for name, builtin in kinds.items():
        assert classes[name].__bases__ == (errors.GradClipError, getattr(builtins, builtin))

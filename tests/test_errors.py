from __future__ import annotations

import inspect

import pytest

from gradclip import errors

KINDS = {
    "ArgumentError": ValueError,
    "AttachError": RuntimeError,
    "GradientError": TypeError,
    "EngineUnavailableError": RuntimeError,
    "StateError": ValueError,
    "NonFiniteGradientError": RuntimeError,
    "SkipLimitError": RuntimeError,
}


@pytest.mark.parametrize(("name", "builtin"), KINDS.items())
def test_each_error_can_be_caught_as_its_builtin_kind(name, builtin):
    error = getattr(errors, name)
    assert issubclass(error, errors.GradClipError)
    assert issubclass(error, builtin)


def test_the_tree_in_the_docstring_is_complete():
    classes = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert classes == {*KINDS, "GradClipError"}
    for name in classes:
        assert name in errors.__doc__

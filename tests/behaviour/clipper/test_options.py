"""Options of a clipper: what is refused, and what a refused clipper leaves."""

import math

import pytest
import torch
from torch import nn

from gradclip import (
    ArgumentError,
    EngineUnavailableError,
    GradientClipper,
    GradientError,
)
from tests.support.clippers import sgd, weights_of
from tests.support.reference import gradient_norm


@pytest.mark.parametrize(
    ("option", "message"),
    [
        *(
            ({"max_norm": value}, "max_norm is ")
            for value in (-1, math.nan, math.inf, True, "1.0", torch.ones(2))
        ),
        ({"exceed": "clip"}, r"exceed is 'clip': give one of 'scale', 'observe', 'skip'"),
        ({"exceed": None}, "exceed is None: give one of"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore': give one of 'zero', 'skip', 'raise'"),
        ({"scope": "layer"}, "scope is 'layer': give one of 'global', 'group'"),
        ({"norm_type": 0}, "norm_type is 0: give a number > 0"),
        ({"max_value": -1.0}, "max_value is -1.0: give a finite number >= 0"),
        ({"max_value": True}, "max_value is True"),
        *(
            ({"skip_limit": value}, "skip_limit is .*: give a whole number >= 1")
            for value in (0, -1, 1.5, True, "3")
        ),
        ({"engine": "cuda"}, "engine='cuda' names no engine: give 'auto' or one of"),
        ({"model": [1]}, "model is a list: give a torch.nn.Module"),
        ({"ranks": 2}, r"ranks is 2: give gradclip.Ranks\(group\), or None"),
        ({"log": 3}, "log is 3: give a directory, a SummaryWriter, a Sink"),
    ],
)
def test_an_invalid_option_is_refused(option, message):
    """The error says what was found and what is needed, and nothing is attached."""
    optimizer = sgd([3.0, 4.0])
    with pytest.raises(ArgumentError, match=message):
        GradientClipper(optimizer, **{"max_norm": 1.0, **option})
    GradientClipper(optimizer, 1.0)


def test_further_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        GradientClipper(sgd([1.0]), 1.0, 2.0)


@pytest.mark.parametrize("engine", ["reference", "operators", "native", "auto"])
def test_an_engine_is_used_by_name(engine):
    optimizer = sgd([3.0, 4.0])
    try:
        clipper = GradientClipper(optimizer, 1.0, engine=engine)
    except EngineUnavailableError:
        assert engine == "native"  # without a compiler
        return
    optimizer.step()
    expected = ("native", "operators") if engine == "auto" else (engine,)
    assert clipper.engine in expected
    assert gradient_norm(weights_of(optimizer)) == pytest.approx(1.0, rel=1e-6)
    shown = f"GradientClipper(SGD, Fixed(1.0), steps=1, engine='{clipper.engine}')"
    assert repr(clipper) == shown


def test_an_engine_that_cannot_serve_is_refused():
    """It is not replaced by another one, whichever device of the parameters it lacks."""
    optimizer = sgd([1.0])
    with pytest.raises(EngineUnavailableError, match="engine='triton' "):
        GradientClipper(optimizer, 1.0, engine="triton")
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, device="meta"))]})
    with pytest.raises(EngineUnavailableError, match="engine='native' "):
        GradientClipper(optimizer, 1.0, engine="native")
    GradientClipper(optimizer, 1.0)


def test_complex_elements_are_not_bounded():
    """Nothing is written, and the step does not count."""
    optimizer = sgd([3.0, 4.0], [5 + 5j])
    clipper = GradientClipper(optimizer, 1.0, max_value=1.0)
    with pytest.raises(GradientError, match="complex elements cannot be bounded"):
        optimizer.step()
    weight = weights_of(optimizer)[0]
    assert (weight.grad.tolist(), weight.tolist()) == ([3.0, 4.0], [1.0, 1.0])
    assert clipper.steps == 0

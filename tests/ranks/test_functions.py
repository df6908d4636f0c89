"""The functions across ranks, and errors that all ranks raise."""

import math

import pytest
import torch
from torch import Tensor, distributed, nn

import gradclip
from gradclip import GradientClipper, GradientError, NonFiniteGradientError
from tests.support import dtensors
from tests.support.dtensors import full_gradients, spread, spread_parameter
from tests.support.processes import on_ranks
from tests.support.reference import bits_of, norm_of

words_of_one = pytest.mark.parametrize("words", ["0", "1", "R"])


@pytest.mark.parametrize("words", ["0", "R"])
@pytest.mark.parametrize("limit", [0.5, 1e9])
@on_ranks("ranks")
def test_norms(words, limit):
    """The functions return plain tensors with the norm of the whole, and bound elements."""
    full = full_gradients().values()
    parameters = [spread_parameter(gradient, "one", words) for gradient in full]
    gradients, needed = [p.grad for p in parameters], norm_of(full)
    before = gradclip.get_total_norm(gradients).item()
    with dtensors.recorded() as calls:
        norm = gradclip.clip_grad_norm_(parameters, limit)
    assert calls == ["sum"]
    assert (type(norm), norm.dtype, norm.shape) == (Tensor, torch.float64, torch.Size([]))
    assert before == norm.item() == pytest.approx(needed, rel=1e-6)
    gradclip.clip_grad_value_(parameters, 0.01)
    assert norm_of((g.to_local() for g in gradients), math.inf) <= torch.tensor(0.01)


@on_ranks("two_ranks")
def test_a_rank_without_gradients():
    """It enters the collective: of two ranks one has none, that with the second half."""
    weight = nn.Parameter(spread(torch.zeros(4), "one", "0"))
    if distributed.get_rank() == 0:
        weight.grad = dtensors.spread(torch.arange(3.0, 7.0), "one", "0")
    with dtensors.recorded() as calls:
        norm = gradclip.clip_grad_norm_([weight], 0.5)
    assert (calls, norm.item()) == (["sum"], 5.0)


@pytest.mark.parametrize("last", [math.nan, math.inf, 0.0], ids=str)
@on_ranks("two_ranks")
def test_norms_that_leave_gradients_as_they_are(last):
    """A norm that is not finite, or at its threshold: no rank writes."""
    parameter = spread_parameter(torch.tensor([3.0, 4.0, 0.0, last]), "one", "0")
    part = parameter.grad.to_local()
    before, version = bits_of(part), part._version
    norm = gradclip.clip_grad_norm_([parameter], 5.0)
    assert repr(norm.item()) == repr(last or 5.0)
    assert (bits_of(part), part._version) == (before, version)


@words_of_one
@on_ranks("ranks")
def test_units(words):
    """Units are clipped by the norms of the whole, as in one process."""
    results = []
    for way in (Tensor.clone, lambda tensor: spread(tensor, "one", words)):
        parameters = [nn.Parameter(way(weight)) for weight in full_gradients(seed=3).values()]
        for parameter, gradient in zip(parameters, full_gradients().values(), strict=True):
            parameter.grad = way(gradient)
        norm = gradclip.clip_grad_units_(parameters, 0.02)
        results.append([norm, *(dtensors.whole(parameter.grad) for parameter in parameters)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@words_of_one
@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_norm": 1.0, "max_value": 5.0}])
@on_ranks("ranks")
def test_clip_backward(words, options):
    """The gradient on its way is clipped by the norm of the whole."""
    x = spread(torch.zeros(4, 3), "one", words).requires_grad_()
    factors = torch.arange(12.0).reshape(4, 3)
    (gradclip.clip_backward(x, **options) * spread(factors, "one", words)).sum().backward()
    bounded = factors.clamp(max=options.get("max_value", 100.0))
    expected = bounded / torch.linalg.vector_norm(bounded)
    torch.testing.assert_close(x.grad.full_tensor(), expected)


PENDING = "elements whose sum over ranks is pending cannot be bounded"
NAMED = "nan at step 0, from these parameters: group 0, parameter 0."


@pytest.mark.parametrize(
    ("words", "last", "options", "error", "message"),
    [
        ("P", 1.0, {"max_value": 0.5}, GradientError, PENDING),
        ("0", math.nan, {"nonfinite": "raise"}, NonFiniteGradientError, NAMED),
    ],
)
@on_ranks("two_ranks")
def test_refusals(words, last, options, error, message):
    """All ranks raise, also where one alone has an element that is not finite."""
    parameter = spread_parameter(torch.tensor([1.0, 1.0, 1.0, last]), "one", words)
    clipper = GradientClipper(torch.optim.SGD([parameter], lr=0.1), 1.0, **options)
    with pytest.raises(error, match=message):
        clipper.step()

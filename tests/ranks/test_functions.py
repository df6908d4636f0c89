"""The functions across ranks, and errors that all ranks raise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import gradclip
from gradclip import GradientClipper
from tests.support import dtensors
from tests.support.dtensors import SHAPES, full_gradients, spread, spread_parameter
from tests.support.reference import norm_of

words_of_one = pytest.mark.parametrize("words", ["0", "1", "R"])


def clip_by_function(words: str, limit: float, with_gradients: bool) -> Any:
    """Return the norms before and while clipping, the collectives, and the largest element."""
    parameters = []
    for gradient in full_gradients(torch.float32).values():
        parameters.append(nn.Parameter(spread(torch.zeros_like(gradient), "one", words)))
        if with_gradients or distributed.get_rank() == 0:
            parameters[-1].grad = dtensors.spread_alone(gradient, words)
    gradients = [p.grad for p in parameters if p.grad is not None]
    before = gradclip.get_total_norm(gradients).item() if with_gradients else None
    with dtensors.Recorded() as calls:
        norm = gradclip.clip_grad_norm_(parameters, limit)
    assert (type(norm), norm.dtype, norm.shape) == (Tensor, torch.float64, torch.Size([]))
    gradclip.clip_grad_value_(parameters, 0.01)
    elements = [gradient.to_local().abs().flatten() for gradient in gradients]
    return before, norm.item(), calls, max(torch.cat([*elements, torch.zeros(1)]).tolist())


@pytest.mark.parametrize("words", ["0", "R"])
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_norms(ranks, words, limit):
    """The functions return plain tensors with the norm of the whole, and bound elements."""
    norm = norm_of(full_gradients(torch.float32).values())
    for before, clipped, calls, largest in ranks.run(clip_by_function, words, limit, True):
        assert before == clipped == pytest.approx(norm, rel=1e-6)
        assert calls == ["allreduce"]
        assert largest <= torch.tensor(0.01)


def test_a_rank_without_gradients(two_ranks):
    """It enters the collective: of two ranks one has none, that with the second halves."""
    norm = norm_of(full.chunk(2)[0] for full in full_gradients(torch.float32).values())
    for _, clipped, calls, _ in two_ranks.run(clip_by_function, "0", 0.5, False):
        assert clipped == pytest.approx(norm, rel=1e-6)
        assert calls == ["allreduce"]


def units_clipped(words: str) -> Any:
    """Clip units in one process and spread over ranks; return norms and gradients of both."""
    generator, kinds = torch.Generator().manual_seed(3), []
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for way in (torch.Tensor.clone, lambda tensor: spread(tensor, "one", words)):
        parameters = [nn.Parameter(way(weight)) for weight in weights.values()]
        gradients = full_gradients(torch.float32).values()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = way(gradient)
        norm = gradclip.clip_grad_units_(parameters, 0.02).item()
        kinds.append((norm, [dtensors.whole(parameter.grad) for parameter in parameters]))
    return kinds


@words_of_one
def test_units(ranks, words):
    """Units are clipped by the norms of the whole."""
    for (norm, gradients), (spread_norm, spread_gradients) in ranks.run(units_clipped, words):
        assert spread_norm == pytest.approx(norm, rel=1e-6)
        torch.testing.assert_close(spread_gradients, gradients)


def clipped_on_its_way(words: str, options: dict[str, float]) -> Tensor:
    x = spread(torch.zeros(4, 3), "one", words).requires_grad_()
    factors = spread(torch.arange(12.0).reshape(4, 3), "one", words)
    (gradclip.clip_backward(x, **options) * factors).sum().backward()
    return x.grad.full_tensor()


@words_of_one
@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_norm": 1.0, "max_value": 5.0}])
def test_clip_backward(ranks, words, options):
    """The gradient on its way is clipped by the norm of the whole."""
    bounded = torch.arange(12.0).reshape(4, 3).clamp(max=options.get("max_value", 100.0))
    for gradient in ranks.run(clipped_on_its_way, words, options):
        torch.testing.assert_close(gradient, bounded / torch.linalg.vector_norm(bounded))


def step_once(words: str, last: float, options: dict[str, Any]) -> None:
    parameter = spread_parameter(torch.tensor([1.0, 1.0, 1.0, last]), "one", words)
    GradientClipper(torch.optim.SGD([parameter], lr=0.1), 1.0, **options).step()


REFUSED = {
    "elements whose sum over ranks is pending cannot be bounded": ("P", 1.0, {"max_value": 0.5}),
    "nan at step 0, from these parameters: group 0, parameter 0.": (
        "0",
        math.nan,
        {"nonfinite": "raise"},
    ),
}


@pytest.mark.parametrize("needed", REFUSED)
def test_refusals(two_ranks, needed):
    """All ranks raise, also where one alone has an element that is not finite."""
    kind = "NonFiniteGradientError" if "nan" in needed else "GradientError"
    for message in two_ranks.errors(step_once, *REFUSED[needed]):
        assert message.startswith(kind)
        assert needed in message

"""The functions across ranks, and errors that all ranks raise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import (
    GradientClipper,
    GradientError,
    NonFiniteGradientError,
    clip_backward,
    clip_grad_norm_,
    clip_grad_units_,
    clip_grad_value_,
    get_total_norm,
)
from tests.support.dtensors import (
    SHAPES,
    Recorded,
    full_gradients,
    mesh_of,
    placements_of,
    spread,
    spread_alone,
)
from tests.support.reference import norm_of


def spread_on_one(full: Tensor, words: str) -> Tensor:
    return spread(full, mesh_of("one"), placements_of(words))


def clip_by_function(words: str, limit: float, with_gradients: bool) -> Any:
    """Return the norms before and while clipping, the collectives, and the largest element."""
    parameters, gradients = [], []
    for gradient in full_gradients(torch.float32).values():
        parameters.append(nn.Parameter(spread_on_one(torch.zeros_like(gradient), words)))
        if with_gradients or distributed.get_rank() == 0:
            gradients.append(spread_alone(gradient, mesh_of("one"), placements_of(words)))
            parameters[-1].grad = gradients[-1]
    before = get_total_norm(gradients).item() if with_gradients else None
    with Recorded() as calls:
        norm = clip_grad_norm_(parameters, limit)
    assert (type(norm), norm.dtype, norm.shape) == (Tensor, torch.float64, torch.Size([]))
    clip_grad_value_(parameters, 0.01)
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
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    alone = {name: nn.Parameter(weight) for name, weight in weights.items()}
    whole = {name: nn.Parameter(spread_on_one(w, words)) for name, w in weights.items()}
    for name, gradient in full_gradients(torch.float32).items():
        alone[name].grad = gradient.clone()
        whole[name].grad = spread_on_one(gradient, words)
    norms = [clip_grad_units_(each.values(), 0.02).item() for each in (alone, whole)]
    return norms, [(alone[name].grad, whole[name].grad.full_tensor()) for name in alone]


@pytest.mark.parametrize("words", ["0", "1", "R"])
def test_units(ranks, words):
    """Units are clipped by the norms of the whole."""
    for (alone, whole), gradients in ranks.run(units_clipped, words):
        assert whole == pytest.approx(alone, rel=1e-6)
        for expected, gradient in gradients:
            torch.testing.assert_close(gradient, expected)


def clipped_on_its_way(words: str, options: dict[str, float]) -> Tensor:
    x = spread_on_one(torch.zeros(4, 3), words).requires_grad_()
    factors = spread_on_one(torch.arange(12.0).reshape(4, 3), words)
    (clip_backward(x, **options) * factors).sum().backward()
    return x.grad.full_tensor()


@pytest.mark.parametrize("words", ["0", "1", "R"])
@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_norm": 1.0, "max_value": 5.0}])
def test_clip_backward(ranks, words, options):
    """The gradient on its way is clipped by the norm of the whole."""
    bounded = torch.arange(12.0).reshape(4, 3).clamp(max=options.get("max_value", 100.0))
    for gradient in ranks.run(clipped_on_its_way, words, options):
        torch.testing.assert_close(gradient, bounded / torch.linalg.vector_norm(bounded))


def refused_calls(words: str, gradient: list[float], error: type, options: dict[str, Any]) -> str:
    parameter = nn.Parameter(spread_on_one(torch.zeros(4), words.replace("P", "R")))
    parameter.grad = spread_on_one(torch.tensor(gradient), words)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    GradientClipper(optimizer, 1.0, **options)
    with pytest.raises(error) as caught:
        optimizer.step()
    return str(caught.value)


REFUSED = {
    "elements of pending sums": (
        ("P", [1.0] * 4, GradientError, {"max_value": 0.5}),
        "elements whose sum over ranks is pending cannot be bounded",
    ),
    "a gradient on one rank that is not finite": (
        ("0", [1.0, 2.0, 3.0, math.nan], NonFiniteGradientError, {"nonfinite": "raise"}),
        "is nan at step 0, from these parameters: group 0, parameter 0.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(two_ranks, case):
    """All ranks raise."""
    arguments, needed = REFUSED[case]
    for message in two_ranks.run(refused_calls, *arguments):
        assert needed in message

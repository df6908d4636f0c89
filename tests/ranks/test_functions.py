"""The functions across ranks, and what is refused."""

from __future__ import annotations

import math
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
from gradclip.ranks.shards import groups_of
from tests.support.dtensors import (
    SHAPES,
    Recorded,
    full_gradients,
    mesh_of,
    placements_of,
    spread,
    spread_alone,
)


def clip_by_function(words: str, dtype: torch.dtype, limit: float, with_gradients: bool) -> Any:
    full = full_gradients(dtype)
    parameters = []
    for gradient in full.values():
        own = placements_of(words)
        parameter = nn.Parameter(spread(torch.zeros_like(gradient), mesh_of("one"), own))
        if with_gradients or distributed.get_rank() == 0:
            parameter.grad = spread_alone(gradient, mesh_of("one"), own)
        parameters.append(parameter)
    before = get_total_norm([p.grad for p in parameters]) if with_gradients else None
    with Recorded() as calls:
        norm = clip_grad_norm_(parameters, limit)
    types = (type(norm) is Tensor, norm.dtype, norm.shape)
    found = [p.grad.to_local().double() for p in parameters if p.grad is not None]
    clip_grad_value_(parameters, 0.01)
    bounded = max(
        (
            p.grad.to_local().abs().amax().item()
            for p in parameters
            if p.grad is not None and p.grad.to_local().numel()
        ),
        default=0.0,
    )
    return None if before is None else before.item(), norm.item(), types, found, calls, bounded


@pytest.mark.parametrize("words", ["0", "R"])
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_the_functions_return_plain_norms_of_the_whole(ranks, words, limit):
    full = full_gradients(torch.float32)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in full.values()))
    for before, found, types, _, calls, bounded in ranks.run(
        clip_by_function, words, torch.float32, limit, True
    ):
        assert before == found == pytest.approx(norm, rel=1e-6)
        assert types == (True, torch.float64, torch.Size([]))
        assert calls == ["allreduce"]
        assert bounded <= 0.01


def test_ranks_without_gradients_enter_the_collective(two_ranks):
    """One of two has none, which has the second half of each vector."""
    full = full_gradients(torch.float32)
    halves = [gradient.chunk(2)[0].double() for gradient in full.values()]
    norm = math.sqrt(sum(half.square().sum().item() for half in halves))
    results = two_ranks.run(clip_by_function, "0", torch.float32, 0.5, False)
    assert [found for _, found, *_ in results] == [pytest.approx(norm, rel=1e-6)] * 2


def units_clipped(words: str) -> Any:
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    alone = {name: nn.Parameter(weight) for name, weight in weights.items()}
    mesh, placements = mesh_of("one"), placements_of(words)
    whole = {name: nn.Parameter(spread(w, mesh, placements)) for name, w in weights.items()}
    for name, gradient in full_gradients(torch.float32).items():
        alone[name].grad = gradient.clone()
        whole[name].grad = spread(gradient, mesh, placements)
    norms = [clip_grad_units_(each.values(), 0.02).item() for each in (alone, whole)]
    return norms, [(alone[name].grad, whole[name].grad.full_tensor()) for name in alone]


@pytest.mark.parametrize("words", ["0", "1", "R"])
def test_units_are_clipped_by_the_norms_of_the_whole(ranks, words):
    for (alone, whole), gradients in ranks.run(units_clipped, words):
        assert whole == pytest.approx(alone, rel=1e-6)
        for expected, found in gradients:
            torch.testing.assert_close(found, expected)


def clipped_on_its_way(words: str, options: dict[str, float]) -> Tensor:
    full = torch.arange(12.0).reshape(4, 3)
    x = spread(torch.zeros(4, 3), mesh_of("one"), placements_of(words)).requires_grad_()
    (
        clip_backward(x, **options) * spread(full, mesh_of("one"), placements_of(words))
    ).sum().backward()
    return x.grad.full_tensor()


@pytest.mark.parametrize("words", ["0", "1", "R"])
@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_norm": 1.0, "max_value": 5.0}])
def test_the_gradient_on_its_way_is_clipped_by_the_norm_of_the_whole(ranks, words, options):
    bounded = torch.arange(12.0).reshape(4, 3).clamp(max=options.get("max_value", 100.0))
    for found in ranks.run(clipped_on_its_way, words, options):
        torch.testing.assert_close(found, bounded / torch.linalg.vector_norm(bounded))


def refused(placement: str, gradient: list[float], error: type, options: dict[str, Any]) -> str:
    """Return the message of the error for a step with a gradient."""
    placements = placements_of(placement.replace("P", "R"))
    parameter = nn.Parameter(spread(torch.zeros(4), mesh_of("one"), placements))
    parameter.grad = spread(torch.tensor(gradient), mesh_of("one"), placements_of(placement))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    GradientClipper(optimizer, 1.0, **options)
    with pytest.raises(error) as caught:
        optimizer.step()
    return str(caught.value)


def test_elements_of_pending_sums_cannot_be_bounded(two_ranks):
    for message in two_ranks.run(refused, "P", [1.0] * 4, GradientError, {"max_value": 0.5}):
        assert "sum over ranks is pending cannot be bounded" in message


def test_all_ranks_raise_for_a_gradient_on_one_of_them(two_ranks):
    values, options = [1.0, 2.0, 3.0, math.nan], {"nonfinite": "raise"}
    for message in two_ranks.run(refused, "0", values, NonFiniteGradientError, options):
        assert "is nan at step 0, from these parameters: group 0, parameter 0." in message


def begun_again() -> list[Any]:
    """Leave the group, join another one, and clip on a mesh that is equal to the one before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    found = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            distributed.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
            )
            mesh = init_device_mesh("cpu", (1,))
            gradient = distribute_tensor(torch.tensor([3.0, 4.0]), mesh)
            [group] = groups_of([gradient])
            norm = get_total_norm([gradient]).item()
            found.append((norm, group.process_groups == (mesh.get_group(),)))
            distributed.destroy_process_group()
    return found


def test_a_group_that_is_joined_after_another_one_is_used():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(begun_again).result(60) == [(5.0, True)] * 2

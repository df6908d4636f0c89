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
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
)
from gradclip.ranks import groups_of
from tests.ranks.spreading import (
    Recorded,
    full_gradients,
    mesh_of,
    placements_of,
    spread,
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


def spread_alone(full: Tensor, mesh: Any, placements: list[Any]) -> Tensor:
    """Spread a tensor that every rank has, without telling the others."""
    from torch.distributed.tensor import DTensor

    local = full
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            parts = local.chunk(mesh.size(dimension), placement.dim)
            place = mesh.get_local_rank(dimension)
            local = parts[place] if place < len(parts) else local.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


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
        assert calls == ["all_reduce"]
        assert bounded <= 0.01


def test_ranks_without_gradients_enter_the_collective(two_ranks):
    """One of two has none, which has the second half of each vector."""
    full = full_gradients(torch.float32)
    halves = [gradient.chunk(2)[0].double() for gradient in full.values()]
    norm = math.sqrt(sum(half.square().sum().item() for half in halves))
    results = two_ranks.run(clip_by_function, "0", torch.float32, 0.5, False)
    assert [found for _, found, *_ in results] == [pytest.approx(norm, rel=1e-6)] * 2


def bounded_while_pending() -> str:
    parameter = nn.Parameter(spread(torch.zeros(4), mesh_of("one"), placements_of("R")))
    parameter.grad = spread(torch.ones(4), mesh_of("one"), placements_of("P"))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    GradientClipper(optimizer, 1.0, max_value=0.5)
    with pytest.raises(GradientError) as caught:
        optimizer.step()
    return str(caught.value)


def test_elements_of_pending_sums_cannot_be_bounded(two_ranks):
    for message in two_ranks.run(bounded_while_pending):
        assert "still to be added up over ranks cannot be bounded" in message


def raising_everywhere() -> str:
    parameter = nn.Parameter(spread(torch.zeros(4), mesh_of("one"), placements_of("0")))
    parameter.grad = spread(
        torch.tensor([1.0, 2.0, 3.0, math.nan]), mesh_of("one"), placements_of("0")
    )
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    GradientClipper(optimizer, 1.0, nonfinite="raise")
    with pytest.raises(NonFiniteGradientError) as caught:
        optimizer.step()
    return str(caught.value)


def test_all_ranks_raise_for_a_gradient_on_one_of_them(two_ranks):
    for message in two_ranks.run(raising_everywhere):
        assert "is nan at step 0, from these parameters: those of several ranks" in message


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
            found.append((norm, group.processes == (mesh.get_group(),)))
            distributed.destroy_process_group()
    return found


def test_a_group_that_is_joined_after_another_one_is_used():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(begun_again).result(60) == [(5.0, True)] * 2

"""Gradients that are spread over ranks, against those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradclip import GradientClipper
from tests.ranks.spreading import (
    INF,
    LIMIT,
    SHAPES,
    Recorded,
    full_gradients,
    mesh_of,
    placements_of,
    spread,
)


def labels_of(scope: str, name: str, shape: tuple[int, ...]) -> list[str]:
    if scope == "unit" and len(shape) > 1:
        return [f"{name}[{index}]" for index in range(shape[0])]
    return [{"global": "global"}.get(scope, name)]


def oracle(
    full: dict[str, Tensor], scope: str, order: float, limit: float
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the norms and the clipped gradients, in float64 and by hand."""
    parts: dict[str, list[Tensor]] = {}
    for name, gradient in full.items():
        labels = labels_of(scope, name, tuple(gradient.shape))
        rows = gradient.double() if len(labels) > 1 else gradient.double().unsqueeze(0)
        for label, row in zip(labels, rows, strict=True):
            parts.setdefault(label, []).append(row.flatten())
    norms = {
        label: torch.linalg.vector_norm(torch.cat(rows), order).item()
        for label, rows in parts.items()
    }
    clipped = {}
    for name, gradient in full.items():
        labels = labels_of(scope, name, tuple(gradient.shape))
        each = [min(1.0, limit / norms[label]) for label in labels]
        factors = torch.tensor(each, dtype=torch.float64)
        shape = (-1, *[1] * (gradient.dim() - 1)) if len(labels) > 1 else ()
        clipped[name] = gradient.double() * factors.reshape(shape)
    return [*norms.values()], clipped


def clip_spread(
    mesh: str | dict[str, str], words: dict[str, str], scope: str, order: float, dtype: torch.dtype
) -> Any:
    """Clip gradients that are spread as said; return norms, gradients, collectives."""
    full = full_gradients(dtype)
    parameters = {}
    for name, gradient in full.items():
        own = mesh_of(mesh if isinstance(mesh, str) else mesh[name])
        tensor = spread(
            torch.zeros_like(gradient), own, placements_of(words[name].replace("P", "R"))
        )
        parameters[name] = nn.Parameter(tensor)
        parameters[name].grad = spread(gradient, own, placements_of(words[name]))
    optimizer = torch.optim.SGD([*parameters.items()], lr=0.0)
    clipper = GradientClipper(optimizer, LIMIT, scope=scope, norm_type=order)
    with Recorded() as calls:
        optimizer.step()
    clipped = {name: p.grad.full_tensor().double() for name, p in parameters.items()}
    return clipper.last.norms.tolist(), clipped, calls


def check(pool: Any, mesh: Any, words: Any, scope: str, order: float, dtype: Any) -> list[Any]:
    words = words if isinstance(words, dict) else dict.fromkeys(SHAPES, words)
    found = pool.run(clip_spread, mesh, words, scope, order, dtype)
    norms, clipped = oracle(full_gradients(dtype), scope, order, LIMIT)
    rounding = torch.finfo(dtype).eps
    for own_norms, own_clipped, _ in found:
        assert own_norms == found[0][0]  # the same bits on all ranks
        assert own_norms == pytest.approx(norms, rel=1e-6)
        for name, gradient in clipped.items():
            torch.testing.assert_close(own_clipped[name], gradient, rtol=2 * rounding, atol=1e-30)
    return [calls for _, _, calls in found]


SCOPES = ("global", "parameter", "unit")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("words", ["0", "1", "R"])
def test_shards_have_the_norms_of_the_whole_in_one_collective(ranks, scope, order, words):
    for calls in check(ranks, "one", words, scope, order, torch.float32):
        assert calls == ["all_reduce"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("words", ["0 0", "0 1", "1 0", "R 0", "0 R", "R R"])
@pytest.mark.slow
def test_shards_on_a_mesh_of_two_dimensions(four_ranks, scope, words):
    for calls in check(four_ranks, "two", words, scope, 2.0, torch.float32):
        assert calls == ["all_reduce"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_shards_of_every_dtype(two_ranks, scope, dtype):
    check(two_ranks, "one", "0", scope, 2.0, dtype)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [2.0, INF])
def test_sums_that_are_pending_are_measured_as_what_they_add_up_to(ranks, scope, order):
    words = {"matrix": "P", "row": "0", "vector": "R", "filters": "1"}
    check(ranks, "one", words, scope, order, torch.float32)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [2.0, INF])
@pytest.mark.slow
def test_several_meshes_in_one_model_take_a_collective_for_each_group(four_ranks, scope, order):
    """As expert parallel on a mesh of its own, of which there are copies."""
    mesh = {"matrix": "one", "row": "two", "vector": "a", "filters": "b"}
    words = {"matrix": "0", "row": "R 1", "vector": "0", "filters": "1"}
    for calls in check(four_ranks, mesh, words, scope, order, torch.float32):
        assert calls == ["all_reduce"] * 3

"""Parameters that live on several ranks without being DTensors: `Ranks`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, Ranks
from tests.ranks.test_spread import SCOPES, oracle
from tests.support.dtensors import INF, LIMIT, Recorded, full_gradients, quick

CPU = torch.device("cpu")
COPY = "row"
"""What is on all ranks, in layouts with a copy."""


def own_part(layout: str, index: int, full: Tensor) -> Tensor | None:
    """Return what this rank has of a parameter: all or nothing of a stage's, or a shard."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    if layout == "stages":
        return full if index % count == rank else None
    dimension = min(int(layout[-1]), full.dim() - 1)
    parts = full.chunk(count, dimension)
    return parts[rank] if rank < len(parts) else full.narrow(dimension, 0, 0)


def clip_apart(layout: str, scope: str, order: float, dtype: torch.dtype, copy: bool) -> Any:
    full = full_gradients(dtype)
    parameters = {}
    for index, (name, gradient) in enumerate(full.items()):
        part = gradient if copy and name == COPY else own_part(layout, index, gradient)
        if part is not None:
            parameters[name] = nn.Parameter(torch.zeros_like(part))
            parameters[name].grad = part.clone()
    optimizer = torch.optim.SGD([*parameters.items()], lr=0.0)
    ranks = Ranks(replicated=COPY if copy else ())
    clipper = GradientClipper(optimizer, LIMIT, scope=scope, norm_type=order, ranks=ranks)
    with Recorded() as calls:
        optimizer.step()
    clipped = {name: p.grad.double() for name, p in parameters.items()}
    return dict(zip(clipper.labels, clipper.last.norms.tolist(), strict=True)), clipped, calls


def check(pool: Any, layout: str, scope: str, order: float, dtype: Any, copy: bool) -> None:
    found = pool.run(clip_apart, layout, scope, order, dtype, copy)
    full = full_gradients(dtype)
    norms, clipped = oracle(full, scope, order, LIMIT)
    parts = pool.run(parts_of, layout, clipped, copy)
    rounding = torch.finfo(dtype).eps
    for (own_norms, own_clipped, calls), expected in zip(found, parts, strict=True):
        assert own_norms == found[0][0]  # the same bits and order on all ranks
        assert sorted(own_norms.values()) == pytest.approx(sorted(norms), rel=1e-6)
        assert calls == ["allreduce"]
        assert own_clipped.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(own_clipped[name], gradient, rtol=2 * rounding, atol=1e-30)


def parts_of(layout: str, full: dict[str, Tensor], copy: bool) -> dict[str, Tensor]:
    found = {}
    for index, (name, tensor) in enumerate(full.items()):
        part = tensor if copy and name == COPY else own_part(layout, index, tensor)
        if part is not None:
            found[name] = part
    return found


@pytest.mark.parametrize("copy", [False, True], ids=["apart", "with a copy"])
@pytest.mark.parametrize("order", quick([1.0, 2.0, 3.0, INF], 2.0, INF))
@pytest.mark.parametrize("scope", SCOPES)
def test_stages_have_the_norms_of_the_whole_in_one_collective(ranks, scope, order, copy):
    check(ranks, "stages", scope, order, torch.float32, copy)


@pytest.mark.parametrize("copy", [False, True], ids=["apart", "with a copy"])
@pytest.mark.parametrize("order", [2.0, INF])
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("layout", ["shards 0", "shards 1"])
def test_shards_have_the_norms_of_the_whole(ranks, layout, scope, order, copy):
    check(ranks, layout, scope, order, torch.float32, copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["stages", "shards 0"])
def test_other_dtypes(two_ranks, layout, dtype):
    check(two_ranks, layout, "global", 2.0, dtype, True)

"""Gradients spread over ranks, the right norms and clipped gradients, and collectives counted."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper
from tests.support.reference import coefficient_of, norm_of, wide

INF = math.inf
SHAPES = {"matrix": (7, 6), "row": (1, 5), "vector": (6,), "filters": (4, 3, 2)}
SCOPES = ("global", "parameter", "unit")
LIMIT = 0.7


def quick(values: Iterable[Any], *some: Any) -> list[Any]:
    """Return the values of parameters, of which all but some make slow tests."""
    rows = {value: value if isinstance(value, tuple) else (value,) for value in values}
    slow = pytest.mark.slow
    return [pytest.param(*row, marks=[slow] * (key not in some)) for key, row in rows.items()]


ORDERS = [(order, "float32") for order in (2.0, INF, 1.0, 3.0)]
DTYPES = [(2.0, dtype) for dtype in ("float64", "bfloat16", "float16")]
orders_and_dtypes = pytest.mark.parametrize(
    ("order", "dtype"), quick(ORDERS + DTYPES, *ORDERS[:2], *DTYPES)
)


@cache
def meshes() -> dict[str, Any]:
    """Return the meshes of this process, made once, as all ranks take part."""
    from torch.distributed.device_mesh import init_device_mesh

    world = distributed.get_world_size()
    names = ("one", "experts")
    meshes = {name: init_device_mesh("cpu", (world,), mesh_dim_names=(name,)) for name in names}
    if world == 4:
        meshes["two"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    return meshes


def mesh_of(name: Any) -> Any:
    """Return a mesh of all ranks with "one" or "two" dimensions; "a" and "b" are those of two."""
    if not isinstance(name, str):
        return name  # it is a mesh
    return meshes()["two"][name] if name in ("a", "b") else meshes()[name]


def placements_of(words: str) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    kinds = {"R": Replicate(), "P": Partial()}
    return [kinds[word] if word in kinds else Shard(int(word)) for word in words.split()]


def full_gradients(dtype: str = "float32", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    given = {"generator": generator, "dtype": torch.float64}
    return {name: torch.randn(s, **given).to(getattr(torch, dtype)) for name, s in SHAPES.items()}


def spread(full: Tensor, mesh: Any, words: str) -> Tensor:
    """Spread a tensor that all ranks have over a mesh or one of a name, without a collective."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, local, placements = mesh_of(mesh), full, placements_of(words)
    for dimension, placement in enumerate(placements):
        count, place = mesh.size(dimension), mesh.get_local_rank(dimension)
        if placement.is_partial():  # parts that differ by rank and add up to the whole, exactly
            local = local * (2 if place == 0 else 0 if place < count - 1 else -1)
        elif placement.is_shard() and placement.dim >= max(full.dim(), 1):
            placements[dimension] = Replicate()
        elif placement.is_shard():
            parts = local.chunk(count, placement.dim)
            local = parts[place] if place < len(parts) else local.narrow(placement.dim, 0, 0)
    shape = {"shape": full.shape, "stride": full.stride()}
    local = local.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(local, mesh, placements, run_check=False, **shape)


def spread_parameter(gradient: Tensor, mesh: Any, words: str) -> nn.Parameter:
    """Return a parameter of zeros with this gradient, of which alone a sum may be pending."""
    parameter = nn.Parameter(spread(torch.zeros_like(gradient), mesh, words.replace("P", "R")))
    parameter.grad = spread(gradient, mesh, words)
    return parameter


def whole(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, of a DTensor the whole one. Collective."""
    return getattr(tensor, "full_tensor", tensor.clone)().detach().clone()


class Still(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:
        """Leave the parameters as they are; torch cannot add every pending sum to them."""


def norms_by_label(clipper: GradientClipper) -> dict[str, float]:
    return dict(zip(clipper.labels, clipper.last.norms.tolist(), strict=True))


def clip_named(named: dict[str, nn.Parameter], max_norm: Any = LIMIT, **options: Any) -> Any:
    """Clip the gradients of parameters; return norms by label, whole gradients, collectives."""
    with GradientClipper(Still([*named.items()]), max_norm, **options) as clipper:
        with recorded() as calls:
            clipper.step()
        gradients = {name: whole(p.grad) for name, p in named.items() if p.grad is not None}
        return norms_by_label(clipper), gradients, calls


def check_clipped(
    results: list[Any],
    full: dict[str, Tensor],
    scope: str,
    order: float = 2.0,
    *,
    limit: float = LIMIT,
    collectives: int | None = None,
    slack: float = 0.0,
    part: Callable[..., dict[str, Tensor]] = lambda clipped, rank: clipped,
) -> None:
    """Compare what `clip_named` returned on all ranks with the whole gradients, clipped by hand.

    Args:
        collectives: The collectives of a step; None for any.
        slack: Roundings of the largest element that an element may be wrong by.
        part: Returns the gradients of a rank, of all.
    """
    needed, clipped = oracle(full, scope, order, limit)
    for rank, (norms, gradients, calls) in enumerate(results):
        assert repr(norms) == repr(results[0][0])  # the same bits and order on all ranks
        assert norms == pytest.approx(needed or {"global": 0.0}, rel=1e-6, abs=0)
        assert collectives is None or calls == ["sum"] * collectives
        expected = part(clipped, rank)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            facts = torch.finfo(gradient.dtype)
            most = max(expected[name].abs().flatten().tolist(), default=0.0)
            absolute = 1e-30 + slack * (facts.eps * most + facts.smallest_normal)
            near = {"rtol": 2 * facts.eps, "atol": absolute}
            torch.testing.assert_close(gradient.double(), expected[name], **near)


def oracle(
    full: dict[str, Tensor], scope: str, order: float, limit: float
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the norms by label and the clipped gradients, in float64 and by hand."""
    clipped = {name: wide(gradient).reshape(gradient.shape) for name, gradient in full.items()}
    rows: dict[str, list[Tensor]] = {}
    for name, gradient in clipped.items():
        own = {"global" if scope == "global" else name: gradient}
        if scope == "unit" and gradient.dim() > 1:
            own = {f"{name}[{index}]": row for index, row in enumerate(gradient)}
        for label, row in own.items():
            rows.setdefault(label, []).append(row)
    norms = {label: norm_of(parts, order) for label, parts in rows.items()}
    for label, parts in rows.items():
        for row in parts:
            row *= coefficient_of(norms[label], limit)
    return norms, clipped


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Name the collectives that are entered, when they are over; "sum" for both that add up."""
    from torch.distributed.tensor.debug import CommDebugMode

    calls: list[str] = []
    with CommDebugMode() as mode:
        yield calls
    for kind, count in mode.get_comm_counts().items():
        name = str(kind).rpartition(".")[2].strip("_")
        calls += ["sum" if name in ("allreduce", "allgather") else name] * count

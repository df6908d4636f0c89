"""Gradients that are spread over ranks, against those of one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, GradientError, NonFiniteGradientError

INF = math.inf
SHAPES = {"matrix": (7, 6), "row": (1, 5), "vector": (6,), "filters": (4, 3, 2)}
LIMIT = 0.7


def meshes() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    world = distributed.get_world_size()
    found = {"one": init_device_mesh("cpu", (world,), mesh_dim_names=("a",))}
    if world == 4:
        found["two"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    return found


_meshes: dict[str, Any] = {}


def mesh_of(name: str) -> Any:
    """Return a mesh, made once in each process."""
    if not _meshes:
        _meshes.update(meshes())
    if name in ("a", "b"):
        return _meshes["two"][name]
    return _meshes[name]


def placements_of(words: str) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    kinds = {"R": Replicate(), "P": Partial(), "0": Shard(0), "1": Shard(1)}
    return [kinds[word] for word in words.split()]


def full_gradients(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def spread(full: Tensor, mesh: Any, placements: list[Any]) -> Tensor:
    """Spread a tensor; of a sum that is pending each rank has another part."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    fits = [
        Replicate()
        if placement.is_partial() or (placement.is_shard(1) and full.dim() < 2)
        else placement
        for placement in placements
    ]
    tensor = distribute_tensor(full, mesh, fits)
    if not any(placement.is_partial() for placement in placements):
        return tensor
    local, given = tensor.to_local(), []
    for dimension, (placement, fit) in enumerate(zip(placements, fits, strict=True)):
        given.append(placement if placement.is_partial() else fit)
        if placement.is_partial():
            # Parts that differ by rank and add up to the whole, exactly.
            count, place = mesh.size(dimension), mesh.get_local_rank(dimension)
            local = local * (2 if place == 0 else 0 if place < count - 1 else -1)
    return DTensor.from_local(local, mesh, given, run_check=False)


class Recorded:
    """Counts the collectives that are entered."""

    def __enter__(self) -> list[str]:
        self._real = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather")}
        calls: list[str] = []

        def counted(name: str, real: Any) -> Any:
            return lambda *args, **kwargs: (calls.append(name), real(*args, **kwargs))[1]

        for name, real in self._real.items():
            setattr(distributed, name, counted(name, real))
        return calls

    def __exit__(self, *error: object) -> None:
        for name, real in self._real.items():
            setattr(distributed, name, real)


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


# The functions


def clip_by_function(words: str, dtype: torch.dtype, limit: float, with_gradients: bool) -> Any:
    from gradclip import clip_grad_norm_, clip_grad_value_, get_total_norm

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


# Training


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))
        self.head = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.inner(inputs).tanh())


def trained(kind: str, options: dict[str, Any], log: str | None = None) -> Any:
    """Train a few steps, in one process or spread over the ranks; every rank has its batches."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    net: nn.Module = Net()
    wrapped = net
    if kind == "fsdp2":
        fully_shard(net.inner)
        fully_shard(net)
    elif kind == "ddp":
        wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    options = {"max_norm": 0.05} | options
    clipper = GradientClipper(optimizer, model=net, log=log, **options)
    norms = []
    world, rank = distributed.get_world_size(), distributed.get_rank()
    for step in range(6):
        batch = torch.randn(4 * world, 5, generator=torch.Generator().manual_seed(step))
        if step == 3 and options.get("nonfinite"):
            batch[-1, 0] = math.nan  # on the last rank alone
        own = batch if kind == "alone" else batch[4 * rank : 4 * rank + 4]
        optimizer.zero_grad()
        wrapped(own).square().mean().backward()
        with Recorded() as calls:
            optimizer.step()
        norms.append(clipper.last.norms.tolist())
    clipper.close()
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in net.parameters()]
    return norms, weights, len(calls), clipper.state_dict()


RULES = {
    "fixed": {},
    "each parameter": {"scope": "parameter", "max_norm": 0.01},
    "each unit": {"scope": "unit", "max_norm": 0.005},
    "largest element": {"norm_type": math.inf, "max_norm": 0.01},
    "left out": {"nonfinite": "skip"},
    "erased": {"nonfinite": "zero"},
    "percentile": {"max_norm": "percentile", "scope": "unit"},
    "weights": {"max_norm": "weights", "scope": "unit"},
}


def with_rule(kind: str, name: str, log: str | None = None) -> Any:
    from gradclip.thresholds import Percentile, RelativeToWeights

    options = dict(RULES[name])
    made = {"percentile": Percentile(50), "weights": RelativeToWeights(0.01)}
    options["max_norm"] = made.get(options.get("max_norm"), options.get("max_norm", 0.05))
    return trained(kind, options, log)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_training_is_that_of_one_process_with_the_whole_batch(ranks, kind, name):
    needed, weights, _, state = ranks.run(with_rule, "alone", name)[0]
    found = ranks.run(with_rule, kind, name)
    for own, own_weights, calls, own_state in found:
        for norms, expected in zip(own, needed, strict=True):
            assert norms == pytest.approx(expected, rel=1e-4, abs=1e-7, nan_ok=True)
        for one, other in zip(own_weights, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        if kind == "fsdp2":
            assert calls == (2 if name == "weights" else 1)
        else:
            assert calls == 0
        assert own_state["counters"] == state["counters"]
        assert repr(own) == repr(found[0][0])  # the same bits on all ranks


def test_only_the_first_rank_writes_into_a_directory(two_ranks, tmp_path):
    two_ranks.run(with_rule, "fsdp2", "fixed", str(tmp_path / "logs"))
    [file] = (tmp_path / "logs").iterdir()
    reader = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in reader.Scalars("grad_norm/pre")] == [*range(6)]


# What is refused, and errors


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

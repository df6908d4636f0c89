"""Gradients that one collective serves on the CPU, plain on some ranks and unusual on others."""

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, MemorySink, Ranks
from gradclip.thresholds import Percentile
from tests.support import dtensors
from tests.support.calls import python_calls
from tests.support.processes import on_ranks
from tests.support.reference import norm_of, parameter_with

STEPS = 6
UNUSUAL = {
    "absent": lambda gradient: None,
    "sparse": lambda gradient: gradient.to_sparse(),
    "strided": lambda gradient: torch.stack([gradient, gradient], 2)[..., 0],
    "expanded": lambda gradient: gradient[:, :1].expand(-1, 3),
}


def gradients_of_rank(step: int, rank: int, unusual: str) -> list[Tensor | None]:
    """Return the gradients of a rank: plain ones, but at odd steps on rank 1."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    gradients = [torch.randn(2, 3, generator=generator) * (step + 1) for _ in range(2)]
    if step == 4 and rank == 1:
        gradients[0][0, 0] = torch.inf
    if step % 2 and rank == 1:
        return [*map(UNUSUAL[unusual], gradients)]
    return gradients


def clipped_steps(unusual: str, order: float, logged: bool) -> Any:
    """Clip some steps; return the numbers of each record, and the gradients that are left."""
    rank = distributed.get_rank()
    parameters = [parameter_with(torch.zeros(2, 3)) for _ in range(2)]
    optimizer = dtensors.Still([(f"{rank}.{i}", p) for i, p in enumerate(parameters)])
    options = {"norm_type": order, "nonfinite": "skip", "ranks": Ranks()}
    log = MemorySink(per_parameter=4) if logged and rank == 0 else None
    steps = []
    with GradientClipper(optimizer, Percentile(50), log=log, **options) as clipper:
        for step in range(STEPS):
            for parameter, gradient in zip(
                parameters, gradients_of_rank(step, rank, unusual), strict=True
            ):
                parameter.grad = gradient
            with dtensors.recorded() as calls:
                clipper.step()
            assert calls == ["sum"]
            last = clipper.last
            numbers = last.norm.item(), last.threshold.item(), last.coefficient.item()
            left = [p.grad.to_dense() for p in parameters if p.grad is not None]
            steps.append((numbers, clipper.skipped, left))
    logged_norms = [row.parameter_norms for row in log.steps] if log else [None] * STEPS
    return [(*step, norms) for step, norms in zip(steps, logged_norms, strict=True)]


@pytest.mark.parametrize("logged", [False, True], ids=["", "logged"])
@pytest.mark.parametrize("order", [2.0, 3.0, torch.inf])
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_ranks_whose_gradients_differ_in_kind_decide_alike(two_ranks, unusual, order, logged):
    """Records have the same bits on all ranks, and the norm of all gradients."""
    results = two_ranks.run(clipped_steps, unusual, order, logged)
    for step, (one, other) in enumerate(zip(*results, strict=True)):
        assert repr(one[:2]) == repr(other[:2])
        (norm, _, coefficient), skipped, _, norms = one
        named = {
            f"{rank}.{index}": gradient.to_dense()
            for rank in range(2)
            for index, gradient in enumerate(gradients_of_rank(step, rank, unusual))
            if gradient is not None
        }
        dense = [*named.values()]
        assert skipped == (step >= 4)
        if step != 4:
            assert norm == pytest.approx(norm_of(dense, order), rel=1e-6)
            for name in named if logged else ():
                assert norms[name] == pytest.approx(norm_of([named[name]], order), rel=1e-6)
            for left, gradient in zip(one[2] + other[2], dense, strict=True):
                torch.testing.assert_close(left, gradient * coefficient)


@on_ranks("two_ranks")
def test_shards_without_gradients():
    """What is on every rank counts once, also where no DTensor has a gradient."""
    shard = dtensors.spread_parameter(torch.ones(4, 3), "one", "0")
    shard.grad = None
    named = {"shard": shard, "plain": parameter_with(torch.tensor([3.0, 4.0]))}
    norms, gradients, _ = dtensors.clip_named(named, 1.0)
    assert norms == {"global": 5.0}
    torch.testing.assert_close(gradients["plain"], torch.tensor([0.6, 0.8]))


@pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"),
    reason="this version of torch has no exchange interface of DLPack",
)
@pytest.mark.parametrize("kind", ["shards", "stages"])
@on_ranks("two_ranks")
def test_a_step_makes_few_python_calls(kind):
    """As many for few gradients as for many, and half as many as other gradients take."""
    counts = []
    for count in (2, 20):
        gradients = [torch.ones(4, 3) for _ in range(count)]
        if kind == "shards":
            parameters = [dtensors.spread_parameter(g, "one", "0") for g in gradients]
        else:
            parameters = [nn.Parameter(torch.zeros(4, 3)) for _ in gradients]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        optimizer = dtensors.Still(parameters)
        ranks = Ranks() if kind == "stages" else None
        with GradientClipper(optimizer, 1e9, ranks=ranks) as clipper:
            for _ in range(2):
                optimizer.step()
            calls = python_calls(optimizer.step)
            assert clipper.last.norm.item() == pytest.approx(
                norm_of(gradients) * (1 if kind == "shards" else 2**0.5)
            )
        counts.append(len(calls))
    assert counts[0] == counts[1] < 75, calls

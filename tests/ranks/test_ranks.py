"""Parameters on several ranks that are not DTensors (`Ranks`), against one process with all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, MemorySink, NonFiniteGradientError, Ranks
from tests.support.clippers import OPTIONS
from tests.support.dtensors import (
    INF,
    LIMIT,
    SCOPES,
    SHAPES,
    Recorded,
    full_gradients,
    oracle,
    quick,
)
from tests.support.rules import RULES

COPY = "row"
"""The parameter that is on all ranks, where there are copies."""
STEPS = 9


def own_part(layout: str, name: str, full: Tensor, copy: bool) -> Tensor | None:
    """Return the part of this rank: of a stage's parameter all or nothing, else a shard."""
    if layout == "alone" or (copy and name == COPY):
        return full
    rank, count = distributed.get_rank(), distributed.get_world_size()
    if layout == "stages":
        return full if [*SHAPES].index(name) % count == rank else None
    dimension = min(int(layout[-1]), full.dim() - 1)
    parts = full.chunk(count, dimension)
    return parts[rank] if rank < len(parts) else full.narrow(dimension, 0, 0)


def own_parts(layout: str, full: dict[str, Tensor], copy: bool) -> dict[str, Tensor]:
    parts = {name: own_part(layout, name, tensor, copy) for name, tensor in full.items()}
    return {name: part for name, part in parts.items() if part is not None}


# One step


def clip_apart(layout: str, scope: str, order: float, dtype: torch.dtype, copy: bool) -> Any:
    parameters = {}
    for name, part in own_parts(layout, full_gradients(dtype), copy).items():
        parameters[name] = nn.Parameter(torch.zeros_like(part))
        parameters[name].grad = part.clone()
    optimizer = torch.optim.SGD([*parameters.items()], lr=0.0)
    ranks = Ranks(replicated=COPY if copy else ())
    clipper = GradientClipper(optimizer, LIMIT, scope=scope, norm_type=order, ranks=ranks)
    with Recorded() as calls:
        optimizer.step()
    clipped = {name: p.grad.double() for name, p in parameters.items()}
    return dict(zip(clipper.labels, clipper.last.norms.tolist(), strict=True)), clipped, calls


def check_parts(
    pool: Any, layout: str, scope: str, order: float, copy: bool, dtype: Any = torch.float32
) -> None:
    results = pool.run(clip_apart, layout, scope, order, dtype, copy)
    needed, clipped = oracle(full_gradients(dtype), scope, order, LIMIT)
    parts = pool.run(own_parts, layout, clipped, copy)
    rounding = torch.finfo(dtype).eps
    for (norms, gradients, calls), expected in zip(results, parts, strict=True):
        assert repr(norms) == repr(results[0][0])  # the same bits and order on all ranks
        assert norms == pytest.approx(needed, rel=1e-6)
        assert calls == ["allreduce"]
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=2 * rounding, atol=1e-30)


@pytest.mark.parametrize("copy", [False, True], ids=["apart", "with a copy"])
@pytest.mark.parametrize("order", quick([1.0, 2.0, 3.0, INF], 2.0, INF))
@pytest.mark.parametrize("scope", SCOPES)
def test_stages(ranks, scope, order, copy):
    """Stages have the norms of the whole, in one collective."""
    check_parts(ranks, "stages", scope, order, copy)


@pytest.mark.parametrize("copy", [False, True], ids=["apart", "with a copy"])
@pytest.mark.parametrize("order", [2.0, INF])
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("layout", ["shards 0", "shards 1"])
def test_shards(ranks, layout, scope, order, copy):
    """Shards have the norms of the whole, in one collective."""
    check_parts(ranks, layout, scope, order, copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["stages", "shards 0"])
def test_dtypes(two_ranks, layout, dtype):
    """Other dtypes have the norms of the whole, too."""
    check_parts(two_ranks, layout, "global", 2.0, True, dtype)


def tied_shards() -> dict[str, float]:
    """Clip two stages of two shards, as Megatron-LM has, with copies of one embedding in both."""
    stage, shard = divmod(distributed.get_rank(), 2)
    own, copy = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
    own.grad, copy.grad = torch.tensor([3.0]), torch.full((2,), 1.0 + shard)
    tied = ("embed.weight", "head.weight")
    optimizer = torch.optim.SGD([(f"own{stage}", own), (tied[stage], copy)], lr=0.0)
    ranks = Ranks(replicated=lambda name, p: f"tied/{shard}" if name in tied else None)
    clipper = GradientClipper(optimizer, None, scope="parameter", ranks=ranks)
    clipper.step()
    return dict(zip(clipper.labels, clipper.last.norms.square().tolist(), strict=True))


@pytest.mark.slow
def test_copied_shards(four_ranks):
    """Of each shard of the embedding one copy counts, and of other parameters both shards."""
    needed = {"embed.weight": 2 * 1 + 2 * 4, "own0": 2 * 9, "own1": 2 * 9}
    assert four_ranks.run(tied_shards) == [pytest.approx(needed)] * 4


# Many steps


def gradients_at(step: int) -> dict[str, Tensor | None]:
    """Return all gradients: at some steps one is missing, or all are, or one is not finite."""
    generator = torch.Generator().manual_seed(step)
    gradients: dict[str, Tensor | None] = {
        name: torch.randn(shape, generator=generator) * (1 + step % 4)
        for name, shape in SHAPES.items()
    }
    if step == 3:
        gradients["filters"] = None
    if step == 4:
        gradients = dict.fromkeys(SHAPES)
    if step == 6:
        gradients["vector"][-1] = math.nan  # on one rank alone
    return gradients


def steps_of_parts(layout: str, rule: str, options: dict[str, Any]) -> Any:
    """Take the steps with the parts of this rank.

    Returns:
        For each step the norms and thresholds by label, and whether it was skipped; the weights;
        the clipper's state; the most collectives of a step.
    """
    generator = torch.Generator().manual_seed(99)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    parts = own_parts(layout, weights, True)
    named = {name: nn.Parameter(part.clone()) for name, part in parts.items()}
    optimizer = torch.optim.SGD([*named.items()], lr=0.1, momentum=0.9)
    ranks = None if layout == "alone" else Ranks(replicated=COPY)
    clipper = GradientClipper(optimizer, RULES[rule](), ranks=ranks, **options)
    records, most = [], 0
    for step in range(STEPS):
        for name, gradient in gradients_at(step).items():
            if name in named:
                part = None if gradient is None else own_part(layout, name, gradient, True)
                named[name].grad = None if part is None else part.clone()
        with Recorded() as calls:
            optimizer.step()
        most = max(most, len(calls))
        last = clipper.last
        rows = zip(last.norms.tolist(), last.thresholds.tolist(), strict=True)
        records.append((dict(zip(clipper.labels, rows, strict=True)), bool(last.skipped)))
    return records, {name: p.detach() for name, p in named.items()}, clipper.state_dict(), most


def check_steps(pool: Any, layout: str, rule: str, options: dict[str, Any]) -> None:
    needed, weights, _, _ = steps_of_parts("alone", rule, options)
    results = pool.run(steps_of_parts, layout, rule, options)
    parts = pool.run(own_parts, layout, weights, True)
    for (records, own, state, most), expected in zip(results, parts, strict=True):
        assert repr(state) == repr(results[0][2])  # equal on all ranks
        assert most == (2 if options.get("max_value") else 1)
        for (rows, skipped), (needed_rows, needed_skip) in zip(records, needed, strict=True):
            assert skipped == needed_skip
            assert rows.keys() == needed_rows.keys()
            for label, row in rows.items():
                assert row == pytest.approx(needed_rows[label], rel=1e-6, nan_ok=True)
        for name, weight in own.items():
            torch.testing.assert_close(weight, expected[name], equal_nan=True)


@pytest.mark.parametrize("scope", quick(["global", "parameter"], "parameter"))
@pytest.mark.parametrize("layout", quick(["stages", "shards 0"], "stages"))
@pytest.mark.parametrize("rule", RULES)
def test_rules(two_ranks, layout, rule, scope):
    """Every rule decides as in one process."""
    check_steps(two_ranks, layout, rule, {"scope": scope})


# Of shards that are not DTensors the rows are unknown: scope "unit" is refused.
LAID_OUT = [("stages", name) for name in OPTIONS]
LAID_OUT += [("shards 0", name) for name in OPTIONS if name != "unit"]


@pytest.mark.parametrize(("layout", "options"), LAID_OUT)
def test_policies(ranks, layout, options):
    """Every policy acts as in one process."""
    check_steps(ranks, layout, "Fixed", OPTIONS[options])


def raised(layout: str) -> str:
    with pytest.raises(NonFiniteGradientError) as caught:
        steps_of_parts(layout, "Fixed", {"nonfinite": "raise"})
    return str(caught.value)


@pytest.mark.parametrize("layout", ["stages", "shards 0"])
def test_an_error_of_one_rank(two_ranks, layout):
    """All ranks raise, and name the parameter that is on one of them."""
    for message in two_ranks.run(raised, layout):
        assert "is nan at step 6, from these parameters: vector. The norms before: " in message


def log_rows(layout: str, rank: int) -> Any:
    """Log on one rank; return the norms of parameters at each step, and the incidents."""
    sink = MemorySink(per_parameter="all")
    here = layout == "alone" or distributed.get_rank() == rank
    steps_of_parts(layout, "Fixed", {"log": sink if here else None})
    steps = [{**step.parameter_norms} for step in sink.steps if step.parameter_norms]
    return steps, [step.incident for step in sink.steps if step.incident]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", ["stages", "shards 0"])
def test_the_log_of_one_rank(two_ranks, layout, rank):
    """It has the norms of the parameters of all ranks, and the others have no log."""
    needed, _ = log_rows("alone", rank)
    results = two_ranks.run(log_rows, layout, rank)
    assert results[1 - rank] == ([], [])
    steps, incidents = results[rank]
    full = [{**dict.fromkeys(SHAPES, 0.0), **norms} for norms in needed]
    assert [norms for norms in steps if any(norms.values())] == [
        pytest.approx(norms, rel=1e-6, nan_ok=True) for norms in full
    ]
    assert incidents
    start = "The norm was nan at step 6, from vector. The norms before: "
    assert all(incident.startswith(start) for incident in incidents)

"""Parameters on several ranks that are not DTensors (`Ranks`), against one process with all."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, MemorySink, NonFiniteGradientError, Ranks
from tests.support.clippers import OPTIONS
from tests.support.dtensors import (
    SCOPES,
    SHAPES,
    check_clipped,
    clip_named,
    full_gradients,
    orders_and_dtypes,
    quick,
    recorded,
)
from tests.support.processes import on_ranks
from tests.support.reference import parameter_with
from tests.support.rules import RULES

COPY = "row"
"""The parameter that is on all ranks, where there are copies."""
STEPS = 9


def own_parts(layout: str, full: dict[str, Any], rank: int = 0, count: int = 1) -> dict[str, Any]:
    """Return the parts of a rank: of a stage's parameter all or nothing, else a shard."""
    parts = {}
    for index, (name, tensor) in enumerate(full.items()):
        if count == 1 or tensor is None or (name == COPY and "copy" in layout):
            parts[name] = tensor
        elif "stages" not in layout:
            dimension = min(int(layout.split()[1]), tensor.dim() - 1)
            chunks = tensor.chunk(count, dimension)
            empty = tensor.narrow(dimension, 0, 0)
            parts[name] = chunks[rank] if rank < len(chunks) else empty
        elif index % count == rank:
            parts[name] = tensor
    return parts


def here() -> tuple[int, int]:
    return distributed.get_rank(), distributed.get_world_size()


# One step


def clip_apart(layout: str, scope: str, order: float, dtype: str) -> Any:
    parts = own_parts(layout, full_gradients(dtype), *here())
    named = {name: parameter_with(part.clone()) for name, part in parts.items()}
    ranks = Ranks(replicated=COPY if "copy" in layout else ())
    return clip_named(named, scope=scope, norm_type=order, ranks=ranks)


# Of shards that are not DTensors the rows are unknown: scope "unit" is refused.
SHARDS = ("shards 0", "shards 0 copy", "shards 1", "shards 1 copy")
LAYOUTS = [*product(("stages", "stages copy"), SCOPES), *product(SHARDS, SCOPES[:2])]


@pytest.mark.parametrize(("layout", "scope"), LAYOUTS)
@orders_and_dtypes
def test_one_step(ranks, layout, scope, order, dtype):
    """Stages and shards have the norms of the whole, in one collective."""
    results = ranks.run(clip_apart, layout, scope, order, dtype)
    check_clipped(
        results,
        full_gradients(dtype),
        scope,
        order,
        collectives=1,
        part=lambda clipped, rank: own_parts(layout, clipped, rank, len(results)),
    )


@pytest.mark.slow
@on_ranks("four_ranks")
def test_copied_shards():
    """Of an embedding that two stages of Megatron-LM have, one copy of each shard counts."""
    stage, shard = divmod(distributed.get_rank(), 2)
    own, copy = parameter_with(torch.tensor([3.0])), parameter_with(torch.full((2,), 1.0 + shard))
    tied = ("embed.weight", "head.weight")
    ranks = Ranks(replicated=lambda name, p: f"tied/{shard}" if name in tied else None)
    named = {f"own{stage}": own, tied[stage]: copy}
    norms, *_ = clip_named(named, None, scope="parameter", ranks=ranks)
    needed = {"embed.weight": 2 * 1 + 2 * 4, "own0": 2 * 9, "own1": 2 * 9}
    assert {label: norm**2 for label, norm in norms.items()} == pytest.approx(needed)


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


def steps_of_parts(layout: str, rule: str, options: dict[str, Any], alone: bool = False) -> Any:
    """Take the steps with the parts of this rank, or with all.

    Returns:
        Norms and thresholds by label and whether it was skipped, for each step; the weights; the
        clipper's state; the most collectives of a step.
    """
    place = (0, 1) if alone else here()
    generator = torch.Generator().manual_seed(99)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    parts = own_parts(layout, weights, *place)
    named = {name: nn.Parameter(part.clone()) for name, part in parts.items()}
    optimizer = torch.optim.SGD([*named.items()], lr=0.1, momentum=0.9)
    ranks = None if alone else Ranks(replicated=COPY)
    clipper = GradientClipper(optimizer, RULES[rule](), ranks=ranks, **options)
    records, most = [], 0
    for step in range(STEPS):
        gradients = own_parts(layout, gradients_at(step), *place)
        for name, parameter in named.items():
            part = gradients.get(name)
            parameter.grad = None if part is None else part.clone()
        with recorded() as calls:
            optimizer.step()
        most = max(most, len(calls))
        last = clipper.last
        rows = zip(last.norms.tolist(), last.thresholds.tolist(), strict=True)
        records.append((dict(zip(clipper.labels, rows, strict=True)), bool(last.skipped)))
    return records, {name: p.detach() for name, p in named.items()}, clipper.state_dict(), most


COPIED = ("stages copy", "shards 0 copy")
POLICIES = [*product(COPIED, ["Fixed"], OPTIONS)]
POLICIES.remove((COPIED[1], "Fixed", "unit"))
LEARNING = [*product(COPIED, RULES, ["parameter", "as it comes"])]
QUICK = [*POLICIES, *product(COPIED[:1], RULES, ["parameter"])]


@pytest.mark.parametrize(("layout", "rule", "options"), quick(POLICIES + LEARNING, *QUICK))
def test_many_steps(ranks, layout, rule, options):
    """Every rule decides and every policy acts as in one process."""
    needed, weights, _, _ = steps_of_parts(layout, rule, OPTIONS[options], True)
    results = ranks.run(steps_of_parts, layout, rule, OPTIONS[options])
    for rank, (records, own, state, most) in enumerate(results):
        assert repr(state) == repr(results[0][2])  # equal on all ranks
        assert most == (2 if "bounded" in options else 1)
        for (rows, skipped), (needed_rows, needed_skip) in zip(records, needed, strict=True):
            assert skipped == needed_skip
            assert rows.keys() == needed_rows.keys()
            for label, row in rows.items():
                assert row == pytest.approx(needed_rows[label], rel=1e-6, nan_ok=True)
        expected = own_parts(layout, weights, rank, len(results))
        torch.testing.assert_close(own, expected, equal_nan=True)


of_copies = pytest.mark.parametrize("layout", COPIED)


@of_copies
@on_ranks("two_ranks")
def test_an_error_of_one_rank(layout):
    """All ranks raise, and name the parameter that is on one of them."""
    needed = "nan at step 6, from these parameters: vector. The norms before: "
    with pytest.raises(NonFiniteGradientError, match=needed):
        steps_of_parts(layout, "Fixed", {"nonfinite": "raise"})


@pytest.mark.parametrize("rank", [0, 1])
@of_copies
@on_ranks("two_ranks")
def test_the_log_of_one_rank(layout, rank):
    """It has the norms of the parameters of all ranks, and the others have no log."""
    sink, whole = (MemorySink(per_parameter="all") for _ in range(2))
    steps_of_parts(layout, "Fixed", {"log": whole}, alone=True)
    logs = distributed.get_rank() == rank
    steps_of_parts(layout, "Fixed", {"log": sink if logs else None})
    for step, needed in zip(sink.steps, whole.steps, strict=True) if logs else ():
        norms = dict.fromkeys(SHAPES, 0.0) | dict(needed.parameter_norms or {})
        assert {**step.parameter_norms} == pytest.approx(norms, rel=1e-6, nan_ok=True)
    start = "The norm was nan at step 6, from vector. The norms before: "
    incidents = [step.incident for step in sink.steps if step.incident]
    assert [incident.startswith(start) for incident in incidents] == [True] * logs

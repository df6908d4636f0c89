"""Many steps of ranks that have parts of a model, against those of one process with all of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, MemorySink, NonFiniteGradientError, Ranks
from tests.ranks.test_ranks import COPY, own_part
from tests.support.clippers import OPTIONS
from tests.support.dtensors import SHAPES, Recorded, quick
from tests.support.rules import RULES

STEPS = 9


def gradients_at(step: int) -> dict[str, Tensor | None]:
    """Return all gradients: at some steps one has none, or all have, or one is not finite."""
    generator = torch.Generator().manual_seed(step)
    found: dict[str, Tensor | None] = {
        name: torch.randn(shape, generator=generator) * (1 + step % 4)
        for name, shape in SHAPES.items()
    }
    if step == 3:
        found["filters"] = None
    if step == 4:
        found = dict.fromkeys(SHAPES)
    if step == 6:
        found["vector"][-1] = math.nan  # on one rank alone
    return found


def part_of(layout: str, name: str, full: Tensor) -> Tensor | None:
    if layout == "alone" or name == COPY:
        return full
    return own_part(layout, [*SHAPES].index(name), full)


def stepped(layout: str, rule: str, options: dict[str, Any]) -> Any:
    """Take the steps with what this rank has; return what was found at each, and the weights."""
    generator = torch.Generator().manual_seed(99)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    parts = {name: part_of(layout, name, weight) for name, weight in weights.items()}
    named = {name: nn.Parameter(p.clone()) for name, p in parts.items() if p is not None}
    optimizer = torch.optim.SGD([*named.items()], lr=0.1, momentum=0.9)
    ranks = None if layout == "alone" else Ranks(replicated=COPY)
    clipper = GradientClipper(optimizer, RULES[rule](), ranks=ranks, **options)
    found, most = [], 0
    for step in range(STEPS):
        for name, gradient in gradients_at(step).items():
            if name in named:
                part = None if gradient is None else part_of(layout, name, gradient)
                named[name].grad = None if part is None else part.clone()
        with Recorded() as calls:
            optimizer.step()
        most = max(most, len(calls))
        last = clipper.last
        rows = zip(last.norms.tolist(), last.thresholds.tolist(), strict=True)
        found.append((dict(zip(clipper.labels, rows, strict=True)), bool(last.skipped)))
    return found, {name: p.detach() for name, p in named.items()}, clipper.state_dict(), most


def check(pool: Any, layout: str, rule: str, options: dict[str, Any]) -> None:
    needed, weights, _, _ = stepped("alone", rule, options)
    each = pool.run(stepped, layout, rule, options)
    parts = pool.run(parts_of, layout, weights)
    for (found, own, state, most), own_weights in zip(each, parts, strict=True):
        assert repr(state) == repr(each[0][2])  # equal on all ranks
        assert most == (2 if options.get("max_value") else 1)
        for (rows, skipped), (expected, expected_skipped) in zip(found, needed, strict=True):
            assert skipped == expected_skipped
            assert rows.keys() == expected.keys()
            for label, row in rows.items():
                assert row == pytest.approx(expected[label], rel=1e-6, nan_ok=True)
        for name, weight in own.items():
            torch.testing.assert_close(weight, own_weights[name], equal_nan=True)


def parts_of(layout: str, full: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: part_of(layout, name, tensor) for name, tensor in full.items()}


@pytest.mark.parametrize("scope", quick(["global", "parameter"], "parameter"))
@pytest.mark.parametrize("layout", quick(["stages", "shards 0"], "stages"))
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_decides_as_in_one_process(two_ranks, layout, rule, scope):
    check(two_ranks, layout, rule, {"scope": scope})


@pytest.mark.parametrize("options", OPTIONS)
def test_every_policy_acts_on_stages_as_in_one_process(ranks, options):
    check(ranks, "stages", "Fixed", OPTIONS[options])


@pytest.mark.parametrize("options", sorted({*OPTIONS} - {"unit"}))
def test_every_policy_acts_on_shards_as_in_one_process(ranks, options):
    check(ranks, "shards 0", "Fixed", OPTIONS[options])


def raised(layout: str) -> str:
    with pytest.raises(NonFiniteGradientError) as caught:
        stepped(layout, "Fixed", {"nonfinite": "raise"})
    return str(caught.value)


@pytest.mark.parametrize("layout", ["stages", "shards 0"])
def test_all_ranks_raise_and_name_what_is_on_one_of_them(two_ranks, layout):
    for message in two_ranks.run(raised, layout):
        assert "is nan at step 6, from these parameters: vector. The norms before: " in message


def logged(layout: str, on: int, many: int | str) -> Any:
    """Log on one rank; return what parameters had at the second step, and what there was to say."""
    sink = MemorySink(per_parameter=many)
    here = (distributed.is_initialized() and distributed.get_rank() == on) or layout == "alone"
    stepped(layout, "Fixed", {"log": sink if here else None})
    steps = [step for step in sink.steps if step.parameter_norms]
    return [{**step.parameter_norms} for step in steps], [step.incident for step in sink.steps]


@pytest.mark.parametrize("on", [0, 1])
@pytest.mark.parametrize("layout", ["stages", "shards 0"])
def test_the_log_of_one_rank_has_the_parameters_of_all(two_ranks, layout, on):
    needed, _ = logged("alone", on, "all")
    each = two_ranks.run(logged, layout, on, "all")
    assert each[1 - on] == ([], [])
    found, incidents = each[on]
    full = [{**dict.fromkeys(SHAPES, 0.0), **norms} for norms in needed]
    assert [norms for norms in found if any(norms.values())] == [
        pytest.approx(norms, rel=1e-6, nan_ok=True) for norms in full
    ]
    assert [each for each in incidents if each] == [
        "The norm was nan at step 6, from vector. The norms before: " + rest
        for each in incidents
        if each
        for rest in [each.partition("The norms before: ")[2]]
    ]
    assert any(incidents)

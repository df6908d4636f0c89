"""Norms of all gradients and of each index, on one rank and across ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor

from gradclip.errors import ArgumentError
from gradclip.gradients.buckets import Bucket, buckets_of
from gradclip.gradients.norms import measure_across_ranks, norms_of
from gradclip.ranks.groups import NormRanks, RankGroup
from gradclip.scopes.norm_indices import NOWHERE, NormIndices
from tests.support.reference import norm_of

CPU, META = torch.device("cpu"), torch.device("meta")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
every_order = pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])


class Pair(RankGroup):
    """Two ranks, of which the other one contributes the same as this one."""

    def reduced_(self, values: Tensor, order: float) -> Tensor:
        return values.clone() if order == math.inf else 2 * values


class Alone(RankGroup):
    """Two ranks, of which the other one contributes nothing."""

    def reduced_(self, values: Tensor, order: float) -> Tensor:
        return values


PAIR, OTHER_PAIR, ALONE = (
    kind(ranks, (), ("cpu",)) for kind, ranks in ((Pair, (0, 1)), (Pair, (0, 2)), (Alone, (0, 1)))
)


def indices_of(*indices: int, rows: bool = False) -> NormIndices:
    return NormIndices(torch.tensor(indices), rows)


def power_sum_of(gradients: Iterable[Tensor], order: float) -> float:
    """Return the power sum of all elements, of infinite order the largest."""
    norm = norm_of(gradients, order)
    return norm if order == math.inf else norm**order


def grouped_by_index(
    gradients: Sequence[Tensor], indices: list[int], count: int
) -> list[list[Tensor]]:
    pairs = list(zip(gradients, indices, strict=True))
    return [[gradient for gradient, of in pairs if of == index] for index in range(count)]


def approx(values: Iterable[float]) -> object:
    return pytest.approx([*values], rel=1e-7)


@pytest.mark.parametrize("engine", ["reference", "operators"])
@pytest.mark.parametrize("indices", [None, [0, 2, 0, 0, 1, 2]])
@pytest.mark.parametrize("kinds", [[F32], [F32, F64, BF16]])
@every_order
def test_each_norm_is_that_of_its_gradients(order, kinds, indices, engine):
    """Sums of single gradients come along if asked for, and change no bit of the norms."""
    gradients = [torch.randn(2, 9).to(kind) for kind in (6 * kinds)[:6]]
    norm_indices = None if indices is None else map(indices_of, indices)
    buckets, sums = buckets_of(gradients, order, norm_indices), []
    options = {"count": 1 if indices is None else 3, "engine": engine}
    norms = norms_of(buckets, order, **options)
    groups = grouped_by_index(gradients, indices or [0] * 6, options["count"])
    assert (norms.tolist(), norms.dtype) == (approx(norm_of(each, order) for each in groups), F64)
    assert torch.equal(norms_of(buckets, order, gradient_sums=sums, **options), norms)
    measured = [gradient for bucket in buckets for gradient in bucket.measured]
    assert torch.cat(sums).tolist() == approx(power_sum_of([each], order) for each in measured)
    if indices is None:
        for sums in (None, []):
            norm = norms_of(buckets, order, scalar=True, engine=engine, gradient_sums=sums)
            assert (norm.shape, norm.item()) == ((), norms.item())


@every_order
def test_rows_without_a_norm_do_not_count(order):
    """Neither in the norms nor in the sum of their gradient."""
    whole, rows = torch.randn(5), torch.randn(3, 4)
    indices = [indices_of(1), indices_of(1, NOWHERE, 0, rows=True)]
    buckets, sums = buckets_of([whole, rows], order, indices), []
    norms = norms_of(buckets, order, count=2, gradient_sums=sums)
    assert norms.tolist() == approx([norm_of([rows[2]], order), norm_of([whole, rows[0]], order)])
    needed = [power_sum_of([whole], order), power_sum_of([rows[0], rows[2]], order)]
    assert torch.cat(sums).tolist() == approx(needed)
    shared = measure_across_ranks(
        buckets,
        order,
        NormRanks(),
        count=2,
        device=CPU,
        engine="auto",
        parameters=((indices_of(0), indices_of(2)), 3),
    )
    assert torch.equal(shared.norms, norms)
    assert shared.parameter_sums.tolist() == approx([needed[0], 0.0, needed[1]])


def test_an_engine_that_does_not_exist_is_refused():
    of_pair = buckets_of([torch.ones(3)], 2.0)
    of_pair[0].group = PAIR
    both = [*buckets_of([torch.ones(3)], 2.0), *buckets_of([torch.ones(3, dtype=F64)], 2.0)]
    indexed = buckets_of([torch.ones(3)], 2.0, [indices_of(0)])
    for buckets in (both[:1], both, indexed, of_pair):
        with pytest.raises(ArgumentError, match="engine='none such' names no engine"):
            norms_of(buckets, 2.0, engine="none such")


@pytest.mark.parametrize("groups", [[], [PAIR]], ids=["here", "across"])
@pytest.mark.parametrize("count", [1, 2])
def test_norms_lie_with_the_first_gradient_or_where_asked(groups, count):
    """Without gradients each of them is 0."""
    norms = norms_of([], 2.0, count=count, groups=groups)
    assert (norms.tolist(), norms.dtype, norms.device) == ([0.0] * count, F64, CPU)
    assert norms_of([], 2.0, count=count, groups=groups, device=META).device == META
    assert norms_of([], 2.0, groups=groups).shape == (1,)
    assert norms_of([], 2.0, scalar=True, groups=groups).shape == ()
    on_meta = buckets_of([torch.ones(3, dtype=kind, device="meta") for kind in (F32, F64)], 2.0)
    assert norms_of(on_meta, 2.0, groups=groups).device == META
    here = buckets_of([torch.ones(3)], 2.0)
    assert norms_of(here, 2.0, groups=groups, device=META).device == META
    assert norms_of(here, 2.0, groups=groups).device == CPU


def test_without_float64_sums_meet_in_float32(monkeypatch):
    monkeypatch.setattr("gradclip.gradients.norms.norm_dtype", lambda device: {CPU: F32}[device])
    gradients = [torch.tensor([3.0]), torch.tensor([4.0], dtype=F64)]
    norms = norms_of(buckets_of(gradients, 2.0), 2.0)
    assert (norms.item(), norms.dtype) == (5.0, F32)
    assert norms_of([], 2.0).dtype == F32
    assert norms_of([], 2.0, groups=[PAIR]).dtype == F32


# Across ranks


def gradients_of_ranks() -> list[Tensor]:
    """Return gradients that are sharded (float32), copied (bfloat16) or here alone (float64)."""
    return [torch.randn(7).to(kind) for kind in (F32, F64, BF16, F32, F64)]


def buckets_of_ranks(
    gradients: Sequence[Tensor], order: float, indices: Iterable[NormIndices] | None = None
) -> list[Bucket]:
    buckets = buckets_of(gradients, order, indices)
    for bucket in buckets:
        dtype = bucket.measured[0].dtype
        bucket.group = None if dtype is F64 else PAIR
        bucket.counts = dtype is not BF16
    return buckets


def sum_of_ranks(gradients: Sequence[Tensor], order: float) -> float:
    """Return the power sum that both ranks measure: copies count on the other rank alone."""
    here = [gradient for gradient in gradients if gradient.dtype is not BF16]
    sharded = power_sum_of([gradient for gradient in here if gradient.dtype is F32], order)
    total = power_sum_of(here, order)
    return total if order == math.inf else total + sharded


def norm_of_ranks(gradients: Sequence[Tensor], order: float) -> float:
    return sum_of_ranks(gradients, order) ** (1 if order == math.inf else 1 / order)


@pytest.mark.parametrize(
    ("parameters", "weights", "present"), list(itertools.product([False, True], repeat=3))
)
@every_order
def test_ranks_measure_together(order, parameters, weights, present):
    """Norms, and what else is asked for, in the same vector."""
    gradients, indices = gradients_of_ranks(), [0, 2, 1, 0, 2]
    values, of_parameters = gradients_of_ranks(), [4, 0, 1, 4, 2]
    norm_indices = [indices_of(index) for index in indices]
    shared = measure_across_ranks(
        buckets_of_ranks(gradients, order, norm_indices),
        order,
        NormRanks((PAIR,)),
        count=3,
        device=CPU,
        engine="auto",
        parameters=(tuple(map(indices_of, of_parameters)), 6) if parameters else None,
        weights=buckets_of_ranks(values, order, norm_indices) if weights else None,
        present=torch.tensor([True, False, True]) if present else None,
    )

    def norms(tensors: list[Tensor]) -> object:
        return approx(norm_of_ranks(each, order) for each in grouped_by_index(tensors, indices, 3))

    assert shared.norms.tolist() == norms(gradients)
    if parameters:
        needed = (
            sum_of_ranks(each, order) for each in grouped_by_index(gradients, of_parameters, 6)
        )
        assert shared.parameter_sums.tolist() == approx(needed)
    if weights:
        assert shared.weight_norms.tolist() == norms(values)
    if present:
        assert shared.present.tolist() == [True, False, True]
    results = (shared.parameter_sums, shared.weight_norms, shared.present)
    assert [result is not None for result in results] == [parameters, weights, present]


@pytest.mark.parametrize("scalar", [True, False])
@every_order
def test_all_gradients_of_several_ranks_have_one_norm(order, scalar):
    gradients = gradients_of_ranks()
    norm = norms_of(buckets_of_ranks(gradients, order), order, scalar=scalar)
    assert (norm.shape, norm.dtype) == (() if scalar else (1,), F64)
    assert norm.item() == pytest.approx(norm_of_ranks(gradients, order), rel=1e-7)


@every_order
@pytest.mark.parametrize(
    "norm_ranks", [NormRanks(), NormRanks((), PAIR), NormRanks((), OTHER_PAIR)]
)
def test_a_group_within_the_ranks_around_it_needs_no_collective(order, norm_ranks):
    """Its gradients add up with those of all else; a bucket of all gradients has no positions."""
    gradients = [torch.randn(4), torch.randn(4)]
    buckets = buckets_of(gradients, order)
    assert not buckets[0].indices
    buckets[0].group = PAIR if norm_ranks.across else None
    options = {"count": 1, "device": CPU, "engine": "auto"}
    parameters = ((indices_of(2), indices_of(0)), 3)
    shared = measure_across_ranks(buckets, order, norm_ranks, parameters=parameters, **options)
    factor = 2 if norm_ranks.across and order < math.inf else 1
    first, second = (factor * power_sum_of([gradient], order) for gradient in gradients)
    assert shared.parameter_sums.tolist() == approx([second, 0.0, first])


@every_order
def test_a_rank_without_gradients_enters_the_collective(order):
    class Others(RankGroup):
        def reduced_(self, values: Tensor, order: float) -> Tensor:
            assert (values.tolist(), values.dtype) == ([0.0, 0.0], F64)
            return values + 16.0

    norms = norms_of([], order, count=2, groups=[Others((0, 1), (), ("cpu",))])
    assert norms.tolist() == approx([16.0 if order == math.inf else 16.0 ** (1 / order)] * 2)


def test_each_group_of_ranks_has_its_collective():
    buckets = buckets_of_ranks([torch.tensor([1.0]), torch.tensor([2.0], dtype=F64)], 1.0)
    buckets[1].group = OTHER_PAIR
    assert norms_of(buckets, 1.0).item() == 2 * 1 + 2 * 2


@pytest.mark.parametrize("norm_ranks", [NormRanks((PAIR,)), NormRanks((), PAIR)])
def test_results_of_ranks_are_float64_on_the_device_asked_for(norm_ranks):
    options = {"count": 1, "device": META, "engine": "auto"}
    parameters = ((indices_of(0),) * 5, 1)
    for buckets in (buckets_of_ranks(gradients_of_ranks(), 2.0), []):
        shared = measure_across_ranks(buckets, 2.0, norm_ranks, parameters=parameters, **options)
        for vector in (shared.norms, shared.parameter_sums):
            assert (vector.device, vector.dtype, vector.shape) == (META, F64, (1,))


def test_a_norm_is_present_if_one_rank_has_a_gradient():
    present, options = torch.tensor([True, False]), {"count": 2, "device": CPU, "engine": "auto"}
    for group in (PAIR, ALONE):
        shared = measure_across_ranks([], 2.0, NormRanks((group,)), present=present, **options)
        assert shared.present.tolist() == [True, False]

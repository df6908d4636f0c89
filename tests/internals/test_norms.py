"""Norms of all gradients and of each norm index, on one rank and across ranks."""

import itertools
import math
from collections.abc import Iterable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradclip.errors import ArgumentError
from gradclip.gradients.buckets import Bucket, buckets_of
from gradclip.gradients.norms import SharedNorms, measure_across_ranks, norms_of
from gradclip.ranks.groups import NormRanks, RankGroup
from gradclip.scopes.norm_indices import (
    NOWHERE,
    NormIndices,
    present_norms,
    row_values,
    sums_by_norm,
)
from tests.support.engines import vector
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
    return NormIndices(torch.tensor(indices, dtype=torch.int64), rows)


def measured(
    buckets: Sequence[Bucket], order: float, *ranks: object, count: int = 1, **options: object
) -> SharedNorms:
    options = {"count": count, "device": CPU, "engine": "auto", **options}
    return measure_across_ranks(buckets, order, NormRanks(*ranks), **options)


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
    parameters = ((indices_of(0), indices_of(2)), 3)
    shared = measured(buckets, order, count=2, parameters=parameters)
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


@given(
    st.lists(st.lists(st.integers(NOWHERE, 4), max_size=4), max_size=4),
    st.sampled_from([1.0, 2.0, 3.0, math.inf]),
    st.randoms(use_true_random=False),
)
def test_sums_and_values_find_their_norms(indices, order, random):
    """Rows in no norm enter none, and get the other value."""
    norm_indices = tuple(indices_of(*each, rows=True) for each in indices)
    flat = [index for each in indices for index in each]
    sums = vector(*(random.random() for _ in flat))
    found = sums_by_norm(sums.clone(), order, norm_indices, 5)
    for norm in range(5):
        parts = [s for s, index in zip(sums.tolist(), flat, strict=True) if index == norm]
        needed = max(parts, default=0.0) if order == math.inf else math.fsum(parts)
        assert found[norm].item() == pytest.approx(needed, rel=1e-12)
    present = present_norms(norm_indices, 5, CPU)
    assert present.tolist() == [norm in flat for norm in range(5)]
    needed = [7.0 if index == NOWHERE else float(index) for index in flat]
    assert row_values(torch.arange(5.0), norm_indices, 7.0).tolist() == needed


def test_one_row_for_each_norm_in_order_is_the_very_tensor():
    """Not where there are more norms, or fewer rows."""
    values, norm_indices = vector(1, 4, 9), (indices_of(0, rows=True), indices_of(1, 2, rows=True))
    assert row_values(values, norm_indices, 1.0) is values
    assert sums_by_norm(values, 2.0, norm_indices, 3) is values
    assert sums_by_norm(values, 2.0, norm_indices, 4).tolist() == [1.0, 4.0, 9.0, 0.0]
    assert row_values(vector(1, 2, 3, 4), norm_indices, 1.0).tolist() == [1.0, 2.0, 3.0]


def test_indices_go_to_the_device_of_the_values_of_which_none_is_read():
    norm_indices = (indices_of(0, NOWHERE, rows=True), indices_of(2, 0, rows=True))
    values = torch.empty(4, dtype=F64, device=META)
    assert sums_by_norm(values, 2.0, norm_indices, 3).shape == (3,)
    assert row_values(values[:3], norm_indices, 1.0).shape == (4,)
    assert present_norms(norm_indices, 3, META).shape == (3,)


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
    ("parameters", "weights", "present"), [*itertools.product([False, True], repeat=3)]
)
@every_order
def test_ranks_measure_together(order, parameters, weights, present):
    """Norms, and what else is asked for, in the same vector."""
    gradients, indices = gradients_of_ranks(), [0, 2, 1, 0, 2]
    values, of_parameters = gradients_of_ranks(), [4, 0, 1, 4, 2]
    norm_indices = [indices_of(index) for index in indices]
    shared = measured(
        buckets_of_ranks(gradients, order, norm_indices),
        order,
        (PAIR,),
        count=3,
        parameters=(tuple(map(indices_of, of_parameters)), 6) if parameters else None,
        weights=buckets_of_ranks(values, order, norm_indices) if weights else None,
        present=torch.tensor([True, False, True]) if present else None,
    )

    def norms(tensors: list[Tensor]) -> object:
        return approx(norm_of_ranks(each, order) for each in grouped_by_index(tensors, indices, 3))

    assert shared.norms.tolist() == norms(gradients)
    if parameters:
        parts = grouped_by_index(gradients, of_parameters, 6)
        assert shared.parameter_sums.tolist() == approx(sum_of_ranks(part, order) for part in parts)
    if weights:
        assert shared.weight_norms.tolist() == norms(values)
    if present:
        assert shared.present.tolist() == [True, False, True]
    results = (shared.parameter_sums, shared.weight_norms, shared.present)
    assert [result is not None for result in results] == [parameters, weights, present]


@every_order
@pytest.mark.parametrize("around", [None, PAIR, OTHER_PAIR])
def test_a_group_within_the_ranks_around_it_needs_no_collective(order, around):
    """Its gradients add up with those of all else; a bucket of all gradients has no positions."""
    gradients = [torch.randn(4), torch.randn(4)]
    buckets = buckets_of(gradients, order)
    assert not buckets[0].indices
    buckets[0].group = around and PAIR
    shared = measured(buckets, order, (), around, parameters=((indices_of(2), indices_of(0)), 3))
    factor = 2 if around and order < math.inf else 1
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


@every_order
def test_each_group_of_ranks_has_its_collective(order):
    gradients = gradients_of_ranks()
    buckets = buckets_of_ranks(gradients, order)
    assert norms_of(buckets, order).tolist() == approx([norm_of_ranks(gradients, order)])
    buckets[1].group = OTHER_PAIR
    norm, sums = norms_of(buckets, order, scalar=True), [sum_of_ranks(gradients, order)]
    sums.append(power_sum_of(gradients[1::3], order))  # once more, from the other rank
    total = max(sums) if order == math.inf else sum(sums) ** (1 / order)
    assert (norm.shape, norm.item()) == ((), pytest.approx(total, rel=1e-7))


@pytest.mark.parametrize("ranks", [((PAIR,),), ((), PAIR)])
def test_results_of_ranks_are_float64_on_the_device_asked_for(ranks):
    parameters = ((indices_of(0),) * 5, 1)
    for buckets in (buckets_of_ranks(gradients_of_ranks(), 2.0), []):
        shared = measured(buckets, 2.0, *ranks, device=META, parameters=parameters)
        for values in (shared.norms, shared.parameter_sums):
            assert (values.device, values.dtype, values.shape) == (META, F64, (1,))


def test_a_norm_is_present_if_one_rank_has_a_gradient():
    for group in (PAIR, ALONE):
        shared = measured([], 2.0, (group,), count=2, present=torch.tensor([True, False]))
        assert shared.present.tolist() == [True, False]

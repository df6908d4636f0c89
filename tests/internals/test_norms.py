"""Norms of all gradients and of each label, of those on other ranks as well."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from gradclip.errors import ArgumentError
from gradclip.gradients.buckets import Bucket, buckets_of
from gradclip.gradients.norms import measure_across_ranks, norms_of
from gradclip.ranks.groups import NormRanks, RankGroup
from gradclip.scopes.norm_indices import NOWHERE, NormIndices

CPU, META = torch.device("cpu"), torch.device("meta")
ORDERS = [1.0, 2.0, 3.0, math.inf]


class Pair(RankGroup):
    """Two ranks, of which the other one has found the same as this one."""

    def reduced_(self, values: Tensor, order: float) -> Tensor:
        return values.clone() if order == math.inf else 2 * values


PAIR, OTHER_PAIR = Pair((0, 1), (), ("cpu",)), Pair((0, 2), (), ("cpu",))


def indices_of(*indices: int, rows: bool = False) -> NormIndices:
    return NormIndices(torch.tensor(indices), rows)


def power_sum(gradients: list[Tensor], order: float) -> float:
    """Return the power sum of all elements, of infinite order the largest."""
    elements = torch.cat([torch.zeros(1), *(g.double().flatten().abs() for g in gradients)])
    return (elements.amax() if order == math.inf else elements.pow(order).sum()).item()


def root(power_sum: float, order: float) -> float:
    return power_sum if order == math.inf else power_sum ** (1 / order)


def norm(gradients: list[Tensor], order: float) -> float:
    return root(power_sum(gradients, order), order)


def by_label(gradients: list[Tensor], labels: list[int], count: int) -> list[list[Tensor]]:
    pairs = list(zip(gradients, labels, strict=True))
    return [[gradient for gradient, of in pairs if of == label] for label in range(count)]


def approx(values: list[float]) -> object:
    return pytest.approx(values, rel=1e-7)


@pytest.mark.parametrize("engine", ["reference", "operators"])
@pytest.mark.parametrize("order", ORDERS)
def test_each_label_has_the_norm_of_its_gradients(engine, order):
    kinds = [torch.float32, torch.float64, torch.float32, torch.bfloat16]
    gradients = [torch.randn(50).to(kind) for kind in kinds]
    labels = [2, 0, 0, 2]
    buckets = buckets_of(gradients, order, map(indices_of, labels))
    found = norms_of(buckets, order, count=3, engine=engine)
    needed = [norm(each, order) for each in by_label(gradients, labels, 3)]
    assert found.tolist() == approx(needed)


@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("kinds", [["float32"], ["float32", "float64", "bfloat16"]])
@pytest.mark.parametrize("order", ORDERS)
def test_without_norm_indices_all_gradients_have_one_norm(order, kinds, scalar):
    gradients = [torch.randn(2, 9).to(getattr(torch, kind)) for kind in 2 * kinds]
    buckets = buckets_of(gradients, order)
    assert len(buckets) == len(kinds)
    found = norms_of(buckets, order, scalar=scalar)
    assert (found.shape, found.dtype) == (() if scalar else (1,), torch.float64)
    assert found.item() == pytest.approx(norm(gradients, order), rel=1e-7)
    parts: list[Tensor] = []
    beside = norms_of(buckets, order, scalar=scalar, gradient_sums=parts)
    assert torch.equal(beside, found)
    needed = [power_sum([each], order) for bucket in buckets for each in bucket.measured]
    assert torch.cat(parts).tolist() == approx(needed)


@pytest.mark.parametrize("order", ORDERS)
def test_the_parts_of_labels_are_the_sums_of_the_gradients(order):
    """Of one with rows those of its rows that have a label."""
    whole, rows = torch.randn(5), torch.randn(3, 4)
    norm_indices = [indices_of(1), indices_of(1, NOWHERE, 0, rows=True)]
    buckets, parts = buckets_of([whole, rows], order, norm_indices), []
    found = norms_of(buckets, order, count=2, gradient_sums=parts)
    assert found.tolist() == approx([norm([rows[2]], order), norm([whole, rows[0]], order)])
    needed = [power_sum([whole], order), power_sum([rows[0], rows[2]], order)]
    assert torch.cat(parts).tolist() == approx(needed)


def test_an_engine_that_does_not_exist_is_refused():
    gradient, of_pair = torch.ones(3), buckets_of([torch.ones(3)], 2.0)
    of_pair[0].group = PAIR
    both = [*buckets_of([gradient], 2.0), *buckets_of([gradient.double()], 2.0)]
    for buckets in (both[:1], both, buckets_of([gradient], 2.0, [indices_of(0)]), of_pair):
        with pytest.raises(ArgumentError, match="engine='none such' names no engine"):
            norms_of(buckets, 2.0, engine="none such")


@pytest.mark.parametrize("count", [1, 2])
def test_without_gradients_every_norm_is_zero(count):
    found = norms_of([], 2.0, count=count)
    assert found.tolist() == [0.0] * count
    assert found.dtype == torch.float64
    assert norms_of([], 2.0, count=count, device=META).device == META
    assert norms_of([], 2.0).shape == (1,)
    assert norms_of([], 2.0, scalar=True).shape == ()


@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_the_others(order, bad):
    gradients = [torch.tensor([1.0, bad]), torch.tensor([2.0])]
    found = norms_of(buckets_of(gradients, order, [indices_of(0), indices_of(1)]), order, count=2)
    assert not math.isfinite(found[0].item())
    assert found[1].item() == 2.0


def test_norms_are_float64_on_the_device_asked_for():
    buckets = buckets_of([torch.ones(3)], 2.0)
    assert norms_of(buckets, 2.0).dtype == torch.float64
    assert norms_of(buckets, 2.0, device=META).device == META


@pytest.mark.parametrize("groups", [[], [PAIR]], ids=["here", "over ranks"])
def test_norms_are_where_the_first_gradients_are(groups):
    on_meta = [torch.ones(3, dtype=kind, device="meta") for kind in (torch.float32, torch.float64)]
    assert norms_of(buckets_of(on_meta, 2.0), 2.0, groups=groups).device == META
    assert norms_of([], 2.0, groups=groups).device == CPU
    here = buckets_of([torch.ones(3)], 2.0)
    assert norms_of(here, 2.0, groups=groups, device=META).device == META


def test_where_the_device_has_no_float64_sums_meet_in_float32(monkeypatch):
    monkeypatch.setattr(
        "gradclip.gradients.norms.norm_dtype", lambda device: {CPU: torch.float32}[device]
    )
    gradients = [torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)]
    found = norms_of(buckets_of(gradients, 2.0), 2.0)
    assert (found.item(), found.dtype) == (5.0, torch.float32)
    assert norms_of([], 2.0).dtype == torch.float32
    assert norms_of([], 2.0, groups=[PAIR]).dtype == torch.float32


# Over ranks


def spread_buckets(
    gradients: list[Tensor], order: float, norm_indices: Iterable[NormIndices] | None = None
) -> list[Bucket]:
    """Sort gradients.

    Those of float32 are spread over two ranks, those of bfloat16 are copies that do not count here,
    others are on no other rank.
    """
    buckets = buckets_of(gradients, order, norm_indices)
    for bucket in buckets:
        dtype = bucket.measured[0].dtype
        bucket.group = None if dtype is torch.float64 else PAIR
        bucket.counts = dtype is not torch.bfloat16
    return buckets


def needed_over_ranks(gradients: list[Tensor], order: float) -> float:
    """Return the power sum that two ranks find together of some gradients."""
    counted = [each for each in gradients if each.dtype is not torch.bfloat16]
    both = [each for each in counted if each.dtype is torch.float32]
    return power_sum([*counted, *(both if order < math.inf else ())], order)


def needed_norm(gradients: list[Tensor], order: float) -> float:
    return root(needed_over_ranks(gradients, order), order)


def three_kinds() -> list[Tensor]:
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float64]
    return [torch.randn(7).to(kind) for kind in kinds]


@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_all_gradients_of_several_ranks_have_one_norm(order, scalar):
    gradients = three_kinds()
    found = norms_of(spread_buckets(gradients, order), order, scalar=scalar)
    assert (found.shape, found.dtype) == (() if scalar else (1,), torch.float64)
    assert found.item() == pytest.approx(needed_norm(gradients, order), rel=1e-7)


@pytest.mark.parametrize("order", ORDERS)
def test_each_label_has_the_norm_of_several_ranks(order):
    gradients, labels = three_kinds(), [3, 3, 0, 0, 1]
    found = norms_of(spread_buckets(gradients, order, map(indices_of, labels)), order, count=4)
    needed = [needed_norm(each, order) for each in by_label(gradients, labels, 4)]
    assert found.tolist() == approx(needed)


@pytest.mark.parametrize("order", ORDERS)
def test_a_rank_without_gradients_enters_the_collective(order):
    class SilentGroup(RankGroup):
        def reduced_(self, values: Tensor, order: float) -> Tensor:
            assert (values.tolist(), values.dtype) == ([0.0, 0.0], torch.float64)
            return values + 16.0

    found = norms_of([], order, count=2, groups=[SilentGroup((0, 1), (), ("cpu",))])
    assert found.tolist() == approx([root(16.0, order)] * 2)


def test_gradients_of_several_groups_of_ranks_are_told_apart():
    gradients = [torch.tensor([1.0]), torch.tensor([2.0], dtype=torch.float64)]
    buckets = spread_buckets(gradients, 1.0)
    buckets[1].group = OTHER_PAIR
    assert norms_of(buckets, 1.0).item() == 2 * 1 + 2 * 2


@pytest.mark.parametrize(
    ("parts", "weights", "present"), list(itertools.product([False, True], repeat=3))
)
@pytest.mark.parametrize("order", ORDERS)
def test_ranks_tell_what_they_are_asked_for(order, parts, weights, present):
    gradients, labels = three_kinds(), [0, 2, 1, 0, 2]
    held, of_parameters = three_kinds(), [4, 0, 1, 4, 2]
    norm_indices = [indices_of(label) for label in labels]
    found = measure_across_ranks(
        spread_buckets(gradients, order, norm_indices),
        order,
        NormRanks((PAIR,)),
        count=3,
        device=CPU,
        engine="auto",
        parameters=(tuple(map(indices_of, of_parameters)), 6) if parts else None,
        weights=spread_buckets(held, order, norm_indices) if weights else None,
        present=torch.tensor([True, False, True]) if present else None,
    )

    def norms(tensors: list[Tensor]) -> list[float]:
        return [needed_norm(each, order) for each in by_label(tensors, labels, 3)]

    assert found.norms.tolist() == approx(norms(gradients))
    if parts:
        of_parameter = by_label(gradients, of_parameters, 6)
        needed = [needed_over_ranks(each, order) for each in of_parameter]
        assert found.parameter_sums.tolist() == approx(needed)
    if weights:
        assert found.weight_norms.tolist() == approx(norms(held))
    if present:
        assert found.present.tolist() == [True, False, True]
    given = [each is not None for each in (found.parameter_sums, found.weight_norms, found.present)]
    assert given == [parts, weights, present]


@pytest.mark.parametrize("order", ORDERS)
def test_the_parts_over_ranks_of_gradients_with_one_norm(order):
    gradients = [torch.randn(4), torch.randn(4)]
    parameters = (indices_of(2), indices_of(0))
    for norm_ranks, factor in (
        (NormRanks(), 1),
        (NormRanks((), PAIR), 2),
        (NormRanks((), OTHER_PAIR), 2),
    ):
        buckets = buckets_of(gradients, order)
        assert not buckets[0].indices  # these are all
        buckets[0].group = PAIR if norm_ranks.across else None  # a group within the ranks around it
        found = measure_across_ranks(
            buckets,
            order,
            norm_ranks,
            count=1,
            device=CPU,
            engine="auto",
            parameters=(parameters, 3),
        )
        factor = 1 if order == math.inf else factor
        sums = [factor * power_sum([gradient], order) for gradient in gradients]
        assert found.parameter_sums.tolist() == approx([sums[1], 0.0, sums[0]])


@pytest.mark.parametrize("order", ORDERS)
def test_the_parts_of_rows_over_ranks_are_the_sums_of_their_gradients(order):
    rows, norm_indices = torch.randn(3, 4), [indices_of(1, NOWHERE, 0, rows=True)]
    buckets = buckets_of([rows], order, norm_indices)
    found = measure_across_ranks(
        buckets,
        order,
        NormRanks(),
        count=2,
        device=CPU,
        engine="auto",
        parameters=((indices_of(1),), 2),
    )
    assert found.norms.tolist() == approx([norm([rows[2]], order), norm([rows[0]], order)])
    assert found.parameter_sums.tolist() == approx([0.0, power_sum([rows[0], rows[2]], order)])


@pytest.mark.parametrize(
    "norm_ranks", [NormRanks((PAIR,)), NormRanks((), PAIR)], ids=["groups", "across"]
)
def test_what_ranks_find_is_float64_on_the_device_asked_for(norm_ranks):
    gradients = three_kinds()
    for buckets in (spread_buckets(gradients, 2.0), []):
        found = measure_across_ranks(
            buckets,
            2.0,
            norm_ranks,
            count=1,
            device=META,
            engine="auto",
            parameters=((indices_of(0),) * 5, 1),
        )
        for each in (found.norms, found.parameter_sums):
            assert (each.device, each.dtype, each.shape) == (META, torch.float64, (1,))


def test_a_norm_has_a_gradient_where_one_rank_has_it():
    class Lonely(RankGroup):
        """Two ranks, of which the other one has found nothing."""

        def reduced_(self, values: Tensor, order: float) -> Tensor:
            return values

    present, options = torch.tensor([True, False]), {"count": 2, "device": CPU, "engine": "auto"}
    for group in (PAIR, Lonely((0, 1), (), ("cpu",))):
        found = measure_across_ranks([], 2.0, NormRanks((group,)), present=present, **options)
        assert found.present.tolist() == [True, False]

"""The contract of rows that are clipped in one pass, to limits that the norms of weights set."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gradclip.engines.base import Engine, RelativeLimit, TensorList, root
from gradclip.gradients.coefficients import clip_coefficients
from gradclip.thresholds import RelativeToWeights, StepContext
from tests.support.engines import (
    INTERPRETED,
    LEVELS,
    OLDER,
    ORDERS,
    assert_scaled,
    bits,
    channels_last,
    denormals_flushed,
    random,
    vector,
)

ONE_PASS = [pytest.param(name, marks=pytest.mark.slow if name in OLDER else ()) for name in LEVELS]
ONE_PASS += [pytest.param("triton on cuda", marks=pytest.mark.cuda)]
if INTERPRETED:
    ONE_PASS = [pytest.param("triton", marks=pytest.mark.interpreted)]
by_rows = pytest.mark.parametrize("rows", [True, False], ids=["rows", "tensors"])
RULE = RelativeToWeights(0.7, 0.4, cap=30.0, floor=0.2)
"""About half of the rows below are above its limit; some are at the floor, at the cap or at eps."""

PLAIN = {
    "matrices": lambda dtype: [random(6, 5, 2, dtype=dtype), random(3, 7, dtype=dtype)],
    "one row each": lambda dtype: [random(9, dtype=dtype), torch.tensor(-3.7, dtype=dtype)],
    "rows of nothing": lambda dtype: [torch.empty(4, 0, dtype=dtype), random(2, 2, dtype=dtype)],
    "blocks": lambda dtype: [random(3, 700, dtype=dtype), random(5, 33, dtype=dtype)],
    "channels last": lambda dtype: [channels_last(4, 3, 5, 5, dtype=dtype)[1:]],
    "rows apart": lambda dtype: [random(6, 9, dtype=dtype)[1:, :7]],
    "large": lambda dtype: [random(3 if INTERPRETED else 90, 3000, dtype=dtype)],
    "longer than a piece": lambda dtype: [random(3, 40_000, dtype=dtype), random(5, dtype=dtype)],
}
"""Native threads share the last two; the kernels leave the last one to the other verbs."""
REFUSED = {
    "nothing": list,
    "a missing one": lambda: [random(2), None],
    "a number": lambda: [random(2), 1.0],
    "two dtypes": lambda: [random(2), random(2, dtype=torch.float64)],
    "integers": lambda: [torch.ones(2, dtype=torch.int32)],
    "complex": lambda: [torch.ones(2, dtype=torch.complex64)],
    "sparse": lambda: [random(2, 2).to_sparse()],
    "no memory": lambda: [torch.empty(2, device="meta")],
    "one object twice": lambda: [random(3)] * 2,
    "one memory twice": lambda: [tensor := random(4, 6), tensor.view(6, 4)],
    "transposed": lambda: [random(5, 6).t()],
    "expanded rows": lambda: [random(1, 6).expand(5, 6)],
    "windows": lambda: [random(30).as_strided((4, 6), (3, 1))],
    "a subclass": lambda: [random(2).as_subclass(type("Masked", (Tensor,), {}))],
}


pytestmark = pytest.mark.parametrize("engine", ONE_PASS, indirect=True)


@pytest.fixture(autouse=True)
def one_pass(engine) -> None:
    if engine.name == "native" and engine._walk is None:
        pytest.skip("this version of torch has no exchange interface of DLPack")


class Prepared:
    """Gradients beside their weights, which an engine has accepted."""

    def __init__(
        self, engine: Engine, make: Callable[[], list[Tensor]], order=2.0, *, rows=True
    ) -> None:
        self.gradients, self.weights = TensorList(make()), TensorList(map(nn.Parameter, make()))
        self.order, self.rows, self._engine = order, rows, engine
        self.count = engine.prepare_rows(self.gradients, self.weights, order, rows=rows)

    def clip(self, limit: RelativeLimit, *, erase: bool = False, write: bool = True) -> Tensor:
        given = self.gradients, self.weights, self.order, limit
        return self._engine.clip_rows_(*given, erase=erase, write=write)

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """The norms of all rows, by the engine's other verbs."""
        sums = [
            self._engine.power_sums(
                [one.detach() if wide else one.detach().reshape(1, -1)], self.order, rows=True
            )
            for one in tensors
            for wide in [self.rows and one.dim() > 1]
        ]
        together = torch.cat(sums)
        return together if self.order == math.inf else root(together, self.order)

    def parts(self) -> list[Tensor]:
        """All rows of the gradients."""
        return [
            row
            for tensor in self.gradients
            for row in (tensor if self.rows and tensor.dim() > 1 else [tensor])
        ]


@by_rows
@pytest.mark.parametrize("order", ORDERS)
def test_rows_above_the_limit_of_their_weights_are_scaled(engine, dtype, order, rows):
    """Norms and limits are those of the other verbs and of the rule, but for the root's last bit;
    no other row and no weight is written."""
    for make in PLAIN.values():
        prepared = Prepared(engine, partial(make, dtype), order, rows=rows)
        if not prepared.count:
            assert engine.name == "triton" or not (rows or prepared.gradients[0].is_contiguous())
            continue
        norms, weight_norms = prepared.norms(prepared.gradients), prepared.norms(prepared.weights)
        before = [row.clone() for row in prepared.parts()]
        versions = [tensor._version for tensor in prepared.gradients]
        weights = [bits(weight) for weight in prepared.weights]
        measured = prepared.clip(RULE.relative_limit, write=False)
        assert all(map(torch.equal, map(bits, prepared.parts()), map(bits, before)))
        assert [tensor._version for tensor in prepared.gradients] == versions
        results = prepared.clip(RULE.relative_limit)
        assert torch.equal(results, measured)
        assert results.shape == (3, prepared.count)
        limits = RULE.thresholds(norms, StepContext(0, norms >= 0, order, weight_norms))
        torch.testing.assert_close(results[:2], torch.stack([norms, limits]), rtol=1e-14, atol=0)
        assert torch.equal(results[2], clip_coefficients(results[0], results[1], erase=False))
        for row, original, coefficient in zip(prepared.parts(), before, results[2], strict=True):
            assert_scaled(row, original, coefficient)
            assert coefficient < 1 or torch.equal(bits(row), bits(original))
        assert all(map(torch.equal, map(bits, prepared.weights), weights))


@by_rows
def test_only_tensors_with_a_row_above_its_limit_are_written(engine, rewritten, rows):
    def make():
        return [torch.full((2, 30), 0.5), torch.full((2, 30), 2.0), torch.full((20,), 0.5)]

    prepared = Prepared(engine, make, math.inf, rows=rows)
    with torch.no_grad():
        for weight in prepared.weights:
            weight.fill_(1.0)
    versions = [tensor._version for tensor in prepared.gradients]
    rewritten.forget()
    prepared.clip(RelativeLimit(1.0, 1e-3), erase=True)
    written = map(rewritten, prepared.gradients, versions)
    assert [*written] == [False, True, False] or not prepared.gradients[0].is_cpu
    assert prepared.gradients[1]._version > versions[1]
    assert [tensor.unique().item() for tensor in prepared.gradients] == [0.5, 1.0, 0.5]


@pytest.mark.parametrize("erase", [False, True])
@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_erased_or_stays(engine, dtype, spoilt, erase):
    """One whose weights are not finite has no limit, or the cap."""

    def make():
        return [torch.ones(4, 40, dtype=dtype)]

    prepared = Prepared(engine, make)
    prepared.gradients[0][1, 3] = spoilt
    with torch.no_grad():
        prepared.weights[0][2, 5] = spoilt
    norms, limits, coefficients = prepared.clip(RelativeLimit(0.5, 1e-3), erase=erase)
    assert coefficients.tolist() == pytest.approx([0.5, 0 if erase else 1, 1, 0.5], rel=1e-6)
    assert norms.isfinite().tolist() == [True, False, True, True]
    assert not limits[2] < math.inf
    row = prepared.gradients[0][1].float()
    assert row.tolist() == [0.0] * 40 if erase else row.isnan().any() or row.isinf().any()
    assert prepared.gradients[0][2].tolist() == [1.0] * 40


def test_factor_eps_floor_and_cap_are_not_rounded_to_float32(engine):
    for limit in (
        RelativeLimit(0.1, 1e-3),
        RelativeLimit(0.0, 1.0, 0.1),
        RelativeLimit(7, 1, 0, 0.1),
    ):
        prepared = Prepared(engine, lambda: [torch.ones(2, 1, dtype=torch.float64)])
        results = prepared.clip(limit)
        assert results.tolist() == [[1.0] * 2, [0.1] * 2, [0.1] * 2]
        assert prepared.gradients[0].tolist() == [[0.1]] * 2
    prepared = Prepared(engine, lambda: [torch.zeros(1, 1)])
    assert prepared.clip(RelativeLimit(0.3, 0.1)).flatten().tolist() == [0.0, 0.3 * 0.1, 1.0]


def test_prepared_rows_are_multiplied(engine, dtype):
    prepared = Prepared(engine, lambda: PLAIN["matrices"](dtype))
    before = [row.clone() for row in prepared.parts()]
    coefficients = vector(0.5, 1.0, 0.0, 0.3, 1.0, 1e-5, 1.0, 0.5, 0.0)
    engine.scale_rows_(prepared.gradients, coefficients)
    for row, original, coefficient in zip(prepared.parts(), before, coefficients, strict=True):
        assert_scaled(row, original, coefficient)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float64], ids=str)
def test_weights_may_be_of_another_dtype(engine, narrow):
    gradients, weights = TensorList([random(5, 20)]), TensorList([random(5, 20, dtype=narrow)])
    assert engine.prepare_rows(gradients, weights, 2.0, rows=True) == 5
    results = engine.clip_rows_(
        gradients, weights, 2.0, RelativeLimit(0.1, 1e-3), erase=False, write=True
    )
    needed = weights[0].double().norm(dim=1) * 0.1
    assert results[1].tolist() == pytest.approx(needed.tolist(), rel=1e-6)
    assert gradients[0].double().norm(dim=1).tolist() == pytest.approx(needed.tolist(), rel=1e-6)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_bits_depend_on_values_alone(engine, dtype, start):
    """Not on where a row begins, nor on the number of threads."""
    name = "blocks" if INTERPRETED else "longer than a piece"
    values, weights = PLAIN[name](dtype), PLAIN[name](dtype)

    def clipped(offset: int, threads: int) -> list[Tensor]:
        def moved(tensors: list[Tensor]) -> TensorList:
            buffers = [torch.empty(offset + one.numel(), dtype=dtype) for one in tensors]
            pairs = zip(buffers, tensors, strict=True)
            return TensorList(buffer[offset:].view(one.shape).copy_(one) for buffer, one in pairs)

        gradients, beside = moved(values), moved(weights)
        torch.set_num_threads(threads)
        assert engine.prepare_rows(gradients, beside, 2.0, rows=True)
        limit = RelativeLimit(0.9, 1e-3)
        results = engine.clip_rows_(gradients, beside, 2.0, limit, erase=True, write=True)
        return [results, *gradients]

    before = torch.get_num_threads()
    try:
        assert all(map(torch.equal, clipped(start, start), clipped(0, 1)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_other_tensors_are_left_to_the_other_verbs(engine, make):
    """As gradients and as weights."""
    for pair in ((make(), make()), ([random(2)], make()), (make(), [random(2)])):
        assert engine.prepare_rows(*map(TensorList, pair), 2.0, rows=True) == 0


@by_rows
def test_weights_of_other_shapes_are_refused(engine, rows):
    for shape in ((3, 5), (2, 6), (6,)):
        pair = TensorList([random(2, 5)]), TensorList([random(*shape)])
        assert engine.prepare_rows(*pair, 2.0, rows=rows) == 0
    two, one = [random(2, 5), random(2, 5)], [random(2, 5)]
    for pair in ((two, one), (one, two)):
        assert engine.prepare_rows(*map(TensorList, pair), 2.0, rows=rows) == 0


@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])
def test_limits_and_coefficients_may_be_denormal(engine, flush):
    prepared = Prepared(engine, lambda: [torch.full((1, 4), 1e-3, dtype=torch.float64)])
    with denormals_flushed(flush and engine.name == "native"):
        results = prepared.clip(RelativeLimit(1e-310, 1.0))
    assert results[1:].flatten().tolist() == pytest.approx([1e-310, 5e-308], rel=1e-6, abs=0)
    assert prepared.gradients[0].tolist() == [[pytest.approx(5e-311, rel=1e-6, abs=0)] * 4]

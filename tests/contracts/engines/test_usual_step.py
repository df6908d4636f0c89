"""The contract of the usual step: plain gradients on the CPU, looked at once, with one norm."""

import ctypes
import math

import pytest
import torch
from torch import nn

from gradclip.engines.base import Engine, TensorList
from tests.support.engines import (
    ORDERS,
    REGISTRY,
    assert_scaled,
    channels_last,
    denormals_flushed,
    power_sum,
    random,
    storage,
)


class Masked(torch.Tensor):
    """A tensor of another type, whose memory says nothing of its values."""


PLAIN = {
    "0-d": lambda dtype: [torch.tensor(-3.7, dtype=dtype)],
    "an empty one": lambda dtype: [torch.empty(0, 3, dtype=dtype)],
    "empty ones beside": lambda dtype: [random(n, dtype=dtype) for n in (0, 5, 0, 3)],
    "matrices": lambda dtype: [random(5, 7, dtype=dtype), random(3, 2, dtype=dtype)],
    "a size of 1": lambda dtype: [random(4, 1, 3, dtype=dtype).as_strided((4, 1, 3), (3, 99, 1))],
    "transposed": lambda dtype: [random(30, 20, dtype=dtype).t(), random(2, 3, 4, dtype=dtype).mT],
    "channels last": lambda dtype: [channels_last(4, 3, 5, 5, dtype=dtype)],
    "neighbours in memory": lambda dtype: [*random(12, dtype=dtype).split(4)],
    "misaligned": lambda dtype: [random(41, dtype=dtype)[1:]],
    "with a history": lambda dtype: [random(4, dtype=dtype).requires_grad_() * 2],
    "large": lambda dtype: [random(300, 301, dtype=dtype), random(20_000, dtype=dtype)],
    "many": lambda dtype: [random(n % 4, dtype=dtype) for n in range(700)],
}
NOT_PLAIN = {
    "nothing": list,
    "a missing one": lambda: [random(2), None],
    "a number": lambda: [random(2), 1.0],
    "a subclass": lambda: [random(2).as_subclass(Masked)],
    "two dtypes": lambda: [random(2), random(2, dtype=torch.float64)],
    "integers": lambda: [torch.ones(2, dtype=torch.int32)],
    "complex": lambda: [torch.ones(2, dtype=torch.complex64)],
    "eight bits": lambda: [torch.ones(2).to(torch.float8_e4m3fn)],
    "sparse": lambda: [random(2, 2).to_sparse()],
    "rows compressed": lambda: [random(2, 2).to_sparse_csr()],
    "no memory": lambda: [torch.empty(2, device="meta")],
    "one object twice": lambda: [random(3)] * 2,
}
UNUSUAL = {
    "a parameter": lambda: [nn.Parameter(random(2))],
    "gaps": lambda: [random(5, 6)[:, ::2]],
    "expanded": lambda: [random(3, 1).expand(3, 4)],
    "overlapping": lambda: [random(8).as_strided((2, 3), (3, 2))],
    "one memory twice": lambda: [tensor := random(6), tensor.view(2, 3)],
    "seventeen dimensions": lambda: [random(*[2] * 17).permute(*range(16, -1, -1))],
}


@pytest.fixture(params=["native", "native without DLPack", "operators", "reference"])
def host(request, monkeypatch):
    """Each engine that serves the CPU; the native one also as older versions of torch have it."""
    name = request.param.split()[0]
    if name == "native":
        request.getfixturevalue("native_engine")
        if request.param != name:
            monkeypatch.setattr(REGISTRY[name], "_walk", None)
    with torch.no_grad():
        yield REGISTRY[name]


def looked_at(host: Engine, tensors: list[torch.Tensor], order: float = 2.0) -> TensorList | None:
    given = TensorList(tensors)
    return given if host.prepare(given, order) else None


@pytest.mark.parametrize("order", ORDERS)
def test_plain_gradients_have_the_norm_of_float64(host, dtype, order):
    """With each power sum or without, they have the bits of the other verbs."""
    for make in PLAIN.values():
        tensors = make(dtype)
        given = looked_at(host, tensors, order)
        sums = torch.full((len(tensors),), math.nan, dtype=torch.float64)
        norm = host.host_norm(given, order)
        assert norm == host.norm(tensors, order).item() == host.host_norm(given, order, sums)
        assert sums.tolist() == host.power_sums(tensors, order).tolist()
        by_hand = [power_sum(tensor, order) for tensor in tensors]
        expected = max(by_hand) if order == math.inf else math.fsum(by_hand) ** (1 / order)
        assert norm == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("coefficient", [0.0, 2.0**-140, 0.3, 1 - 2.0**-20])
def test_plain_gradients_are_multiplied(host, dtype, coefficient):
    for make in PLAIN.values():
        given = looked_at(host, make(dtype))
        before = [(tensor.clone(), tensor._version) for tensor in given]
        host.host_norm(given, 2.0)
        host.host_scale_(given, coefficient)
        for tensor, (original, version) in zip(given, before, strict=True):
            assert_scaled(tensor, original, torch.tensor(coefficient))
            assert tensor._version > version or not tensor.numel()


@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 1e-310, 2.0, 5.0, math.inf])
def test_clipping_in_one_call(host, threshold, flushed):
    """It scales a finite norm above the threshold, and writes nothing else."""
    first, second = torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0]).double()
    given = looked_at(host, [first, second])
    with denormals_flushed(flushed):
        norm = host.host_clip_(given, threshold, 2.0)
    assert (norm.item(), norm.shape, norm.dtype) == (5.0, (), torch.float64)
    if threshold >= 5:
        assert (first.item(), first._version) == (3.0, 0)
    else:
        # Operators cannot multiply by a denormal number where these are flushed.
        lost = flushed and threshold == 1e-310 and host.name != "native"
        needed = 0.0 if lost else threshold * 0.6
        assert first.item() == pytest.approx(needed, rel=1e-6, abs=0)
        assert first._version > 0
    spoilt = looked_at(host, [torch.tensor([math.nan, 2.0])])
    assert math.isnan(host.host_clip_(spoilt, threshold, 2.0).item())
    assert (spoilt[0][1].item(), spoilt[0]._version) == (2.0, 0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("make", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_other_gradients_are_left_to_the_other_verbs(host, make):
    assert looked_at(host, make()) is None


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL.keys())
def test_unusual_memory_is_refused_or_served(host, make):
    """An engine may accept it, and then serves it like its other verbs."""
    tensors, twins = make(), make()
    for twin, tensor in zip(twins, tensors, strict=True):
        storage(twin).copy_(storage(tensor))
    given = looked_at(host, tensors)
    if given is None:
        return
    assert host.host_norm(given, 2.0) == host.norm(twins, 2.0).item()
    host.host_scale_(given, 0.5)
    host.scale_places_(twins, torch.tensor([0.5], dtype=torch.float64))
    assert all(torch.equal(*pair) for pair in zip(given, twins, strict=True))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.functionalize])
def test_tensors_of_a_transformation_have_no_address(native_engine, transform):
    accepted = []

    def function(values: torch.Tensor) -> torch.Tensor:
        accepted.append(looked_at(native_engine, [values]))
        return values.sum()

    transform(function)(random(3, 4))
    assert accepted == [None]


def test_memory_that_was_given_back_is_not_read(native_engine):
    gone = random(3)
    gone.untyped_storage().resize_(0)
    assert looked_at(native_engine, [gone]) is None


def test_an_error_of_the_walk_does_not_stay(native_engine):
    """torch sets an error for a sparse tensor; the next call must not see it."""
    assert looked_at(native_engine, [random(2, 2).to_sparse()]) is None
    assert looked_at(native_engine, [random(2)]) is not None
    assert not ctypes.pythonapi.PyErr_Occurred()

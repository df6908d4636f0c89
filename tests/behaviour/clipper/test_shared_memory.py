"""Gradients that share memory: each is measured, each place in memory is scaled once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradclip
from gradclip import GradientClipper
from tests.support.reference import norm_of, parameter_with

Making = Callable[[], list[Tensor]]
SHARING: dict[str, Making] = {
    "one memory": lambda: [buffer()[:6], buffer()[:6]],
    "in part": lambda: [buffer()[:6], buffer()[4:9], buffer()[20:]],
    "one in the other": lambda: [buffer().view(4, 6), buffer()[3:5]],
    "a column": lambda: [buffer().view(4, 6), buffer().view(4, 6)[:, 1]],
    "every second": lambda: [buffer()[:9:2], buffer()[2:]],
    "expanded": lambda: [buffer()[:4].expand(3, 4), buffer()[2:8].expand(2, 6)],
    "channels last": lambda: [images(), images()[1:]],
    "seventy": lambda: [buffer()[place % 20 :][:2] for place in range(70)],
}
APART: dict[str, Making] = {
    "columns": lambda: [*buffer().view(4, 6).unbind(1)],
    "rows": lambda: [*buffer().view(4, 6)],
    "halves of rows": lambda: [buffer().view(4, 6)[:, :2], buffer().view(4, 6)[:, 2:]],
}
_BUFFER: list[Tensor] = []


def buffer() -> Tensor:
    """Return the memory of a test, another view of it each time."""
    return _BUFFER[0].view(-1)


def images() -> Tensor:
    return buffer().view(2, 2, 3, 2).permute(0, 3, 1, 2)


@pytest.fixture(autouse=True)
def memory() -> None:
    _BUFFER[:] = [torch.randn(24)]


@pytest.fixture(params=["auto", "operators", "reference"])
def chosen_engine(request) -> str:
    return request.param


def scaled_memory(tensors: list[Tensor], coefficient: float) -> Tensor:
    """Return the memory after every place that a tensor has was scaled once."""
    touched = torch.zeros(24, dtype=torch.bool)
    for tensor in tensors:
        start = tensor.storage_offset()
        touched.as_strided(tensor.shape, tensor.stride(), start).fill_(True)
    return torch.where(touched, buffer() * coefficient, buffer())


@pytest.mark.parametrize("make", [*SHARING.values(), *APART.values()], ids=[*SHARING, *APART])
@pytest.mark.parametrize("way", ["hook", "clip_grad_norm_", "clip_gradients_", "two optimizers"])
def test_each_place_is_scaled_once_and_the_norm_counts_each_gradient(way, make, chosen_engine):
    tensors = make()
    norm = norm_of([tensor.clone() for tensor in tensors])
    needed = scaled_memory(tensors, 0.5 / norm)
    separate = [tensor.clone() * 0.5 / norm for tensor in tensors]
    parameters = [parameter_with(tensor) for tensor in tensors]
    if way == "clip_gradients_":
        found = gradclip.clip_gradients_(tensors, 0.5)
    elif way == "clip_grad_norm_":
        found = gradclip.clip_grad_norm_(parameters, 0.5)
    else:
        groups = [parameters[:1], parameters[1:]] if way == "two optimizers" else [parameters]
        clipper = GradientClipper(
            [torch.optim.SGD(g, lr=0.0) for g in groups], 0.5, engine=chosen_engine
        )
        clipper.step()
        found = clipper.last.norm
    assert found.item() == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(buffer(), needed)
    for tensor, own in zip(tensors, separate, strict=True):
        torch.testing.assert_close(tensor, own)


@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_nothing_is_written_within_the_threshold(make, chosen_engine):
    tensors = make()
    before, version = buffer().clone(), buffer()._version
    optimizer = torch.optim.SGD([parameter_with(tensor) for tensor in tensors], lr=0.0)
    GradientClipper(optimizer, 1e3, engine=chosen_engine)
    optimizer.step()
    assert torch.equal(buffer(), before)
    assert buffer()._version == version


def test_what_is_within_its_own_threshold_is_not_written(chosen_engine):
    """Though another gradient of the step is scaled."""
    large = torch.full((3,), 1e3)
    tensors = [buffer()[:9:2], buffer()[2:], large]
    version = buffer()._version
    optimizer = torch.optim.SGD([parameter_with(tensor) for tensor in tensors], lr=0.0)
    GradientClipper(optimizer, 100.0, scope="parameter", engine=chosen_engine)
    optimizer.step()
    assert large.norm().item() == pytest.approx(100.0)
    assert buffer()._version == version


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_of_several_coefficients_the_smallest_holds(scope, chosen_engine):
    """No norm is above its threshold, and what shares nothing has its own coefficient."""
    apart = torch.full((2, 2), 7.0)
    tensors = [buffer()[:8].view(2, 4), buffer()[4:12].view(2, 4), apart]
    with torch.no_grad():
        buffer().copy_(torch.arange(24.0))
    before = [tensor.clone() for tensor in tensors]
    optimizer = torch.optim.SGD([parameter_with(tensor) for tensor in tensors], lr=0.0)
    clipper = GradientClipper(optimizer, 2.0, scope=scope, engine=chosen_engine)
    optimizer.step()
    coefficients = clipper.last.coefficient.tolist()
    if scope == "parameter":
        factors = [[min(coefficients[:2])] * 2] * 2 + [coefficients[2:] * 2]
    else:  # the second row of the first is the first row of the second
        both = min(coefficients[1], coefficients[2])
        factors = [[coefficients[0], both], [both, coefficients[3]], coefficients[4:]]
    for tensor, old, of_rows in zip(tensors, before, factors, strict=True):
        torch.testing.assert_close(tensor, old * torch.tensor(of_rows).float()[:, None])


def test_autograd_leaves_such_gradients_behind(chosen_engine):
    """As the average of several models does."""
    parts = [nn.Parameter(torch.full((3,), 1.0)) for _ in range(4)]
    (torch.stack(parts).sum(0) * 271).sum().backward()
    assert len({part.grad.data_ptr() for part in parts}) == 1
    optimizer = torch.optim.SGD(parts, lr=0.0)
    clipper = GradientClipper(optimizer, 1.0, engine=chosen_engine)
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(271 * 12**0.5)
    assert norm_of([part.grad for part in parts]) == pytest.approx(1.0)

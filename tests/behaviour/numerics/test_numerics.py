"""Norms and clipped gradients keep the promised accuracy, measured again in float64."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradclip
from gradclip import clip_grad_norm_, clip_gradients_, get_total_norm
from tests.support.engines import bits, denormals_flushed
from tests.support.reference import parameter_with
from tests.support.tolerances import NORM, ROUNDOFF, clipped_norm_error, element_error, smallest

pytestmark = pytest.mark.usefixtures("cpu_engine")

CONSTANTS = [0.1, 1 / 3, 0.7, 1e-3, 3.3e10, 1.0000001, 1.9999999, 1.4142135]
narrow = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def exact_norm(gradients: list[torch.Tensor], order: float = 2.0) -> float:
    """The norm in float64, in chunks so that large tensors need little memory."""
    chunks = [chunk for gradient in gradients for chunk in gradient.reshape(-1).split(1 << 22)]
    norms = [torch.linalg.vector_norm(chunk.double(), order) for chunk in chunks if len(chunk)]
    return torch.linalg.vector_norm(torch.stack(norms), order).item() if norms else 0.0


def assert_norm(gradients: list[torch.Tensor], order: float = 2.0) -> None:
    found = get_total_norm(gradients, order).item()
    assert found == pytest.approx(exact_norm(gradients, order), rel=NORM, abs=0)


def assert_clipped(gradients: list[torch.Tensor], threshold: float, order: float = 2.0) -> None:
    """Check that the norm is the threshold, but for the rounding of the elements."""
    count = sum(gradient.numel() for gradient in gradients)
    margin = max(clipped_norm_error(threshold, g.dtype, count, order) for g in gradients)
    assert abs(exact_norm(gradients, order) - threshold) <= margin


def assert_direction(
    gradients: list[torch.Tensor], originals: list[torch.Tensor], factor: float
) -> None:
    """Check that every element was multiplied by one common factor."""
    for gradient, original in zip(gradients, originals, strict=True):
        needed = original * factor
        margin = needed.abs() * element_error(gradient.dtype) + smallest(gradient.dtype)
        assert bool(((gradient.double() - needed).abs() <= margin).all())


def strided(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same kind of values in another layout."""
    if layout == "sliced":
        return torch.stack([values, values], -1)[..., 0]
    if layout == "transposed" and values.numel():
        return values.reshape(-1, 1).expand(-1, 3).contiguous().t()
    if layout == "misaligned":
        return torch.cat([values.flatten(), values.flatten()[:1]])[1:]
    return values


VALUES = {
    "random": lambda n, g: torch.randn(n, generator=g, dtype=torch.float64).clamp(-8, 8),
    "constant": lambda n, g: torch.full((n,), 0.7, dtype=torch.float64),
    "few": lambda n, g: torch.randint(-1, 2, (n,), generator=g).double() / 3,
}


@st.composite
def gradient_lists(draw) -> list[torch.Tensor]:
    gradients = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(list(ROUNDOFF)))
        numel = draw(st.sampled_from([0, 1, 2, 7, 257, 1000, 4095, 8192, 8193, 9000]))
        magnitude = min(10.0 ** draw(st.integers(-30, 38)), torch.finfo(dtype).max / 8)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        values = draw(st.sampled_from([*VALUES.values()]))(numel, generator)
        layout = draw(st.sampled_from(["contiguous", "sliced", "transposed", "misaligned"]))
        gradients.append(strided((values * magnitude).to(dtype), layout))
    return gradients


@settings(max_examples=400)
@given(
    gradients=gradient_lists(),
    order=st.sampled_from([1.0, 2.0, 3.0, math.inf]),
    share=st.sampled_from([1e-3, 0.3, 0.999, 1.0, 1.001, 50.0]),
)
def test_any_gradients_end_at_the_threshold_or_keep_their_bits(gradients, order, share):
    norm = exact_norm(gradients, order)
    threshold = norm * share if math.isfinite(norm * share) else 1.0
    before = [(bits(g), g._version) for g in gradients]
    originals = [g.to(torch.float64, copy=True) for g in gradients]
    found = clip_gradients_(gradients, threshold, order).item()
    assert found == pytest.approx(norm, rel=NORM, abs=0)
    if found <= threshold:
        for gradient, (old, version) in zip(gradients, before, strict=True):
            assert torch.equal(bits(gradient), old)
            assert gradient._version == version
        return
    assert_clipped(gradients, threshold, order)
    assert_direction(gradients, originals, threshold / found)


# The size of the error


@narrow
@pytest.mark.parametrize("constant", CONSTANTS)
def test_constant_data_keep_the_accuracy(dtype, constant):
    gradient = torch.full((3_000_001,), min(constant, torch.finfo(dtype).max)).to(dtype)
    element = gradient[0].double().item()
    for order, count in ((1.0, gradient.numel()), (2.0, math.sqrt(gradient.numel()))):
        found = get_total_norm([gradient], order).item()
        assert found == pytest.approx(element * count, rel=NORM, abs=0)


@pytest.mark.parametrize("numel", [3_000_001, pytest.param(124_000_000, marks=pytest.mark.slow)])
@narrow
@pytest.mark.parametrize("kind", ["random", "constant", "few"])
def test_many_elements_keep_the_accuracy(dtype, kind, numel):
    gradient = {
        "random": lambda: torch.randn(numel),
        "constant": lambda: torch.full((numel,), 0.1),
        "few": lambda: torch.randint(-1, 2, (numel,)).float() / 3,
    }[kind]().to(dtype)
    for order in (1.0, 2.0, math.inf):
        assert_norm([gradient], order)
    clip_gradients_([gradient], 1.0)
    assert_clipped([gradient], 1.0)


@narrow
@pytest.mark.parametrize("kind", ["spikes", "scales", "alternating"])
def test_unlike_elements_keep_the_accuracy(dtype, kind):
    generator = torch.Generator().manual_seed(3)
    for size in (9000, 16384, 70000):
        for _ in range(30):
            values = torch.randn(size, dtype=torch.float64, generator=generator)
            if kind == "spikes":
                values *= 1e-3
                values[torch.randint(size, (1,), generator=generator)] = 1e4
            elif kind == "scales":
                exponents = torch.randn(size // 64 + 1, dtype=torch.float64, generator=generator)
                values *= (exponents * 2).exp().repeat_interleave(64)[:size]
            else:
                values = torch.tensor([1.0, -1.0]).double().repeat(size)[:size]
                values *= torch.rand(1, dtype=torch.float64, generator=generator)
            assert_norm([values.to(dtype)])
    for large, period in ((2, 256), (16, 512), (64, 1024)):
        values = torch.ones(65536, dtype=dtype)
        values.view(-1, period)[:, :large] = 100.0
        assert_norm([values])


@narrow
@pytest.mark.parametrize("scope", ["unit", "global"])
def test_one_element_far_larger_than_the_others_keeps_the_accuracy(cpu_engine, dtype, scope):
    """The worst case: each far smaller element is rounded alike when it is added."""
    bases = torch.linspace(1, 2, 200, dtype=torch.float64)[:, None]
    for size in (100, 380, 610, 870, 960):
        for first in (1, 2):
            values = bases.expand(200, 256).clone()
            values[:, :first] *= size
            gradient = values.to(dtype)
            if scope == "unit":
                found = cpu_engine.power_sums([gradient], 2.0, rows=True).sqrt()
                needed = gradient.double().norm(dim=1)
            else:
                found = torch.stack([get_total_norm([row.repeat(40)]) for row in gradient[::20]])
                needed = gradient.double()[::20].norm(dim=1) * 40**0.5
            assert (found / needed - 1).abs().max().item() <= NORM


# Beyond the range of float32


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EXTREMES = [(1e20, 5), (1e20, 100_000), (3e38, 1000), (3e38, 10_000), (1e-25, 5), (1e-25, 10_000)]


@pytest.mark.parametrize(
    ("dtype", "element", "count"),
    [*((dtype, *extreme) for dtype in (F32, BF16) for extreme in EXTREMES), (F16, 6e4, 1_000_000)],
)
def test_huge_and_tiny_elements_have_their_true_norm_and_are_clipped(element, count, dtype):
    """And are not erased, where a norm is beyond the range of the dtype."""
    gradient = torch.full((count,), element).to(dtype)
    needed = gradient[0].double().item() * math.sqrt(count)
    threshold = needed / 1e3 if element < 1 else 1.0
    found = clip_gradients_([gradient], threshold).item()
    assert found == pytest.approx(needed, rel=NORM, abs=0)
    assert_clipped([gradient], threshold)
    assert gradient.min().item() > 0


def test_elements_and_tensors_of_all_magnitudes_count_rightly():
    assert_norm([torch.full((5000,), 1e-22), torch.full((5000,), 1e-20)])
    assert_norm([torch.full((2,), 1e30), torch.ones(2)])
    for magnitudes in ([1e30, 1e-30], [1e-12, 1e-22], [1e-24, 1e-21], [3e38, 1.0]):
        assert_norm([torch.tensor(magnitudes).repeat(10_000)])


@pytest.mark.parametrize(
    ("threshold", "dtype", "flush"),
    [
        *((1.0, dtype, flush) for dtype in (F32, BF16) for flush in (False, True)),
        *((threshold, F32, False) for threshold in (1e-2, 1e-20, 1e-30, 1e-40)),
    ],
)
def test_a_coefficient_below_the_normal_numbers_does_not_erase(threshold, dtype, flush):
    """No gradient is too large for a tiny threshold; here its norm is 9.5e39."""
    gradient = torch.full((1000,), 3e38).to(dtype)
    with denormals_flushed(flush):
        clip_gradients_([gradient], threshold)
    assert_clipped([gradient], threshold)
    assert gradient.min().item() > 0


# Settings of torch


@contextmanager
def called(function, value: object, before: object) -> Iterator[None]:
    function(value)
    try:
        yield
    finally:
        function(before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16 autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "matmul precision": lambda: called(
        torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision()
    ),
    "wide default dtype": lambda: called(torch.set_default_dtype, torch.float64, torch.float32),
    "narrow default dtype": lambda: called(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "default device": lambda: called(torch.set_default_device, "meta", None),
    "deterministic": lambda: called(torch.use_deterministic_algorithms, True, False),
    "inference": torch.inference_mode,
}
if hasattr(torch.backends.mkldnn, "matmul"):  # younger than the oldest torch that is supported
    MATMUL = torch.backends.mkldnn.matmul
    SETTINGS["rounded products"] = lambda: called(
        lambda precision: setattr(MATMUL, "fp32_precision", precision),
        "bf16",
        MATMUL.fp32_precision,
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", list(ROUNDOFF), ids=str)
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_settings_of_torch_change_neither_norm_nor_gradients(name, dtype, order):
    plain = [torch.randn(70, 190).to(dtype), torch.randn(5).to(dtype), torch.randn(9000).to(dtype)]
    under = [g.clone() for g in plain]
    norm = clip_gradients_(plain, 0.5, order)
    with SETTINGS[name]():
        found = clip_gradients_(under, 0.5, order)
    assert found.device.type == "cpu"
    assert found.item() == norm.item()
    assert all(map(torch.equal, plain, under))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "inference"])
def test_settings_of_torch_change_nothing_in_a_step(name):
    def step() -> tuple[float, list[float]]:
        weight = nn.Parameter(torch.ones(300, device="cpu", dtype=torch.float32))
        weight.grad = torch.full((300,), 0.3, device="cpu", dtype=torch.float32)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        with gradclip.GradientClipper(optimizer, 1.0, max_value=0.25) as clipper:
            optimizer.step()
            assert clipper.clip_rate() == 1.0
        return clipper.last.norm.item(), weight.tolist()

    plain = step()
    with SETTINGS[name]():
        assert step() == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_the_same_gradients_give_the_same_bits_whatever_the_number_of_threads(
    cpu_engine, dtype, order
):
    shapes = [(5, 3), (30, 5000), (3, 90_000), (1, 1_000_000)]
    gradients = [torch.randn(shape).to(dtype) for shape in shapes]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (threads, 1, 2):
            torch.set_num_threads(count)
            sums = cpu_engine.power_sums(gradients, order, rows=True)
            found.append(torch.cat([sums, get_total_norm(gradients, order).view(1)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_where_torch_is_wrong():
    """Many equal elements, and gradients whose squares are beyond the range of float32."""
    gradient = torch.full((10_000_000,), 0.1)
    exact = gradient[0].double().item() * math.sqrt(gradient.numel())
    assert abs(nn.utils.get_total_norm([gradient]).item() / exact - 1) > 5e-3
    assert get_total_norm([gradient]).item() == pytest.approx(exact, rel=NORM)
    huge = [parameter_with(torch.full((4,), 1e19)) for _ in range(2)]
    nn.utils.clip_grad_norm_(huge[:1], 1.0)
    clip_grad_norm_(huge[1:], 1.0)
    assert huge[0].grad.tolist() == [0.0] * 4
    assert huge[1].grad.tolist() == pytest.approx([0.5] * 4)

"""What the C engine promises beyond the contract: its bits, its boundaries, its threads."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gradclip import EngineUnavailableError, clip_grad_value_
from gradclip.engines.native import engine as native
from gradclip.engines.operators import host
from gradclip.engines.reference import ReferenceEngine

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
BOUNDARIES = [0, 1, 8, 16, 32, 64, 512, 8192, 16384, 32768, 131072, 262144]
"""Lengths at which a loop, a block, a piece of work or a second thread begins."""
ORDERS = [1.0, 2.0, math.inf, 2.5]
REFERENCE = ReferenceEngine()
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ONCE = {"max_examples": 60, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture
def engine(native_engine):
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield native_engine
    native_engine._library.gradclip_choose(native.BEST)
    torch.set_num_threads(threads)


@pytest.fixture(params=[0, 1, 2])
def level(request, engine):
    if engine._library.gradclip_choose(request.param) < request.param:
        pytest.skip("the processor has no such instructions")
    return request.param


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGERS[tensor.element_size()]).clone()


def all_halves(dtype: torch.dtype) -> torch.Tensor:
    """Every number of 16 bits, NaN of every payload and both infinities included."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def at(buffer: torch.Tensor, start: int, length: int) -> torch.Tensor:
    return buffer[start : start + length]


lengths = st.builds(
    lambda boundary, more: max(0, boundary + more), st.sampled_from(BOUNDARIES), st.integers(-2, 2)
)


# Any length, start, processor and number of threads


@settings(**ONCE)
@given(st.lists(lengths, min_size=1, max_size=3), st.integers(0, 9), st.sampled_from(DTYPES))
def test_sums_are_right_and_their_bits_depend_on_values_alone(engine, sizes, start, dtype):
    generator = torch.Generator().manual_seed(sum(sizes) + start)
    given = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    moved = [
        at(torch.empty(start + len(one), dtype=dtype), start, len(one)).copy_(one) for one in given
    ]
    for order in ORDERS:
        engine._library.gradclip_choose(native.BEST)
        torch.set_num_threads(2)
        sums = engine.power_sums(given, order)
        needed = REFERENCE.power_sums(given, order)
        assert torch.allclose(sums, needed, rtol=1e-6, atol=0)
        norm = engine.norm(given, order)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for chosen in (0, 1, 2):
                engine._library.gradclip_choose(chosen)
                assert torch.equal(engine.power_sums(moved, order), sums)
                assert torch.equal(engine.norm(moved, order), norm)


@settings(**ONCE)
@given(lengths, st.integers(0, 9), st.sampled_from(DTYPES))
def test_writing_touches_the_elements_alone_and_every_processor_writes_alike(
    engine, size, start, dtype
):
    generator = torch.Generator().manual_seed(size + start)
    buffer = torch.randn(start + size + 5, generator=generator).to(dtype)
    for change in (
        lambda tensors: engine.scale_(tensors, torch.tensor([0.3], dtype=torch.float64)),
        lambda tensors: engine.clamp_(tensors, torch.tensor([0.1], dtype=torch.float64)),
    ):
        written = []
        for chosen, threads in ((0, 1), (1, 2), (2, 3)):
            engine._library.gradclip_choose(chosen)
            torch.set_num_threads(threads)
            copy = buffer.clone()
            change([at(copy, start, size)])
            written.append(bits(copy))
        assert torch.equal(written[0], written[1])
        assert torch.equal(written[0], written[2])
        for part in (slice(0, start), slice(start + size, None)):
            assert torch.equal(written[0][part], bits(buffer)[part])


@settings(**ONCE)
@given(st.integers(0, 700), st.integers(0, 40), st.sampled_from(DTYPES), st.integers(0, 9))
def test_rows_of_any_length_lie_anywhere(engine, columns, rows, dtype, gap):
    generator = torch.Generator().manual_seed(columns)
    table = torch.randn(rows, columns + gap, generator=generator).to(dtype)[:, :columns]
    for order in ORDERS:
        found = engine.power_sums([table, table[::2]], order, rows=True)
        needed = REFERENCE.power_sums([table, table[::2]], order, rows=True)
        assert torch.allclose(found, needed, rtol=1e-6, atol=0)


def test_many_long_rows_are_cut_into_pieces(engine, dtype):
    table = torch.randn(7, 40_000).to(dtype)
    table[3] = 0
    table[5, 39_999] = math.nan
    for order in ORDERS:
        found = engine.power_sums([table, table[:2, :9]], order, rows=True)
        needed = REFERENCE.power_sums([table, table[:2, :9]], order, rows=True)
        assert torch.allclose(found, needed, rtol=1e-6, atol=0, equal_nan=True)


# Every number


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_read_as_torch_reads_it(engine, level, dtype):
    halves = all_halves(dtype).unsqueeze(1)
    for order in (1.0, math.inf):
        found = engine.power_sums([halves], order, rows=True)
        needed = halves.double().abs().flatten()
        assert torch.allclose(found, needed, rtol=0, atol=0, equal_nan=True)
    # Long enough for the quick sums.
    repeated = halves[halves.isfinite()].unsqueeze(1).repeat(1, 8200)[::997]
    found = engine.power_sums([repeated], 2.0, rows=True)
    assert torch.allclose(found, repeated.double().square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("coefficient", [0.5, 0.3, 0.99999, 1e-3, 2.0**-14, 1e-7, 1e-30])
def test_every_half_is_scaled_and_rounded_as_torch_does(engine, level, dtype, coefficient):
    halves = all_halves(dtype)
    factor = torch.tensor(coefficient, dtype=torch.float32)
    needed = (halves.float() * factor).to(dtype)
    engine.scale_([halves], torch.tensor([coefficient], dtype=torch.float64))
    nan = needed.isnan()
    assert torch.equal(halves.isnan(), nan)
    assert torch.equal(bits(halves)[~nan], bits(needed)[~nan])


@pytest.mark.parametrize("coefficient", [1e-39, 1e-45, 3e-60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_scaled_below_the_normal_numbers_is_rounded_once(engine, level, dtype, coefficient):
    values = torch.randn(999).mul(3e38).clamp(-3e38, 3e38).to(dtype)
    needed = (values.double() * coefficient).float().to(dtype)
    engine.scale_([values], torch.tensor([coefficient], dtype=torch.float64))
    assert torch.equal(bits(values), bits(needed))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bound", [0.0, 6e-8, 1.0, 60000.0, math.inf])
def test_every_half_is_limited_and_nan_keeps_its_bits(engine, level, dtype, bound):
    halves = all_halves(dtype)
    limit = torch.tensor([bound], dtype=torch.float64)
    rounded = limit.to(dtype).item()
    fits = ~(halves.float().abs() > rounded)  # NaN among them
    before = bits(halves)
    engine.clamp_([halves], limit)
    assert torch.equal(bits(halves)[fits], before[fits])
    assert bool((halves[~fits].float().abs() == rounded).all())
    assert torch.equal(halves[~fits].signbit(), before[~fits] < 0)


@pytest.mark.parametrize(
    ("dtype", "payload"),
    [
        *[(torch.float32, number) for number in (0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1)],
        *[(torch.float64, number) for number in (0x7FF0000000000001, 0x7FF8000000000000, -1)],
    ],
)
def test_nan_of_any_payload_is_nan(engine, level, dtype, payload):
    for length in (1, 40, 9000, 40_000):
        values = torch.ones(length, dtype=dtype)
        bits_of = values.view(INTEGERS[dtype.itemsize])
        bits_of[length // 2] = payload
        for order in ORDERS:
            assert math.isnan(engine.norm([values], order).item())
        engine.clamp_([values], torch.tensor([0.5], dtype=torch.float64))
        assert bits_of[length // 2] == payload
        engine.scale_([values], torch.tensor([0.5], dtype=torch.float64))
        assert int(values.isnan().sum()) == 1


@pytest.mark.parametrize("length", [5, 9000, 40_000])
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("value", [1e-45, 1e-39, 1.2e-38, 1e-25, 0.0, 3.4e38])
def test_the_ends_of_the_range_have_their_true_sums(engine, level, value, flush, length):
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.full((length,), value).to(dtype)
        needed = values.double().norm().item()
        if flush and not torch.set_flush_denormal(True):
            pytest.skip("denormals cannot be flushed on this processor")
        try:
            found = engine.norm([values], 2.0).item()
            largest = engine.norm([values], math.inf).item()
            still = torch.tensor([1e-39]).mul(1.0).item()
        finally:
            torch.set_flush_denormal(False)
        assert found == pytest.approx(needed, rel=1e-6, abs=0)
        assert largest == pytest.approx(needed / math.sqrt(length), rel=1e-6, abs=0)
        assert (still == 0) == flush  # as the program had it


def test_few_float32_are_summed_as_exactly_as_float64(engine):
    values = torch.rand(8192).mul(1e3)
    exact = math.sqrt(math.fsum(value * value for value in values.tolist()))
    assert engine.norm([values], 2.0).item() == pytest.approx(exact, rel=1e-14, abs=0)


# What autograd knows


def test_only_what_was_written_has_a_new_version(engine):
    tensors = [torch.ones(5), torch.full((5,), 3.0), torch.empty(0)]
    engine.scale_(tensors, torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64))
    engine.clamp_(tensors, torch.tensor([1.2], dtype=torch.float64))
    assert [tensor._version for tensor in tensors] == [0, 2, 0]
    with torch.inference_mode():
        inferred = torch.ones(3)
    engine.scale_([inferred], torch.tensor([0.5], dtype=torch.float64))
    assert inferred.tolist() == [0.5] * 3


def test_what_inference_mode_makes_stays_there(engine):
    native._SPARE[0].clear()
    native._SPARE[1].clear()
    with torch.inference_mode():
        assert engine.norm([torch.tensor([3.0, 4.0])], 2.0, scalar=True).is_inference()
    norms = [engine.norm([torch.tensor([3.0, 4.0])], 2.0, scalar=True) for _ in range(40)]
    assert not any(norm.is_inference() for norm in norms)
    assert {norm.item() for norm in norms} == {5.0}
    assert len({norm.data_ptr() for norm in norms}) == 40


def test_what_a_transformation_makes_stays_there(engine):
    seen, inside = torch.tensor([3.0, 4.0]), []

    def loss(x):
        inside.append(engine.norm([seen], 2.0, scalar=True).item())
        inside.append(engine.power_sums([seen], 2.0).sum().item())
        return (x * x).sum()

    native._SPARE[1].clear()
    torch.func.grad(loss)(torch.ones(2))
    assert inside == [5.0, 25.0]
    for _ in range(40):
        assert engine.norm([seen], 2.0, scalar=True).item() == 5.0


# What it leaves to torch operators


def test_tensors_without_memory_of_their_own_are_left_to_torch_operators(engine):
    nothing = torch._efficientzerotensor((4,))
    assert engine.norm([nothing, torch.ones(9)], 2.0).item() == 3.0
    assert engine.power_sums([nothing], 2.0).tolist() == [0.0]
    assert engine.norm([torch._efficientzerotensor((10,))[3:]], 2.0).item() == 0.0

    def halve(x):
        part = (x * 2)[3:]
        engine.scale_([part], torch.tensor([0.5], dtype=torch.float64))
        return part

    assert torch.func.functionalize(halve)(torch.ones(5)).tolist() == [1.0, 1.0]

    class Named(torch.Tensor):
        pass

    named = torch.tensor([3.0, 4.0]).as_subclass(Named)
    assert engine.norm([named], 2.0).item() == 5.0
    engine.scale_([named], torch.tensor([0.5], dtype=torch.float64))
    assert named.tolist() == [1.5, 2.0]


def test_numbers_without_memory_are_left_to_torch_operators(engine):
    class Named(torch.Tensor):
        pass

    for verb in (engine.scale_, engine.clamp_):
        tensors = [torch.ones(3), torch.ones(2)]
        verb(tensors, torch.tensor([0.5], dtype=torch.float64).as_subclass(Named))
        assert [tensor.tolist() for tensor in tensors] == [[0.5] * 3, [0.5] * 2]
        verb(tensors, torch._efficientzerotensor((1,), dtype=torch.float64))
        assert [tensor.tolist() for tensor in tensors] == [[0.0] * 3, [0.0] * 2]


def test_a_bound_of_minus_zero_is_zero(engine):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    clip_grad_value_([weight], -0.0)
    assert weight.grad._version == 0


@pytest.mark.parametrize("flush", [False, True])
def test_roots_are_taken_of_denormal_sums(engine, flush):
    smallest, wide = torch.tensor([2.0**-149]), torch.tensor([1e-310], dtype=torch.float64)
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("denormals cannot be flushed on this processor")
    try:
        seventh = engine.norm([smallest], 7.0).item()
        largest = engine.norm([wide], math.inf).item()
    finally:
        torch.set_flush_denormal(False)
    assert seventh == pytest.approx(2.0**-149, rel=1e-6, abs=0)
    assert largest == 1e-310


def test_within_a_transformation_of_torch_func_there_is_no_memory(engine):
    found = torch.func.vmap(lambda row: engine.power_sums([row, row], math.inf))
    with pytest.raises(RuntimeError):  # torch's own: it cannot divide into samples what it joins
        found(torch.ones(3, 4))


def test_gaps_are_left_to_torch_operators_and_the_rest_is_not(engine, monkeypatch):
    left = []
    scale_ = host.scale_
    monkeypatch.setattr(
        host,
        "scale_",
        lambda tensors, *a, **k: left.extend(tensors) or scale_(tensors, *a, **k),
    )
    gaps, plain = torch.ones(6, 6)[:, ::2], torch.ones(4)
    engine.scale_([plain, gaps, plain.clone()], torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64))
    assert left == [gaps] or left[0] is gaps
    assert len(left) == 1
    assert plain.tolist() == [0.5] * 4
    assert gaps.tolist() == [[0.25] * 3] * 6


# Where it is missing


def test_a_library_that_was_not_built_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(EngineUnavailableError, match="no C compiler.* Install a C compiler .*gcc"):
        native.load()


def test_a_library_that_does_not_fit_is_not_used(monkeypatch, tmp_path, native_engine):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with monkeypatch.context() as patch:
        patch.setattr(native, "LIBRARY", broken)
        with pytest.raises(EngineUnavailableError, match="cannot be loaded .*broken.so"):
            native.load()
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    with pytest.raises(EngineUnavailableError, match="of another version"):
        native.load()


# Threads

LARGE = """
import os, re, sys, torch
from gradclip.engines import _ENGINES
torch.set_num_threads(1)
engine, large = _ENGINES["native"], torch.ones(4_000_000)
def threads(): return len(os.listdir("/proc/self/task"))
"""


def run(program: str) -> str:
    command = [sys.executable, "-c", LARGE + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not listed")


@linux
def test_the_threads_are_those_of_torch_and_as_many(native_engine):
    found = run("""
before = threads()
engine.norm([large], 2.0); one = threads()
engine.norm([torch.ones(1000)] * 20, 2.0)
torch.set_num_threads(3); engine.norm([torch.ones(1000)] * 20, 2.0); small = threads()
engine.norm([large], 2.0); three = threads()
torch.ones(4_000_000).add_(1).sum(); with_torch = threads()
maps = open("/proc/self/maps").read()
runtimes = set(re.findall(r"\\S+/lib(?:g|i|)omp\\S*", maps))
print(one - before, small - before, three - before, with_torch - before, len(runtimes))
""")
    assert found.split() == ["0", "0", "2", "2", "1"]


@linux
def test_without_a_runtime_one_thread_does_it_all(native_engine):
    found = run("""
import ctypes
torch.set_num_threads(3)
needed = engine.norm([large], 2.0)
engine._library.gradclip_use_threads_of(ctypes.c_void_p(None))
print(torch.equal(engine.norm([large], 2.0), needed))
""")
    assert found.split() == ["True"]


def test_no_runtime_is_no_error(monkeypatch):
    monkeypatch.setattr(native.ctypes, "CDLL", lambda *given: object())
    assert native._entry_of_threads().value is None


@linux
def test_a_forked_child_does_not_wait_for_threads_that_it_lacks(native_engine):
    found = run("""
torch.set_num_threads(3)
engine.norm([large], 2.0)
child = os.fork()
if child == 0:
    engine.scale_([large], torch.tensor([0.5], dtype=torch.float64))
    os._exit(int(engine.norm([large], 2.0).item()) != 1000)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), engine.norm([large], 2.0).item())
""")
    assert found.split() == ["0", "2000.0"]


class _Measured(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        from gradclip import get_total_norm

        return get_total_norm([torch.full((1_000_000,), float(index))])


def test_workers_of_a_data_loader_measure(engine):
    engine.norm([torch.ones(1_000_000)], 2.0)
    loader = DataLoader(_Measured(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [norm.item() for norm in loader] == [0.0, 1000.0, 2000.0, 3000.0]


# The C code alone

DRIVER = Path(__file__).with_name("native_driver.c")
COMPILER = os.environ.get("CC", "gcc")
STRICT = ["-std=gnu11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-ffp-contract=off"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no C compiler")
@pytest.mark.parametrize(
    "options",
    [["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], ["-O3"]],
    ids=["sanitized", "optimised"],
)
def test_the_c_code_alone_keeps_to_its_memory(tmp_path, options):
    program = tmp_path / "driver"
    libraries = ["-lm", "-lpthread"]
    subprocess.run([COMPILER, *STRICT, *options, DRIVER, "-o", program, *libraries], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")

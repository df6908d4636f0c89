"""The C engine beyond the contract: its bits, its boundaries, its threads."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradclip import EngineUnavailableError, engines
from gradclip.engines.base import INTEGERS
from gradclip.engines.native import engine as native
from gradclip.engines.native import loading
from gradclip.engines.operators import host
from gradclip.engines.reference import ReferenceEngine
from tests.support.engines import LEVELS, bits, denormals_flushed, vector

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
BOUNDARIES = [0, 1, 8, 16, 32, 64, 512, 8192, 16384, 32768, 131072, 262144]
"""Lengths at which a loop, a block, a piece of work or a second thread begins."""
ORDERS = [1.0, 2.0, math.inf, 2.5]
REFERENCE = ReferenceEngine()
ONCE = {"max_examples": 60, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture
def c_engine(native_engine):
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield native_engine
    native_engine._library.gradclip_choose(loading.BEST)
    torch.set_num_threads(threads)


every_level = pytest.mark.parametrize("engine", [*LEVELS], indirect=True)


def all_halves(dtype: torch.dtype) -> torch.Tensor:
    """Every number of 16 bits, NaN of every payload and both infinities included."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


lengths = st.builds(
    lambda boundary, more: max(0, boundary + more), st.sampled_from(BOUNDARIES), st.integers(-2, 2)
)


# Any length, start, processor and number of threads


@settings(**ONCE)
@given(st.lists(lengths, min_size=1, max_size=3), st.integers(0, 9), st.sampled_from(DTYPES))
def test_sums_are_right_and_their_bits_depend_on_values_alone(c_engine, sizes, start, dtype):
    generator = torch.Generator().manual_seed(sum(sizes) + start)
    given = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    moved = [torch.empty(start + len(one), dtype=dtype)[start:].copy_(one) for one in given]
    for order in ORDERS:
        c_engine._library.gradclip_choose(loading.BEST)
        torch.set_num_threads(2)
        sums = c_engine.power_sums(given, order)
        needed = REFERENCE.power_sums(given, order)
        assert torch.allclose(sums, needed, rtol=1e-6, atol=0)
        norm = c_engine.norm(given, order)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for chosen in (0, 1, 2):
                c_engine._library.gradclip_choose(chosen)
                assert torch.equal(c_engine.power_sums(moved, order), sums)
                assert torch.equal(c_engine.norm(moved, order), norm)


@settings(**ONCE)
@given(lengths, st.integers(0, 9), st.sampled_from(DTYPES))
def test_writing_touches_the_elements_alone_and_every_processor_writes_alike(
    c_engine, size, start, dtype
):
    generator = torch.Generator().manual_seed(size + start)
    buffer = torch.randn(start + size + 5, generator=generator).to(dtype)
    for change in (
        lambda tensors: c_engine.scale_(tensors, vector(0.3)),
        lambda tensors: c_engine.clamp_(tensors, vector(0.1)),
    ):
        written = []
        for chosen, threads in ((0, 1), (1, 2), (2, 3)):
            c_engine._library.gradclip_choose(chosen)
            torch.set_num_threads(threads)
            copy = buffer.clone()
            change([copy[start : start + size]])
            written.append(bits(copy))
        assert torch.equal(written[0], written[1])
        assert torch.equal(written[0], written[2])
        for part in (slice(0, start), slice(start + size, None)):
            assert torch.equal(written[0][part], bits(buffer)[part])


# Every number


@every_level
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("coefficient", [0.5, 0.3, 0.99999, 1e-3, 2.0**-14, 1e-7, 1e-30])
def test_every_half_is_scaled_and_rounded_as_torch_does(engine, dtype, coefficient):
    halves = all_halves(dtype)
    factor = torch.tensor(coefficient, dtype=torch.float32)
    needed = (halves.float() * factor).to(dtype)
    engine.scale_([halves], vector(coefficient))
    nan = needed.isnan()
    assert torch.equal(halves.isnan(), nan)
    assert torch.equal(bits(halves)[~nan], bits(needed)[~nan])


@every_level
@pytest.mark.parametrize("coefficient", [1e-39, 1e-45, 3e-60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_below_the_normal_numbers_are_rounded_once(engine, dtype, coefficient):
    values = torch.randn(999).mul(3e38).clamp(-3e38, 3e38).to(dtype)
    needed = (values.double() * coefficient).float().to(dtype)
    engine.scale_([values], vector(coefficient))
    assert torch.equal(bits(values), bits(needed))


@every_level
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bound", [0.0, 6e-8, 1.0, 60000.0, math.inf])
def test_every_half_is_limited_and_nan_keeps_its_bits(engine, dtype, bound):
    halves = all_halves(dtype)
    limit = vector(bound)
    rounded = limit.to(dtype).item()
    fits = ~(halves.float().abs() > rounded)  # NaN among them
    before = bits(halves)
    engine.clamp_([halves], limit)
    assert torch.equal(bits(halves)[fits], before[fits])
    assert bool((halves[~fits].float().abs() == rounded).all())
    assert torch.equal(halves[~fits].signbit(), before[~fits] < 0)


@every_level
@pytest.mark.parametrize(
    ("dtype", "payload"),
    [
        *[(torch.float32, number) for number in (0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1)],
        *[(torch.float64, number) for number in (0x7FF0000000000001, 0x7FF8000000000000, -1)],
    ],
)
def test_nan_of_any_payload_is_nan(engine, dtype, payload):
    for length in (1, 40, 9000, 40_000):
        values = torch.ones(length, dtype=dtype)
        bits_of = values.view(INTEGERS[dtype.itemsize])
        bits_of[length // 2] = payload
        for order in ORDERS:
            assert math.isnan(engine.norm([values], order).item())
        engine.clamp_([values], vector(0.5))
        assert bits_of[length // 2] == payload
        engine.scale_([values], vector(0.5))
        assert int(values.isnan().sum()) == 1


def test_few_float32_are_summed_as_exactly_as_float64(c_engine):
    values = torch.rand(8192).mul(1e3)
    exact = math.sqrt(math.fsum(value * value for value in values.tolist()))
    assert c_engine.norm([values], 2.0).item() == pytest.approx(exact, rel=1e-14, abs=0)


# Autograd, inference mode, torch.func


def test_tensors_of_inference_mode_are_written(c_engine):
    with torch.inference_mode():
        inferred = torch.ones(3)
    c_engine.scale_([inferred], vector(0.5))
    assert inferred.tolist() == [0.5] * 3


@pytest.mark.parametrize("where", ["inference mode", "torch.func"])
def test_spare_tensors_made_in_a_special_mode_stay_there(c_engine, where):
    """Outside, autograd or torch.func would refuse them."""
    gradient = torch.tensor([3.0, 4.0])

    def measure(x):
        assert c_engine.norm([gradient], 2.0, scalar=True).item() == 5.0
        assert c_engine.power_sums([gradient], 2.0).sum().item() == 25.0
        return (x * x).sum()

    for spare in native._SPARE:
        spare.clear()
    if where == "torch.func":
        torch.func.grad(measure)(torch.ones(2))
    else:
        with torch.inference_mode():
            measure(gradient)
    norms = [c_engine.norm([gradient], 2.0, scalar=True) for _ in range(40)]
    assert not any(norm.is_inference() for norm in norms)
    assert {norm.item() for norm in norms} == {5.0}
    assert len({norm.data_ptr() for norm in norms}) == 40


# Left to torch operators


class Named(torch.Tensor):
    """A subclass, which may have no memory of its own."""


def test_tensors_and_numbers_without_memory_are_left_to_torch_operators(c_engine):
    nothing = torch._efficientzerotensor((4,))
    assert c_engine.norm([nothing, torch.ones(9)], 2.0).item() == 3.0
    assert c_engine.power_sums([nothing], 2.0).tolist() == [0.0]
    assert c_engine.norm([torch._efficientzerotensor((10,))[3:]], 2.0).item() == 0.0

    def halve(x):
        part = (x * 2)[3:]
        c_engine.scale_([part], vector(0.5))
        return part

    assert torch.func.functionalize(halve)(torch.ones(5)).tolist() == [1.0, 1.0]
    named = torch.tensor([3.0, 4.0]).as_subclass(Named)
    assert c_engine.norm([named], 2.0).item() == 5.0
    c_engine.scale_([named], vector(0.5))
    assert named.tolist() == [1.5, 2.0]
    for verb in (c_engine.scale_, c_engine.clamp_):
        tensors = [torch.ones(3), torch.ones(2)]
        for numbers, result in (
            (vector(0.5).as_subclass(Named), 0.5),
            (torch._efficientzerotensor((1,), dtype=torch.float64), 0.0),
        ):
            verb(tensors, numbers)
            assert [tensor.tolist() for tensor in tensors] == [[result] * 3, [result] * 2]
    found = torch.func.vmap(lambda row: c_engine.power_sums([row, row], math.inf))
    with pytest.raises(RuntimeError):  # torch's own: it cannot divide into samples what it joins
        found(torch.ones(3, 4))


@pytest.mark.parametrize("flush", [False, True])
def test_roots_are_taken_of_denormal_sums(c_engine, flush):
    smallest, wide = torch.tensor([2.0**-149]), vector(1e-310)
    with denormals_flushed(flush):
        seventh = c_engine.norm([smallest], 7.0).item()
        largest = c_engine.norm([wide], math.inf).item()
    assert seventh == pytest.approx(2.0**-149, rel=1e-6, abs=0)
    assert largest == 1e-310


def test_only_tensors_with_gaps_are_left_to_torch_operators(c_engine, monkeypatch):
    left, scale_ = [], host.scale_
    monkeypatch.setattr(
        host, "scale_", lambda tensors, *a, **k: left.extend(tensors) or scale_(tensors, *a, **k)
    )
    gaps, plain = torch.ones(6, 6)[:, ::2], torch.ones(4)
    c_engine.scale_([plain, gaps, plain.clone()], vector(0.5, 0.25, 1.0))
    assert len(left) == 1
    assert left[0] is gaps
    assert plain.tolist() == [0.5] * 4
    assert gaps.tolist() == [[0.25] * 3] * 6


# A library that is missing or does not fit


def changed(library: bytes, place: int, byte: int) -> bytes:
    return library[:place] + bytes([byte]) + library[place + 1 :]


NO_LIBRARIES = {
    "no library": (lambda whole: b"no library", "cannot be loaded .*_native.so"),
    "another processor": (lambda whole: changed(whole, 18, 0xF3), "cannot be loaded .*_native.so"),
    "another word length": (lambda whole: changed(whole, 4, 1), "cannot be loaded .*_native.so"),
    "a library of Windows": (lambda whole: b"MZ" + bytes(4000), "cannot be loaded .*_native.so"),
    "a library of macOS": (lambda whole: b"\xcf\xfa\xed\xfe" * 99, "cannot be loaded .*_native.so"),
    "empty": (lambda whole: b"", "cannot be loaded .*_native.so"),
    "no header": (lambda whole: whole[:50], "_native.so is cut off"),
    "one page": (lambda whole: whole[:4096], "_native.so is cut off"),
    "half": (lambda whole: whole[: len(whole) // 2], "_native.so is cut off"),
    "all but one byte": (lambda whole: whole[:-1], "_native.so is cut off"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the files are those of Linux")
@pytest.mark.parametrize("kind", NO_LIBRARIES)
def test_a_damaged_or_foreign_library_is_told(kind, monkeypatch, tmp_path, native_engine):
    """Linux itself would load one that is cut off, and the process ends with it."""
    content, reason = NO_LIBRARIES[kind]
    library, load = tmp_path / "_native.so", ctypes.CDLL
    library.write_bytes(content(loading.LIBRARY.read_bytes()))
    monkeypatch.setattr(loading, "LIBRARY", library)
    if "cut off" in reason:
        monkeypatch.setattr(ctypes, "CDLL", lambda *given, **options: pytest.fail("it was loaded"))
    else:
        monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(EngineUnavailableError, match=reason):
        loading.load()


def test_a_missing_library_or_one_of_another_version_is_told(monkeypatch, tmp_path, native_engine):
    with monkeypatch.context() as patch:
        patch.setattr(loading, "LIBRARY", tmp_path / "none.so")
        with pytest.raises(EngineUnavailableError, match="without its library.*'pip install .*gcc"):
            loading.load()
    monkeypatch.setattr(loading, "ABI", loading.ABI + 1)
    with pytest.raises(EngineUnavailableError, match="of another version"):
        loading.load()


def test_a_library_that_does_not_fit_is_warned_of_and_a_missing_one_is_not(monkeypatch, tmp_path):
    library = tmp_path / "_native.so"
    library.write_bytes(b"no library")
    monkeypatch.setattr(loading, "LIBRARY", library)
    with pytest.warns(UserWarning, match="^Torch operators serve the CPU, .* cannot be loaded"):
        assert "cannot be loaded" in engines._load_native.__wrapped__()
    library.unlink()
    assert "without its library" in engines._load_native.__wrapped__()


# Threads

LARGE = """
import ctypes, os, re, torch
from gradclip.engines import _ENGINES
torch.set_num_threads(1)
c_engine, large = _ENGINES["native"], torch.ones(4_000_000)
def threads(): return len(os.listdir("/proc/self/task"))
"""
PROGRAMS = {
    "they are those of torch and as many": """
before = threads()
c_engine.norm([large], 2.0); one = threads()
c_engine.norm([torch.ones(1000)] * 20, 2.0)
torch.set_num_threads(3); c_engine.norm([torch.ones(1000)] * 20, 2.0); small = threads()
c_engine.norm([large], 2.0); three = threads()
torch.ones(4_000_000).add_(1).sum(); with_torch = threads()
maps = open("/proc/self/maps").read()
runtimes = set(re.findall(r"\\S+/lib(?:g|i|)omp\\S*", maps))
found = one - before, small - before, three - before, with_torch - before, len(runtimes)
assert found == (0, 0, 2, 2, 1), found
""",
    "without a runtime one does it all": """
torch.set_num_threads(3)
needed = c_engine.norm([large], 2.0)
c_engine._library.gradclip_use_threads_of(None, None)
assert torch.equal(c_engine.norm([large], 2.0), needed)
""",
    "a forked child does not wait for those that it lacks": """
torch.set_num_threads(3)
c_engine.norm([large], 2.0)
child = os.fork()
if child == 0:
    c_engine.scale_([large], torch.tensor([0.5], dtype=torch.float64))
    os._exit(int(c_engine.norm([large], 2.0).item()) != 1000)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert c_engine.norm([large], 2.0).item() == 2000
""",
}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are not listed")
@pytest.mark.parametrize("name", PROGRAMS)
def test_threads_of_a_program(native_engine, name):
    command = [sys.executable, "-c", LARGE + PROGRAMS[name]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("seconds", "calls"), [(0.05, range(2, 6)), (0.0, range(12, 21))])
def test_threads_that_have_to_wait_are_seldom_asked(c_engine, seconds, calls):
    """Beside other programs they come late; the bits are the same with and without them."""
    library, started = c_engine._library, []
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(work, data, threads, flags):
        started.append(threads)
        time.sleep(seconds)
        function(work)(data)

    torch.set_num_threads(2)
    large = torch.randn(2_000_000)
    needed = c_engine.norm([large], 2.0)
    number = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    library.gradclip_use_threads_of(
        *(ctypes.cast(entry, ctypes.c_void_p) for entry in (parallel, number))
    )
    try:
        norms = [c_engine.norm([large], 2.0) for _ in range(20)]
    finally:
        loading._give_threads(library)
    assert all(torch.equal(norm, needed) for norm in norms)
    assert len(started) in calls


class OtherRuntime:
    """An OpenMP runtime without GOMP_parallel, as Intel's for Windows."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        task_type = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, pointer)

        def fork(place, count, task, function, data):
            assert count == 2
            for thread in range(self.asked[-1][1]):  # one after the other
                self.thread = thread
                task_type(task)(None, None, function, data)

        functions = {
            "__kmpc_fork_call": (None, fork, pointer, number, pointer, pointer, pointer),
            "__kmpc_global_thread_num": (number, lambda place: 7, pointer),
            "omp_get_thread_num": (number, lambda: self.thread),
            "__kmpc_push_num_threads": (
                *(None, lambda place, thread, count: self.asked.append((thread, count))),
                *(pointer, number, number),
            ),
        }
        if name not in functions:
            raise AttributeError(name)
        result, function, *arguments = functions[name]
        entry = ctypes.CFUNCTYPE(result, *arguments)(function)
        setattr(self, name, entry)
        return entry


@pytest.fixture
def threads_of(c_engine, monkeypatch):
    """Let the engine find threads on a platform, and return what it does with a large norm."""

    def norms_with(runtime, platform=sys.platform):
        with monkeypatch.context() as patch:
            patch.setattr(loading, "_runtime_of_torch", runtime)
            patch.setattr(sys, "platform", platform)
            loading._give_threads(c_engine._library)
        torch.set_num_threads(3)
        return c_engine.norm([torch.arange(500_000.0)], 2.0).item()

    yield norms_with
    loading._give_threads(c_engine._library)


def test_threads_of_intels_runtime_give_the_same_bits(threads_of):
    runtime, needed = OtherRuntime(), threads_of(loading._runtime_of_torch)
    assert threads_of(lambda: runtime) == needed
    assert runtime.asked == [(7, 3)]


@pytest.mark.parametrize("loaded", [True, False])
def test_on_windows_the_runtime_is_the_one_that_torch_has_loaded(threads_of, monkeypatch, loaded):
    """Simulated: what Windows' own functions answer is given."""

    def handle_of(name):
        return 4096 if loaded and name == "libiomp5md.dll" else None

    runtime, needed = OtherRuntime(), threads_of(loading._runtime_of_torch)
    kernel = SimpleNamespace(GetModuleHandleW=handle_of)
    by_handle = {("libiomp5md.dll", 4096): runtime}
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "WinDLL", lambda name: kernel, raising=False)
        patch.setattr(ctypes, "CDLL", lambda name, handle: by_handle[name, handle])
        assert threads_of(loading._runtime_of_torch, "win32") == needed
    assert runtime.asked == ([(7, 3)] if loaded else [])


@pytest.mark.parametrize("runtime", [object(), OSError("none is loaded")], ids=repr)
def test_no_runtime_is_no_error(threads_of, runtime):
    def found():
        if isinstance(runtime, OSError):
            raise runtime
        return runtime

    assert threads_of(found) == threads_of(loading._runtime_of_torch)


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

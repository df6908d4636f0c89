"""What the kernels are compiled to, which needs no device."""

import itertools
import math
import re

import pytest

BLOCK, THREADS = 4096, 256
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
"""Their names in Triton, and their sizes."""
ORDERS = (2.0, 1.0, math.inf, 3.0)
TYPES = {
    **dict.fromkeys(("addresses", "weight_addresses"), "*i64"),
    **dict.fromkeys(("pieces", "starts", "first_pieces"), "*i64"),
    **dict.fromkeys(("sums", "totals", "norm", "results", "numbers"), "*fp64"),
    **dict.fromkeys(("programs", "grouped", "first", "rows"), "i32"),
    **dict.fromkeys("abcdefgh", "i64"),
    "arrived": "*i32",
}
"""Of what is given at every launch; all else is known when compiling."""


def compiled(kernel: str, capability: int = 90, **constants: object) -> list[str]:
    """Return the instructions of a kernel, and its labels."""
    triton = pytest.importorskip("triton", reason="there is no Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gradclip.engines.triton import kernels
    from gradclip.engines.triton.launching import OPTIONS

    function = getattr(kernels, kernel)
    names = function.arg_names
    types = {name: TYPES[name] for name in names if name not in constants}
    try:
        every = {name: types.get(name, "constexpr") for name in names}
        known = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=function, signature=every, constexprs=known)
    except TypeError:  # Triton 3.2
        source = ASTSource(fn=function, signature=types, constants=constants)
    target = GPUTarget("cuda", capability, 32)
    text = triton.compile(source, target=target, options=OPTIONS).asm["ptx"]
    assert f".target sm_{capability}" in text
    lines = [line.partition("//")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith((".loc", "$L__tmp"))]


def power_sums(dtype: str, order: float, total=True, capability=90, *, each=False) -> list[str]:
    tl = pytest.importorskip("triton.language", reason="there is no Triton")
    each = each or not total
    constants = {"ORDER": order, "ELEMENT": tl.dtype(dtype), "BLOCK": BLOCK}
    constants |= {"EACH": each, "TOTAL": total} | ({} if each else {"sums": None})
    constants |= {} if total else dict.fromkeys(("totals", "arrived", "norm"))
    return compiled("power_sums", capability, **constants)


def change(dtype: str, limit: bool, shared: bool, capability: int = 90) -> list[str]:
    tl = pytest.importorskip("triton.language", reason="there is no Triton")
    constants = {"LIMIT": limit, "ELEMENT": tl.dtype(dtype), "BLOCK": BLOCK, "SHARED": shared}
    return compiled("change", capability, **constants)


def clip_rows(dtype: str, weight: str, order: float, capability: int = 90) -> list[str]:
    tl = pytest.importorskip("triton.language", reason="there is no Triton")
    constants = {"FACTOR": 0.01, "EPS": 1e-3, "FLOOR": 0.0, "CAP": math.inf, "ERASE": True}
    constants |= {"WRITE": True, "ORDER": order, "BLOCK": BLOCK}
    constants |= {"ELEMENT": tl.dtype(dtype), "WEIGHT": tl.dtype(weight)}
    return compiled("clip_rows", capability, **constants)


def innermost_loops(lines: list[str]) -> list[list[str]]:
    """Return what lies between each label and the last branch back to it, and has no such loop."""
    labels = {line[:-1]: place for place, line in enumerate(lines) if line.endswith(":")}
    ends: dict[int, int] = {}
    for place, line in enumerate(lines):
        target = re.search(r"\bbra\S*\s+(\$\w+);", line)
        if target and labels[target[1]] < place:
            ends[labels[target[1]]] = place
    loops = [*ends.items()]
    return [
        lines[begin:end]
        for begin, end in loops
        if not any(begin < first and last < end for first, last in loops)
    ]


def moves(lines: list[str], what: str) -> list[bool]:
    """Tell of every load, or store, whether it moves 16 bytes, whatever the lane."""
    found = [line for line in lines if f"{what}.global" in line]
    wide = re.compile(rf"(@!?%p\d+ )?{what}\.global\S*\.(v4\.[bfu]32|v2\.[bfu]64)\s")
    return [wide.match(line) is not None for line in found]


def check_everywhere(lines: list[str]) -> None:
    """Check what no kernel may do."""
    text = "\n".join(lines)
    assert ".local" not in text  # what does not fit into registers
    assert not re.search(r"\b(div\.full|(div|sqrt|rsqrt|ex2|lg2)\.approx)", text)
    atomics = re.findall(r"\b(?:atom|red)\.\S+", text)
    assert all(re.search(r"\.add\.[us]32$", atomic) for atomic in atomics)


def checked_loop(lines: list[str], dtype: str) -> list[str]:
    """Check a kernel; return its loop that reads, 16 bytes at a time."""
    check_everywhere(lines)
    [loop] = [loop for loop in innermost_loops(lines) if any(moves(loop, "ld"))]
    assert moves(loop, "ld") == [True] * (BLOCK * DTYPES[dtype] // THREADS // 16)
    return loop


def mark(*values: object, quick: bool) -> object:
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


QUICK = {("fp32", 2.0), ("fp32", 1.0), ("bf16", 1.0), ("fp16", 1.0), ("bf16", math.inf)}
SUMS = [
    mark(dtype, order, total, quick=total and (dtype, order) in QUICK)
    for dtype, order, total in itertools.product(DTYPES, ORDERS, (True, False))
]
CHANGES = [
    mark(dtype, limit, shared, quick=shared and dtype == "bf16")
    for dtype, limit, shared in itertools.product(DTYPES, (False, True), (True, False))
]


@pytest.mark.parametrize(("dtype", "order", "total"), SUMS)
def test_what_is_measured_is_read_16_bytes_at_a_time(dtype, order, total):
    lines = power_sums(dtype, order, total)
    loop = checked_loop(lines, dtype)
    if dtype != "fp64" and order in (1.0, 2.0):  # in float32 while it reads
        assert any(".f32" in line for line in loop)
        assert not any(".f64" in line for line in loop)
    assert not any(".shared" in line or "bar.sync" in line for line in loop)
    assert any(".add." in line and "atom" in line for line in lines) is total
    if order == 2.0 and total:
        assert any(line.startswith("sqrt.rn.f64") for line in lines)


@pytest.mark.parametrize("dtype", [mark(dtype, quick=dtype == "fp32") for dtype in DTYPES])
def test_sums_of_the_pieces_beside_the_norm_cost_one_store_each(dtype):
    lines = power_sums(dtype, 2.0, each=True)
    checked_loop(lines, dtype)
    assert len(moves(lines, "st")) == len(moves(power_sums(dtype, 2.0), "st")) + 1


@pytest.mark.parametrize(("dtype", "limit", "shared"), CHANGES)
def test_what_is_changed_is_read_and_written_16_bytes_at_a_time(dtype, limit, shared):
    lines = change(dtype, limit, shared)
    loop = checked_loop(lines, dtype)
    assert not any("atom" in line for line in lines)
    assert moves(loop, "st") == moves(loop, "ld")


PAIRS = [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp64", "fp64")]


@pytest.mark.parametrize(
    ("dtype", "weight"), [mark(*pair, quick=pair == ("fp32", "fp32")) for pair in PAIRS]
)
def test_rows_and_their_weights_are_read_once_and_rows_written_16_bytes_at_a_time(dtype, weight):
    """Limits and coefficients are computed in float64: 0.01 is not rounded to float32."""
    lines = clip_rows(dtype, weight, 2.0)
    check_everywhere(lines)
    loops = [moves(loop, "ld") for loop in innermost_loops(lines) if any(moves(loop, "ld"))]
    wide = sorted(len(loop) for loop in loops if all(loop))
    sizes = [BLOCK * DTYPES[name] // THREADS // 16 for name in (dtype, weight, dtype)]
    assert wide == sorted(sizes)  # measured, measured, and scaled
    text = "\n".join(lines)
    assert "0d3F847AE147AE147B" in text
    assert "sqrt.rn.f64" in text
    assert "div.rn.f64" in text


CAPABILITIES = (70, 80)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_older_devices_are_compiled_for(dtype, capability):
    for order in (2.0, math.inf, 3.0):
        check_everywhere(power_sums(dtype, order, capability=capability))
    for limit in (False, True):
        check_everywhere(change(dtype, limit, False, capability))
    check_everywhere(clip_rows(dtype, dtype, 2.0, capability))


@pytest.mark.parametrize("capability", [*CAPABILITIES, 90])
def test_small_kernels_are_compiled_for_every_device(capability):
    for order in (2.0, math.inf):
        check_everywhere(compiled("strip_sums", capability, ORDER=order))
    lines = compiled("write_addresses", capability)
    assert sum("st.global" in line for line in lines) == 8

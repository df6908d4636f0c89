"""The functions that torch has too, against torch's own and against exact norms.

In float64 both agree wherever torch is right, in narrower dtypes as far as torch's own rounding
goes. `EXCLUDED` lists where torch is no measure, each with a proof that it still is so. If a proof
fails, torch has changed: the entry can go once no torch for which it holds is tested.
"""

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import utils

import gradclip
from gradclip import ArgumentError, GradientError, NonFiniteGradientError
from tests.models.rules import model_norm
from tests.support.reference import bits_of, parameter_with
from tests.support.tolerances import ROUNDOFF

INF, NAN = math.inf, math.nan
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
C128, C64 = torch.complex128, torch.complex64
REAL = {C128: F64, C64: F32}
SMALLEST = {F64: 2.0**-1074, F32: 2.0**-149, F16: 2.0**-24, BF16: 2.0**-133}
EPSILON = 1e-6
"""What torch adds to a norm before it divides by it."""


def real(dtype: torch.dtype) -> torch.dtype:
    return REAL.get(dtype, dtype)


# Where torch is no measure


OLDEST, NEWEST = (2, 9), (2, 13)
"""The torch versions between which every proof holds."""
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


class Exclusion(NamedTuple):
    reason: str
    proof: Callable[[], bool]
    """True as long as torch does so."""
    refused: tuple[Callable[[], Any], ...] = ()
    """What torch takes without sense, and gradclip refuses; random gradients have none of it."""


def fails(call: Callable[[], Any], error: type[Exception] = RuntimeError) -> bool:
    try:
        call()
    except error:
        return True
    return False


def warns(call: Callable[[], Any]) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return any("is an empty generator" in str(warning.message) for warning in caught)


def after(clip: Callable[..., Any], gradient: Tensor, *arguments: Any) -> list[Any]:
    clip([parameter_with(gradient)], *arguments)
    return gradient.tolist()


def norm_by_torch(*values: float, dtype: torch.dtype = F64, order: float = 2.0) -> Tensor:
    return utils.get_total_norm([torch.tensor(values, dtype=dtype)], order)


def sparse_entries() -> Tensor:
    return torch.sparse_coo_tensor([[0, 0, 2]], [2.0, 1.0, 4.0], (3,), dtype=F64)


EXCLUDED = {
    "epsilon": Exclusion(
        "torch divides by the norm + 1e-6: what it clips ends below the threshold, and what is at "
        "the threshold is changed",
        lambda: after(utils.clip_grad_norm_, torch.tensor([0.0, 1.0], dtype=F64), 1.0)[1] < 1.0,
    ),
    "not finite": Exclusion(
        "torch makes finite elements 0 and others NaN, gradclip leaves all as they are",
        lambda: str(after(utils.clip_grad_norm_, torch.tensor([3.0, INF]), 1.0)) == "[0.0, nan]",
    ),
    "range": Exclusion(
        "torch adds powers up in float32, or in float64 beyond its range: norms of 0 or infinity",
        lambda: (
            norm_by_torch(1e20, 1e20, dtype=F32).item() == INF
            and norm_by_torch(1e-25, 1e-25, dtype=F32).item() == 0
            and norm_by_torch(*[6e4] * 4, dtype=F16).item() == INF
        ),
    ),
    "rounded norm": Exclusion(
        "torch rounds norms to the dtype of the gradients, and returns them so",
        lambda: norm_by_torch(*[1.0] * 123, dtype=BF16).item() == 11.0625,
    ),
    "empty": Exclusion(
        "torch knows no largest element of an empty tensor, gradclip says 0",
        lambda: fails(lambda: utils.get_total_norm([torch.empty(0)], INF)),
    ),
    "no gradients": Exclusion(
        "torch's clip_grad_value_ fails where there is no gradient; gradclip does nothing",
        lambda: fails(lambda: utils.clip_grad_value_([parameter_with(None)], 1.0)),
    ),
    "no generator": Exclusion(
        "torch warns of an empty generator, gradclip of any iterator that yields nothing",
        lambda: warns(lambda: utils.clip_grad_norm_((p for p in []), 1.0)),
    ),
    "twice": Exclusion(
        "torch counts and scales a gradient as often as it is given, gradclip once",
        lambda: utils.get_total_norm([torch.ones(1).expand(1)] * 4).item() == 2.0,
    ),
    "sparse": Exclusion(
        "torch does not clip sparse gradients",
        lambda: all(
            fails(
                lambda clip=clip: clip([parameter_with(sparse_entries())], 1.0), NotImplementedError
            )
            for clip in (utils.clip_grad_norm_, utils.clip_grad_value_)
        ),
    ),
    "shared memory": Exclusion(
        "torch refuses to write to expanded gradients, and scales an element of one that overlaps "
        "as often as it occurs; gradclip scales memory once",
        lambda: (
            fails(lambda: after(utils.clip_grad_norm_, torch.ones(1).expand(4), 1.0))
            and after(utils.clip_grad_norm_, overlapping(torch.ones(4)), 1.0)[0][1] < 0.3
        ),
    ),
    "conjugate": Exclusion(
        "torch's foreach operators refuse lazy conjugates",
        lambda: fails(lambda: after(utils.clip_grad_norm_, torch.tensor([3 + 4j]).conj(), 1.0)),
    ),
    "one element": Exclusion(
        "torch's foreach operators refuse a norm of shape (1,), gradclip takes it",
        lambda: fails(
            lambda: after(utils.clip_grads_with_norm_, torch.ones(2), 1.0, torch.ones(1))
        ),
    ),
    "large bound": Exclusion(
        "torch refuses a bound above the largest number of a dtype; gradclip bounds to that number",
        lambda: fails(lambda: after(utils.clip_grad_value_, torch.ones(2, dtype=F16), 1e20)),
    ),
    "complex value": Exclusion(
        "neither bounds complex elements; gradclip says so with an error of its own",
        lambda: fails(
            lambda: after(utils.clip_grad_value_, torch.tensor([3 + 4j]), 1.0), RuntimeError
        ),
    ),
    "order": Exclusion(
        "torch takes orders that make no norm of the whole from norms of its parts, and NaN",
        lambda: (
            norm_by_torch(3.0, 4.0, order=0.0).item() == 1.0
            and norm_by_torch(3.0, 4.0, order=-INF).item() == 3.0
            and math.isnan(norm_by_torch(3.0, 4.0, order=NAN).item())
        ),
        tuple(
            lambda order=order: gradclip.get_total_norm([torch.ones(1)], order)
            for order in (0.0, -1.0, -INF, NAN, "2")
        ),
    ),
    "threshold": Exclusion(
        "torch takes a negative threshold and turns the gradients round",
        lambda: after(utils.clip_grad_norm_, torch.tensor([3.0, 4.0]), -5.0)[0] < 0,
        tuple(
            lambda limit=limit: after(gradclip.clip_grad_norm_, torch.ones(1), limit)
            for limit in (-5.0, NAN, "2")
        ),
    ),
    "bound": Exclusion(
        "torch takes a negative bound, and NaN, and sets every element to it",
        lambda: (
            after(utils.clip_grad_value_, torch.tensor([3.0, -4.0]), -1.0) == [-1.0, -1.0]
            and math.isnan(after(utils.clip_grad_value_, torch.tensor([3.0]), NAN)[0])
        ),
        tuple(
            lambda bound=bound: after(gradclip.clip_grad_value_, torch.ones(1), bound)
            for bound in (-1.0, NAN, "2")
        ),
    ),
}
met: set[str] = set()
"""Those that random gradients have met."""


def overlapping(values: Tensor) -> Tensor:
    return values.as_strided((len(values) - 1, 2), (1, 1))


@pytest.mark.parametrize("name", EXCLUDED)
def test_torch_is_still_no_measure(name):
    """What torch takes without sense is refused; a newer torch may have mended its fault."""
    for call in EXCLUDED[name].refused:
        with pytest.raises(ArgumentError, match="give "):
            call()
    if not EXCLUDED[name].proof():
        change = f"torch has changed: {EXCLUDED[name].reason}"
        assert not OLDEST <= VERSION <= NEWEST, change
        pytest.skip(change)


# Random gradients


class GradientCase(NamedTuple):
    """A gradient in words."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str
    values: str
    scale: float
    seed: int

    def tensor(self) -> Tensor:
        """Make it; every call makes an equal one in memory of its own."""
        generator = torch.Generator().manual_seed(self.seed)
        numel = math.prod(self.shape)
        wide = C128 if self.dtype.is_complex else F64
        values = torch.randn(numel, generator=generator, dtype=wide) * self.scale
        if self.values == "constant":
            values.fill_(0.7 * self.scale)
        elif self.values == "few":
            signs = torch.randint(-1, 2, (numel,), generator=generator)
            values = signs.to(wide) * self.scale
        elif numel and self.values in ("nan", "inf", "-inf"):
            values[self.seed % numel] = float(self.values)
        return laid_out(values.to(self.dtype).reshape(self.shape), self.layout)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Return equal values, or some of them, in another layout."""
    if layout == "sliced":
        return torch.stack([values, values.flip(0) if values.dim() else values], -1)[..., 0]
    if layout == "transposed":
        return values.mT.contiguous().mT if values.dim() > 1 else values
    if layout == "shifted" and values.numel():
        flat = values.flatten()
        return torch.cat([flat[:1], flat])[1:].reshape(values.shape)
    if layout == "expanded" and values.dim():
        return values[:1].clone().expand(values.shape)
    if layout == "overlapping" and values.dim() == 1 and len(values) > 1:
        return overlapping(values)
    if layout == "conjugate":
        return values.conj()
    if layout == "negative" and values.is_complex():
        return values.conj().imag
    if layout == "sparse" and values.dim():
        return values.to_sparse(1)
    # The sum of a complex infinity may be inf + nan j, whose magnitude is a matter of opinion.
    summable = not values.is_complex() or bool(values.isfinite().all())
    if layout == "uncoalesced" and values.dim() and summable:
        indices = torch.arange(len(values)) // 2
        return torch.sparse_coo_tensor(indices[None], values, values.shape)
    return values


class Arguments(NamedTuple):
    """What a function is given."""

    gradients: list[GradientCase | None]
    twice: str
    container: str
    order: float
    share: float
    foreach: bool | None

    def parameters(self) -> list[nn.Parameter]:
        found = [parameter_with(None if each is None else each.tensor()) for each in self.gradients]
        if self.twice == "parameter":
            return [*found, *found[:1]]
        if self.twice == "gradient":
            return [*found, *(parameter_with(each.grad) for each in found[:1])]
        return found


DTYPES = [F64, F64, F32, F16, BF16, C128, C64]
SHAPES = [(5,), (3, 4), (), (1,), (2, 3, 2), (257,), (0,), (0, 3), (40, 7)]
LAYOUTS = ["plain"] * 4 + ["sliced", "transposed", "shifted"]
ODD = ["expanded", "overlapping", "conjugate", "negative", "sparse", "uncoalesced"]
VALUES = ["random", "random", "constant", "few"]


def argument_cases(
    dtypes: Iterable[torch.dtype] = DTYPES,
    layouts: Iterable[str] = (*LAYOUTS, *ODD),
    values: Iterable[str] = (*VALUES, *VALUES, "nan", "inf", "-inf"),
    scales: Iterable[float] = (1.0, 1.0, 1e-3, 300.0, 1e-30, 1e30, 1e-42, 1e200),
    twice: Iterable[str] = ("no", "no", "no", "parameter", "gradient"),
) -> st.SearchStrategy[Arguments]:
    gradients = st.builds(
        GradientCase,
        st.sampled_from([*dtypes]),
        st.sampled_from(SHAPES),
        st.sampled_from([*layouts]),
        st.sampled_from([*values]),
        st.sampled_from([*scales]),
        st.integers(0, 2**16),
    )
    return st.builds(
        Arguments,
        st.lists(st.one_of(gradients, gradients, gradients, st.none()), max_size=7),
        st.sampled_from([*twice]),
        st.sampled_from(["list", "tuple", "generator", "iterator", "single"]),
        st.sampled_from([2.0, 2.0, 2.0, 1.0, 3.0, 1.5, 0.5, INF]),
        st.sampled_from([1e-3, 0.3, 0.999, 1.0, 1.001, 50.0, 0.0, INF]),
        st.sampled_from([None, True, False]),
    )


ordinary = argument_cases([F64], LAYOUTS, VALUES, [1.0, 1e-3, 300.0, 1e30], ["no"])
"""What torch has to agree about to the last digits."""


def contained(tensors: list[Tensor], container: str) -> Any:
    """Return tensors as a user may give them; in a generator they can be read once."""
    if container == "single" and len(tensors) == 1:
        return tensors[0]
    makers: dict[str, Callable[[list[Tensor]], Any]] = {
        "tuple": tuple,
        "generator": lambda given: (tensor for tensor in given),
        "iterator": iter,
    }
    return makers.get(container, list)(tensors)


def distinct_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the distinct gradients."""
    return [*{id(p.grad): p.grad for p in parameters if p.grad is not None}.values()]


def entries_in_float64(gradient: Tensor) -> Tensor:
    """Return a copy of the elements in float64, of a sparse gradient those of its entries."""
    gradient = gradient._values() if gradient.is_sparse else gradient
    return gradient.detach().to(C128 if gradient.is_complex() else F64).clone()


def dense(gradient: Tensor) -> Tensor:
    """Return a copy of the elements in float64, of a sparse gradient all sums of its entries."""
    return entries_in_float64(gradient.to_dense() if gradient.is_sparse else gradient)


def magnitudes(gradients: Iterable[Tensor]) -> list[float]:
    """Return the absolute values of all elements, of duplicates those of their sums."""
    found: list[float] = []
    for gradient in gradients:
        values = gradient.coalesce()._values() if gradient.is_sparse else gradient
        found += values.to(C128 if values.is_complex() else F64).abs().flatten().tolist()
    return found


def has_narrow_dtype(gradients: Iterable[Tensor]) -> bool:
    return any(real(gradient.dtype) is not F64 for gradient in gradients)


def exclusions(case: Arguments, parameters: list[nn.Parameter]) -> set[str]:
    """Say why torch is no measure of a case."""
    gradients = distinct_gradients(parameters)
    given = [each for each in case.gradients if each is not None]
    layouts = {each.layout for each in given}
    largest = max((value for value in magnitudes(gradients) if value < INF), default=0.0)
    least, most = (1e-6, 1e4) if has_narrow_dtype(gradients) else (1e-90, 1e90)
    norm = model_norm(magnitudes(gradients), case.order)
    reasons = {
        "twice": sum(p.grad is not None for p in parameters) > len(gradients),
        "sparse": any(gradient.is_sparse for gradient in gradients),
        "shared memory": bool(layouts & {"expanded", "overlapping"}),
        "conjugate": bool(layouts & {"conjugate", "negative"}),
        "empty": case.order == INF and any(gradient.numel() == 0 for gradient in gradients),
        "no gradients": not gradients,
        "no generator": not parameters and case.container == "generator",
        "complex value": any(gradient.is_complex() for gradient in gradients),
        "range": largest != 0 and (not least < largest < most or most * 6 < norm < INF),
        "not finite": not norm < INF,
        "rounded norm": has_narrow_dtype(gradients),
    }
    found = {name for name, holds in reasons.items() if holds}
    met.update(found)
    return found


def norm_margin(case: Arguments, gradients: list[Tensor]) -> float:
    """How far torch's norm may be off, which rounds each tensor's norm and adds in float32."""
    if not has_narrow_dtype(gradients):
        return 1e-12
    count = sum(gradient.numel() for gradient in gradients)
    unit = max(ROUNDOFF[real(gradient.dtype)] for gradient in gradients)
    parts = (len(gradients) + 3) * unit + (count + 8) * ROUNDOFF[F32]
    return 2 * parts / min(1.0, case.order)


def bits_and_version(gradient: Tensor) -> tuple[bytes, int]:
    values = gradient._values() if gradient.is_sparse else gradient
    return bits_of(values.resolve_conj().resolve_neg()), gradient._version


def assert_is_product(found: Tensor, original: Tensor, factor: float, accuracy: float) -> None:
    """Check that a gradient is another times a factor, up to the rounding of its dtype."""
    dtype = real(found.dtype)
    margin = original.abs() * factor * (3 * ROUNDOFF[dtype] + accuracy) + 2 * SMALLEST[dtype]
    assert bool(((entries_in_float64(found) - original * factor).abs() <= margin).all())


def limit_of(case: Arguments, norm: float) -> float:
    return norm * case.share if 0 < norm < INF and case.share else min(case.share, 1.0)


# Clipping it


def check_clipping(case: Arguments, *, apart: bool, raises: bool) -> None:
    """Clip with gradclip, look at what became of the gradients, and let torch do the same."""
    ours, theirs = case.parameters(), case.parameters()
    excluded = exclusions(case, theirs)
    gradients = distinct_gradients(ours)
    norm = model_norm(magnitudes(gradients), case.order)
    accuracy = 1e-6 if has_narrow_dtype(gradients) else 1e-12
    before = [bits_and_version(gradient) for gradient in gradients]
    originals = [entries_in_float64(gradient) for gradient in gradients]
    measured = gradclip.get_total_norm(gradients, case.order).item()
    assert measured == pytest.approx(norm, rel=accuracy, abs=0, nan_ok=True)
    assert [bits_and_version(g) for g in gradients] == before
    if not excluded & {"sparse", "empty", "range"}:
        needed = utils.get_total_norm(distinct_gradients(theirs), case.order).item()
        assert measured == pytest.approx(needed, rel=norm_margin(case, gradients), nan_ok=True)
    limit = limit_of(case, measured)
    objects = [p.grad for p in ours]
    found: float | None
    try:
        with announced(case, ours):
            found = clip_by(gradclip, ours, limit, case, apart=apart, raises=raises)
    except NonFiniteGradientError:
        assert raises
        assert not norm < INF
        found = None
    assert all(p.grad is each for p, each in zip(ours, objects, strict=True))
    if found is not None:
        assert found == pytest.approx(norm, rel=accuracy, abs=0, nan_ok=True)
        assert norm < INF or not raises
    if not measured > limit or not measured < INF:
        assert [bits_and_version(g) for g in gradients] == before
    else:
        for gradient, original in zip(gradients, originals, strict=True):
            assert_is_product(gradient, original, limit / norm, accuracy)
    unfit = {"twice", "sparse", "shared memory", "conjugate", "empty", "range", "not finite"}
    if excluded & {*unfit, "no generator"} or not norm < INF:
        return
    met.add("epsilon")
    assert clip_by(utils, theirs, limit, case, apart=apart, raises=raises) == pytest.approx(
        norm, rel=norm_margin(case, gradients)
    )
    if limit < INF and not any(g.dtype in (F16, BF16) for g in gradients):
        factor = min(1.0, limit / (norm + EPSILON))
        margin = norm_margin(case, gradients)
        for gradient, original in zip(distinct_gradients(theirs), originals, strict=True):
            assert_is_product(gradient, original, factor, margin)


def announced(case: Arguments, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Expect gradclip's warning of an iterator that yields nothing, and no other one."""
    if parameters or case.container not in ("generator", "iterator"):
        return nullcontext()
    return pytest.warns(UserWarning, match="that yields no tensor")


def clip_by(
    module: Any, parameters: list[nn.Parameter], limit: float, case: Arguments, **way: bool
) -> float:
    """Clip in one call or in two; return the norm."""
    given, foreach = contained(parameters, case.container), case.foreach
    if not way["apart"]:
        norm = module.clip_grad_norm_(given, limit, case.order, way["raises"], foreach)
        assert not norm.requires_grad
        return norm.item()
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = module.get_total_norm(gradients, case.order, way["raises"], foreach)
    assert module.clip_grads_with_norm_(given, limit, norm, foreach) is None
    return norm.item()


def check_given_norm(
    case: Arguments, norm: float, dtype: torch.dtype, shape: tuple[int, ...], limit: float
) -> None:
    """Scale by any norm that is given."""
    ours, theirs = case.parameters(), case.parameters()
    total = torch.full(shape, norm, dtype=dtype)
    norm = total.item()
    before = [bits_and_version(p.grad) for p in ours if p.grad is not None]
    originals = [entries_in_float64(p.grad) for p in ours if p.grad is not None]
    call = (limit, total, case.foreach)
    with announced(case, ours):
        gradclip.clip_grads_with_norm_(contained(ours, case.container), *call)
    scaled = norm < INF and norm > limit
    for gradient, bit, original in zip(distinct_gradients(ours), before, originals, strict=True):
        assert scaled or bits_and_version(gradient) == bit
        assert_is_product(gradient, original, limit / norm if scaled else 1.0, 1e-12)
    if shape:
        met.add("one element")
        return
    if not norm < INF or limit == INF or not originals:
        return
    utils.clip_grads_with_norm_(contained(theirs, case.container), *call)
    for gradient, original in zip(distinct_gradients(theirs), originals, strict=True):
        factor = min(1.0, limit / (norm + EPSILON))
        assert_is_product(gradient, original, factor, 4 * ROUNDOFF[dtype])


# Bounding elements


def check_bounding(case: Arguments, bound: float) -> None:
    ours, theirs = case.parameters(), case.parameters()
    excluded = exclusions(case, ours)
    gradients = distinct_gradients(ours)
    before, originals = [bits_and_version(g) for g in gradients], [dense(g) for g in gradients]
    given = contained(ours, case.container)
    if "complex value" in excluded:
        with pytest.raises(GradientError, match="complex elements cannot be bounded"):
            gradclip.clip_grad_value_(given, bound, case.foreach)
        assert [bits_and_version(g) for g in gradients] == before
        return
    with announced(case, ours):
        assert gradclip.clip_grad_value_(given, bound, case.foreach) is None
    for gradient, bit, original in zip(gradients, before, originals, strict=True):
        rounded = torch.tensor(bound, dtype=F64).to(gradient.dtype).double().item()
        if bound < INF:
            rounded = min(rounded, torch.finfo(gradient.dtype).max)
        needed = original.clamp(-rounded, rounded)
        torch.testing.assert_close(dense(gradient), needed, rtol=0, atol=0, equal_nan=True)
        if not gradient.is_sparse and not bool((original.abs() > rounded).any()):
            assert bits_and_version(gradient) == bit
    if any(torch.finfo(gradient.dtype).max < bound < INF for gradient in gradients):
        excluded.add("large bound")
        met.add("large bound")
    unfit = {"no gradients", "sparse", "shared memory", "conjugate", "large bound"}
    if not excluded & unfit:
        utils.clip_grad_value_(contained(theirs, case.container), bound, case.foreach)
        for one, other in zip(gradients, distinct_gradients(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


# Random gradients, few in every run and many in the slow one

real_cases = argument_cases([F64, F32, F16, BF16] * 4 + [C64])
CHECKS = {
    "clipping": (
        check_clipping,
        {"case": argument_cases(), "apart": st.booleans(), "raises": st.booleans()},
        300,
        1500,
    ),
    "given norm": (
        check_given_norm,
        {
            "case": ordinary,
            "norm": st.sampled_from([0.0, 1e-30, 0.5, 1.0, 7.0, 1e30, NAN, INF]),
            "dtype": st.sampled_from([F64, F32, BF16]),
            "shape": st.sampled_from([(), (1,)]),
            "limit": st.sampled_from([0.0, 0.25, 1.0, 1e9, INF]),
        },
        100,
        100,
    ),
    "bounding": (
        check_bounding,
        {
            "case": real_cases,
            "bound": st.sampled_from([0.0, 1e-3, 0.1, 0.7, 1.0, 250.0, 1e20, INF]),
        },
        150,
        700,
    ),
}


@cache
def run_check(name: str, *, many: bool) -> frozenset[str]:
    """Run a check on random gradients, once; return the exclusions that these meet."""
    check, strategies, few, more = CHECKS[name]
    met.clear()
    settings(max_examples=more if many else few)(given(**strategies)(check))()
    return frozenset(met)


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHECKS)
def test_random_gradients(name, many):
    """The norm is exact, gradients are scaled or bounded exactly, and torch agrees where it can."""
    run_check(name, many=many)


def test_random_gradients_meet_all_that_is_excluded():
    found = {name for check in CHECKS for name in run_check(check, many=False)}
    assert found == {name for name, exclusion in EXCLUDED.items() if not exclusion.refused}

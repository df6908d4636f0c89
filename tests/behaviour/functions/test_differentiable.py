"""Clipping that is differentiated: out of place, in the graph of a gradient, and in torch.func."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import gradclip
from gradclip import GradClipError
from tests.support.reference import bits_of, clipped, norm_of, parameter_with

# Forward derivatives of some operators are functions that torch itself compiles in this way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
F64 = torch.float64
ORDERS = [1.0, 1.5, 2.0, 3.0, 4.0, math.inf]


def pieces(dtype: torch.dtype = F64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 1), (2,))]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 100.0])
@pytest.mark.parametrize(
    ("dtype", "order"),
    [*((F64, order) for order in ORDERS), *((torch.complex128, p) for p in (2.0, 3.0))],
)
def test_derivatives_are_those_of_finite_differences(order, threshold, dtype):
    """First and second ones of gradients and norm, also forward and batched."""

    def all_results(*tensors: Tensor) -> tuple[Tensor, ...]:
        gradients, norm = gradclip.clip_gradients(tensors, threshold, order)
        return (*gradients, norm)

    options = {"check_batched_grad": True}
    assert gradcheck(all_results, pieces(dtype), check_forward_ad=True, **options)
    assert gradgradcheck(all_results, pieces(dtype), check_fwd_over_rev=True)


@pytest.mark.parametrize("order", [0.5, *ORDERS])
@pytest.mark.parametrize(("threshold", "slope"), [(0.0, 0.0), (1.0, 1.0)])
def test_at_a_norm_of_0_derivatives_are_finite(order, threshold, slope):
    """A gradient of 0 stays as it is below a threshold above 0, and stays 0 below 0."""
    zeros = torch.zeros(3, dtype=F64, requires_grad=True)
    [gradient], norm = gradclip.clip_gradients(zeros, threshold, order)
    [first] = torch.autograd.grad(gradient.sum() + norm, zeros, create_graph=True)
    assert (gradient.tolist(), norm.item(), first.tolist()) == ([0.0] * 3, 0.0, [slope] * 3)
    [second] = torch.autograd.grad(first.sum(), zeros)
    assert bool((second + 0 == 0).all())


@pytest.mark.parametrize("order", ORDERS)
def test_values_are_those_of_float64_and_the_arguments_stay(order):
    """Of all dtypes together; a tensor given twice counts once and is returned twice."""
    kinds = [torch.float32, F64, torch.bfloat16, torch.float16, torch.complex64]
    tensors = [torch.randn(9, dtype=F64).to(kind) for kind in kinds]
    before = [(bits_of(tensor), tensor._version) for tensor in tensors]
    threshold = norm_of(tensors, order) / 3
    results, norm = gradclip.clip_gradients(iter([*tensors, tensors[0]]), threshold, order)
    assert [(bits_of(tensor), tensor._version) for tensor in tensors] == before
    assert (norm.shape, norm.dtype, norm.item()) == ((), F64, pytest.approx(3 * threshold))
    assert results[-1] is results[0]
    for result, tensor, needed in zip(
        results, tensors, clipped(tensors, threshold, order), strict=False
    ):
        assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(result, needed.to(tensor.dtype))


@pytest.mark.parametrize(
    "values", [[3e38, -1e38], [1e-40, 2e-42], [3.0, math.inf], [1.0, math.nan], [0.0, -0.0], []]
)
@pytest.mark.parametrize("threshold", [math.inf, 1e38])
def test_the_range_of_float32_is_no_limit(values, threshold):
    """And a gradient within the threshold, or not finite, keeps its bits."""
    gradient = torch.tensor(values)
    [result], norm = gradclip.clip_gradients([gradient], threshold)
    needed = norm_of([gradient])
    assert norm.item() == pytest.approx(needed, nan_ok=True, rel=1e-6, abs=0)
    if threshold < needed < math.inf:
        assert norm_of([result]) == pytest.approx(threshold, rel=1e-6)
    else:
        assert bits_of(result) == bits_of(gradient)
    assert gradclip.clip_gradients([], 1.0)[0] == []


def clipped_in_place(gradient: Tensor) -> Tensor:
    gradclip.clip_gradients_(gradient, 1.0)
    return gradient


def clipped_as_grad(gradient: Tensor) -> Tensor:
    parameter = parameter_with(gradient)
    norm = gradclip.clip_grad_norm_(parameter, 1.0)
    assert not norm.requires_grad
    return parameter.grad


def clipped_by_hook(gradient: Tensor, **options: object) -> Tensor:
    parameter = parameter_with(gradient)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    gradclip.GradientClipper(optimizer, 1.0, **options)
    optimizer.step()
    return parameter.grad


def clipped_by_parameter(gradient: Tensor) -> Tensor:
    """Clip it beside another parameter that has a norm of its own."""
    parameters = [parameter_with(gradient), parameter_with(torch.ones(2))]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    gradclip.GradientClipper(optimizer, 1.0, scope="parameter")
    optimizer.step()
    return parameters[0].grad


def outer_loss(
    weight: Tensor,
    clip: Callable[[Tensor], Tensor] = lambda g: gradclip.clip_gradients(g, 1.0)[0][0],
) -> Tensor:
    """Take three clipped steps of an inner loop, as MAML does, and return a loss of the result."""
    inner = weight
    for _ in range(3):
        loss = (inner**3).sum() + inner[0] * inner[1]
        [gradient] = torch.autograd.grad(loss, inner, create_graph=True)
        inner = inner - 0.1 * clip(gradient)
    return (inner**2).sum()


def difference_quotients(function: Callable[[Tensor], Tensor], at: Tensor) -> list[float]:
    steps = 1e-6 * torch.eye(len(at), dtype=F64)
    both = [[function((at + s * step).requires_grad_()).item() for s in (1, -1)] for step in steps]
    return [(ahead - behind) / 2e-6 for ahead, behind in both]


@pytest.mark.parametrize(
    "clip", [clipped_in_place, clipped_as_grad, clipped_by_hook, clipped_by_parameter]
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_meta_gradient_of_every_way_is_exact(clip, dtype):
    """In place as well: the derivative passes through the coefficient."""
    start = torch.tensor([1.0, 2.0], dtype=dtype)
    needed = difference_quotients(outer_loss, start.double())
    for way in (clip, *outer_loss.__defaults__):
        weight = start.clone().requires_grad_()
        [gradient] = torch.autograd.grad(outer_loss(weight, way), weight)
        assert gradient.tolist() == pytest.approx(needed, rel=1e-5)


def test_a_bounded_element_has_the_derivative_0():
    weight = torch.tensor([0.1, 3.0], dtype=F64, requires_grad=True)
    [gradient] = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    gradclip.clip_grad_value_(parameter_with(gradient), 1.0)
    assert gradient.tolist() == pytest.approx([0.03, 1.0])
    [second] = torch.autograd.grad(gradient.sum(), weight)
    assert second.tolist() == pytest.approx([0.6, 0.0])


ROWS = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=F64)
CLIPPED = [[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]


def written(row: Tensor) -> Tensor:
    gradient = row * 1
    gradclip.clip_gradients_([gradient], 1.0)
    return gradient


@pytest.mark.parametrize("clip", [written, lambda row: gradclip.clip_gradients(row, 1.0)[0][0]])
def test_in_vmap_every_example_is_clipped_by_its_own_norm(clip):
    assert torch.vmap(clip)(ROWS).tolist() == [pytest.approx(row) for row in CLIPPED]
    assert torch.vmap(gradclip.get_total_norm)(ROWS).tolist() == pytest.approx([5.0, 0.5, 0.0])
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(clip(forward_ad.make_dual(ROWS[0], ROWS[0])))
    assert result.primal.tolist() == pytest.approx([0.6, 0.8])
    assert result.tangent.tolist() == pytest.approx([0.0, 0.0], abs=1e-9)  # direction is kept
    slopes = torch.vmap(torch.func.jacrev(clip))(ROWS)
    torch.testing.assert_close(slopes, torch.vmap(torch.func.jacfwd(clip))(ROWS))
    assert slopes[0].flatten().tolist() == pytest.approx([0.128, -0.096, -0.096, 0.072])
    assert slopes[1:].tolist() == [torch.eye(2).tolist()] * 2


def test_in_torch_func_the_gradient_that_flows_back_is_clipped():
    def loss(row: Tensor) -> Tensor:
        y = gradclip.clip_backward(row, 1.0, 0.7, torch.amp.GradScaler("cpu", init_scale=1.0))
        return (y * torch.tensor([3.0, 0.4], dtype=F64)).sum()

    assert torch.vmap(torch.func.grad(loss))(ROWS).tolist() == [pytest.approx([0.7, 0.4])] * 3
    assert torch.func.jvp(loss, (ROWS[0],), (ROWS[0],))[1].item() == pytest.approx(10.6)


def shared_by_examples(row: Tensor) -> Tensor:
    return gradclip.clip_gradients_([row, torch.ones(2, dtype=F64)], 1.0)


def of_several_views(_: Tensor) -> Tensor:
    weight = torch.ones(2, 2, requires_grad=True)
    return gradclip.clip_gradients_((weight * 2).unbind(), 1.0)


def twice_backward(row: Tensor) -> Tensor:
    return torch.func.grad(lambda x: (gradclip.clip_backward(x, 1.0) ** 2).sum())(row).sum()


def with_graph(weight: Tensor = ROWS[0]) -> nn.Parameter:
    leaf = weight.clone().requires_grad_()
    [gradient] = torch.autograd.grad((leaf**2).sum(), leaf, create_graph=True)
    return parameter_with(gradient)


EYE = torch.eye(2)


def agc_by_hook(gradient: Tensor) -> None:
    optimizer = torch.optim.SGD([parameter_with(gradient)], lr=0.0)
    gradclip.GradientClipper(optimizer, gradclip.thresholds.RelativeToWeights(), scope="unit")
    optimizer.step()


NORM = torch.tensor(5.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torch.vmap(shared_by_examples)(ROWS), "cannot be written in place .*gradients"),
        (lambda: of_several_views(ROWS), "cannot be written in place .*clip_gradients"),
        (lambda: torch.func.jacrev(torch.func.grad(twice_backward))(ROWS[0]), "second derivative"),
        (
            lambda: torch.vmap(lambda x: gradclip.get_total_norm(x, error_if_nonfinite=True))(ROWS),
            "reads their norm on the host",
        ),
        (lambda: gradclip.clip_grads_with_norm_(with_graph(), 1.0, NORM), r"clip_gradients\("),
        (lambda: gradclip.clip_grad_units_(with_graph()), r"clip_gradients\("),
        (
            lambda: clipped_by_hook(with_graph().grad, max_value=0.1),
            "max_value would write",
        ),
        (
            lambda: clipped_by_hook(with_graph(EYE).grad, scope="unit"),
            "scope='unit' would",
        ),
        (lambda: agc_by_hook(with_graph(EYE).grad), r"clip_gradients\("),
        (lambda: gradclip.clip_gradients(torch.eye(2).to_sparse(), 1.0), "sparse gradient"),
        (lambda: gradclip.clip_gradients(torch.ones(2, dtype=torch.int64), 1.0), "int64"),
        (lambda: gradclip.clip_gradients([3.0], 1.0), "Found a float among"),
        (lambda: gradclip.clip_gradients([NORM], -1.0), "max_norm is -1"),
        (lambda: gradclip.clip_gradients([NORM], 1.0, 0), "norm_type is 0"),
    ],
)
def test_what_cannot_be_right_is_refused(call, message):
    with pytest.raises(GradClipError, match=message):
        call()


def test_nothing_is_written_within_the_threshold():
    parameter = with_graph()
    gradient, before = parameter.grad, parameter.grad.grad_fn
    gradclip.clip_grad_norm_(parameter, 10.0)
    gradclip.clip_grad_value_(parameter, 8.0)
    clipped_by_hook(gradient / 10)
    assert (gradient._version, gradient.grad_fn) == (0, before)

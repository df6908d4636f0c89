from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import nn

import gradclip
from gradclip import ArgumentError, GradientError, NonFiniteGradientError

NAMES = ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"]


def parameter(gradient: torch.Tensor) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype))
    made.grad = gradient
    return made


def norm64(gradients: list[torch.Tensor], order: float = 2.0) -> float:
    flat = [g.detach().to(torch.float64).flatten() for g in gradients]
    return torch.linalg.vector_norm(torch.cat(flat), order).item()


# The same names as torch


@pytest.mark.parametrize("name", NAMES)
def test_names_and_defaults_of_the_parameters_are_those_of_torch(name):
    def shape(function):
        return [
            (p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()
        ]

    assert shape(getattr(gradclip, name)) == shape(getattr(nn.utils, name))


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_on_ordinary_gradients_the_result_is_that_of_torch_in_float64(order, factor):
    ours = [parameter(torch.randn(shape, dtype=torch.float64)) for shape in [(3, 4), (5,), ()]]
    theirs = [parameter(p.grad.clone()) for p in ours]
    limit = factor * norm64([p.grad for p in ours], order)
    found = gradclip.clip_grad_norm_(ours, limit, order)
    needed = nn.utils.clip_grad_norm_(theirs, limit, order)
    assert found.item() == pytest.approx(needed.item(), rel=1e-12)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=0)  # torch adds 1e-6


def test_measuring_and_scaling_apart_do_the_same_as_together():
    together = [parameter(torch.randn(7)), parameter(torch.randn(3, 3))]
    apart = [parameter(p.grad.clone()) for p in together]
    gradclip.clip_grad_norm_(together, 0.5)
    total = gradclip.get_total_norm([p.grad for p in apart])
    gradclip.clip_grads_with_norm_(apart, 0.5, total)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_clip_grad_value_does_what_torch_does():
    gradient = torch.tensor([-3.0, 0.5, math.nan, math.inf, -math.inf])
    ours, theirs = parameter(gradient.clone()), parameter(gradient.clone())
    gradclip.clip_grad_value_([ours], 1.0)
    nn.utils.clip_grad_value_([theirs], 1.0)
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True, rtol=0, atol=0)


def test_clip_grad_value_writes_only_what_exceeds():
    small, large = parameter(torch.tensor([0.5])), parameter(torch.tensor([5.0]))
    versions = small.grad._version, large.grad._version
    gradclip.clip_grad_value_([small, large], 1.0)
    assert small.grad._version == versions[0]
    assert large.grad.item() == 1.0


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_is_accepted(foreach):
    weight = parameter(torch.tensor([3.0, 4.0]))
    gradclip.clip_grad_norm_([weight], 1.0, foreach=foreach)
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8])


# What they take


def test_a_single_tensor_and_a_generator_are_taken():
    weight = parameter(torch.tensor([3.0, 4.0]))
    assert gradclip.clip_grad_norm_(weight, 1.0).item() == 5.0
    weights = [parameter(torch.tensor([3.0])), parameter(torch.tensor([4.0]))]
    assert gradclip.clip_grad_norm_((w for w in weights), 1.0).item() == 5.0
    assert [w.grad.item() for w in weights] == pytest.approx([0.6, 0.8])


def test_a_generator_is_read_once():
    read = []

    def generate():
        for value in (3.0, 4.0):
            read.append(value)
            yield torch.tensor([value])

    assert gradclip.get_total_norm(generate()).item() == 5.0
    assert read == [3.0, 4.0]


@pytest.mark.parametrize("parameters", [[], [nn.Parameter(torch.ones(2))], iter([])], ids=str)
def test_no_gradients_at_all_have_the_norm_zero(parameters):
    norm = gradclip.clip_grad_norm_(parameters, 1.0)
    assert norm.shape == ()
    assert norm.dtype == torch.float64
    assert norm.item() == 0.0


def test_the_norm_is_a_plain_0d_float64_tensor_whatever_the_gradients_are():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.complex64):
        norm = gradclip.clip_grad_norm_(parameter(torch.ones(4, dtype=dtype)), 9.0)
        assert (norm.shape, norm.dtype, norm.item()) == ((), torch.float64, 2.0)


def test_a_parameter_given_twice_counts_and_is_scaled_once():
    weight = parameter(torch.tensor([3.0, 4.0]))
    assert gradclip.clip_grad_norm_([weight, weight], 1.0).item() == 5.0
    assert norm64([weight.grad]) == pytest.approx(1.0, rel=2e-7)


def test_parameters_that_share_a_gradient_object_count_once():
    gradient = torch.tensor([3.0, 4.0])
    assert gradclip.clip_grad_norm_([parameter(gradient), parameter(gradient)], 1.0).item() == 5.0
    assert norm64([gradient]) == pytest.approx(1.0, rel=2e-7)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float16)])
@pytest.mark.parametrize("reverse", [False, True])
def test_dtypes_may_be_mixed_in_any_order(dtypes, reverse):
    weights = [parameter(torch.full((2,), 4.0, dtype=dtype)) for dtype in dtypes]
    weights = weights[::-1] if reverse else weights
    assert gradclip.clip_grad_norm_(weights, 2.0).item() == 8.0
    assert [w.grad.tolist() for w in weights] == [[1.0, 1.0]] * 2


def test_gradients_that_require_a_gradient_are_scaled_outside_of_the_graph():
    weight = nn.Parameter(torch.tensor([3.0]))
    [gradient] = torch.autograd.grad((weight**2).sum(), weight, create_graph=True)
    weight.grad = gradient
    assert gradient.requires_grad
    assert not gradclip.clip_grad_norm_([weight], 1.0).requires_grad
    assert weight.grad is gradient
    assert gradient.item() == 1.0
    weight.grad = None


# The threshold


def test_at_the_threshold_nothing_is_written():
    weight = parameter(torch.tensor([3.0, 4.0]))
    version = weight.grad._version
    gradclip.clip_grad_norm_([weight], 5.0)
    assert weight.grad._version == version
    assert weight.grad.tolist() == [3.0, 4.0]


def test_an_infinite_threshold_measures_and_writes_nothing():
    weight = parameter(torch.tensor([3.0, math.inf]))
    version = weight.grad._version
    assert gradclip.clip_grad_norm_([weight], math.inf).item() == math.inf
    assert weight.grad._version == version


@pytest.mark.parametrize("max_norm", [0, 0.0, 1.0])
def test_gradients_of_zero_stay_zero(max_norm):
    weight = parameter(torch.zeros(5))
    assert gradclip.clip_grad_norm_([weight], max_norm).item() == 0.0
    assert weight.grad.tolist() == [0.0] * 5


def test_a_threshold_of_zero_erases():
    weight = parameter(torch.tensor([3.0, -4.0]))
    gradclip.clip_grad_norm_([weight], 0)
    assert weight.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_gradients_that_are_not_finite_stay_as_they_are_and_no_sign_is_turned(bad, dtype):
    weights = [parameter(torch.tensor([1.0, -2.0, bad], dtype=dtype)), parameter(torch.ones(2))]
    versions = [w.grad._version for w in weights]
    norm = gradclip.clip_grad_norm_(weights, 1e-3)
    assert not math.isfinite(norm.item())
    assert [w.grad._version for w in weights] == versions
    assert weights[0].grad[:2].tolist() == [1.0, -2.0]


def test_a_norm_that_is_not_finite_can_be_an_error():
    weight = parameter(torch.tensor([1.0, math.nan]))
    with pytest.raises(NonFiniteGradientError, match="norm of the gradients is nan: it must be"):
        gradclip.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError):
        gradclip.get_total_norm([weight.grad], error_if_nonfinite=True)
    assert weight.grad[0].item() == 1.0


def test_a_given_norm_that_is_not_finite_changes_nothing():
    weight = parameter(torch.tensor([3.0, 4.0]))
    for norm in (math.nan, math.inf):
        gradclip.clip_grads_with_norm_([weight], 1.0, torch.tensor(norm))
    assert weight.grad.tolist() == [3.0, 4.0]


# Kinds of gradients


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_count_by_their_modulus(order, dtype):
    gradient = torch.randn(40, dtype=dtype)
    modulus = gradient.to(torch.complex128).abs()
    needed = torch.linalg.vector_norm(modulus, order).item()
    weight = parameter(gradient.clone())
    assert gradclip.clip_grad_norm_([weight], needed / 2, order).item() == pytest.approx(
        needed, rel=1e-6
    )
    torch.testing.assert_close(weight.grad, gradient / 2, rtol=1e-6, atol=0)


def test_conjugate_views_are_scaled_in_place():
    gradient = torch.tensor([3 + 4j, 0j])
    conjugate = gradient.conj()
    assert conjugate.is_conj()
    assert gradclip.clip_gradients_([conjugate], 1.0).item() == 5.0
    torch.testing.assert_close(gradient, torch.tensor([0.6 + 0.8j, 0j]))


@pytest.mark.parametrize("coalesced", [True, False])
def test_duplicate_entries_of_sparse_gradients_do_not_count_twice(coalesced):
    gradient = torch.sparse_coo_tensor([[0, 0, 2]], [[2.0, 0.0], [1.0, 0.0], [0.0, 4.0]], (3, 2))
    gradient = gradient.coalesce() if coalesced else gradient
    weight = parameter(gradient)
    assert gradclip.clip_grad_norm_([weight], 1.0).item() == 5.0
    expected = torch.tensor([[0.6, 0.0], [0.0, 0.0], [0.0, 0.8]])
    torch.testing.assert_close(weight.grad.to_dense(), expected)


def test_clip_grad_value_bounds_the_sums_of_duplicate_entries():
    weight = parameter(torch.sparse_coo_tensor([[0, 0, 1]], [2.0, 2.0, 1.0], (3,)))
    gradclip.clip_grad_value_([weight], 3.0)
    assert weight.grad.to_dense().tolist() == [3.0, 1.0, 0.0]


UNFIT = {
    "integers": lambda: torch.ones(2, dtype=torch.int64),
    "booleans": lambda: torch.ones(2, dtype=torch.bool),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
    "no tensor": lambda: 3.0,
}


@pytest.mark.filterwarnings("ignore:.*")  # torch warns of half of these kinds when they are made
@pytest.mark.parametrize("kind", UNFIT)
def test_what_cannot_be_clipped_is_refused_before_anything_is_written(kind):
    good = torch.tensor([3.0, 4.0])
    with pytest.raises(GradientError, match=r"Found a .*(dtype|layout|float among)"):
        gradclip.clip_gradients_([good, UNFIT[kind]()], 1.0)
    assert good.tolist() == [3.0, 4.0]


def test_complex_gradients_have_no_value_to_clip():
    real, other = parameter(torch.tensor([9.0])), parameter(torch.tensor([9j]))
    with pytest.raises(GradientError, match="complex elements cannot be bounded"):
        gradclip.clip_grad_value_([real, other], 1.0)
    assert real.grad.item() == 9.0


def test_what_is_no_parameter_is_refused():
    with pytest.raises(GradientError, match="Found a str among the parameters: give tensors"):
        gradclip.clip_grad_norm_([parameter(torch.ones(1)), "weight"], 1.0)


@pytest.mark.parametrize("max_norm", [-1, math.nan, True, "1.0", None, torch.ones(2)])
def test_a_bad_threshold_is_refused(max_norm):
    weight = parameter(torch.tensor([3.0, 4.0]))
    for call in (
        lambda: gradclip.clip_grad_norm_([weight], max_norm),
        lambda: gradclip.clip_gradients_([weight.grad], max_norm),
        lambda: gradclip.clip_grads_with_norm_([weight], max_norm, torch.tensor(5.0)),
    ):
        with pytest.raises(ArgumentError, match="max_norm is "):
            call()
    assert weight.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("total", [5.0, torch.ones(2), None])
def test_a_norm_that_is_no_tensor_of_one_element_is_refused(total):
    with pytest.raises(ArgumentError, match="total_norm is .*: give the tensor of one element"):
        gradclip.clip_grads_with_norm_([parameter(torch.ones(1))], 1.0, total)


# Clipping on the way back


def through(x: torch.Tensor, gradient: torch.Tensor, **options) -> torch.Tensor:
    x = x.clone().requires_grad_()
    gradclip.clip_backward(x, **options).backward(gradient)
    return x.grad


def test_clip_backward_is_the_identity_forward_and_clips_the_whole_tensor_back():
    x = torch.randn(2, 3)
    assert torch.equal(gradclip.clip_backward(x, 1.0), x)
    gradient = torch.randn(2, 3)
    found = through(x, gradient, max_norm=0.1)
    torch.testing.assert_close(found, gradient * 0.1 / gradient.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clip_backward_below_the_limit_changes_nothing(dtype):
    gradient = torch.randn(50).to(dtype)
    assert torch.equal(through(torch.zeros(50, dtype=dtype), gradient, max_norm=1e3), gradient)


def test_clip_backward_bounds_values_first():
    gradient = torch.tensor([30.0, 4.0])
    assert through(torch.zeros(2), gradient, max_value=4.0).tolist() == [4.0, 4.0]
    both = through(torch.zeros(2), gradient, max_value=4.0, max_norm=1.0)
    assert both.tolist() == pytest.approx([math.sqrt(0.5)] * 2)


def test_clip_backward_lets_pass_what_is_not_finite():
    gradient = torch.tensor([1e3, math.inf])
    assert through(torch.zeros(2), gradient, max_norm=1.0, max_value=0.5).tolist() == [
        1e3,
        math.inf,
    ]


def test_clip_backward_leaves_the_gradient_that_others_hold():
    gradient = torch.tensor([30.0, 40.0])
    through(torch.zeros(2), gradient, max_norm=1.0)
    assert gradient.tolist() == [30.0, 40.0]


def test_clip_backward_takes_expanded_and_huge_gradients():
    x = torch.zeros(4, requires_grad=True)
    gradclip.clip_backward(x, 1.0).sum().backward()
    assert x.grad.tolist() == [0.5] * 4
    assert through(torch.zeros(4), torch.full((4,), 1e20), max_norm=1.0).tolist() == [0.5] * 4


def test_clip_backward_under_a_scaler_goes_by_the_true_norm():
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    x = torch.zeros(2, requires_grad=True)
    y = gradclip.clip_backward(x, max_norm=1.0, max_value=2.0, grad_scaler=scaler)
    scaler.scale((y * torch.tensor([0.1, 0.2])).sum()).backward()
    assert (x.grad / 65536.0).tolist() == pytest.approx([0.1, 0.2])
    x.grad = None
    y = gradclip.clip_backward(x, max_norm=1.0, grad_scaler=scaler)
    scaler.scale((y * torch.tensor([30.0, 40.0])).sum()).backward()
    assert (x.grad / 65536.0).tolist() == pytest.approx([0.6, 0.8])


def test_clip_backward_refuses_to_be_differentiated_twice():
    x = torch.ones(2, requires_grad=True)
    loss = (gradclip.clip_backward(x, 1.0) ** 2).sum()
    [gradient] = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_clip_backward_without_a_limit_is_refused():
    with pytest.raises(ArgumentError, match="Neither max_norm nor max_value is given"):
        gradclip.clip_backward(torch.ones(1))
    with pytest.raises(GradientError, match="complex"):
        gradclip.clip_backward(torch.ones(1, dtype=torch.complex64), max_value=1.0)


def test_clip_backward_without_a_graph_is_the_identity():
    x = torch.randn(3)
    assert not gradclip.clip_backward(x, 1.0).requires_grad

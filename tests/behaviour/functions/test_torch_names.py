"""torch's clipping functions under the same names, and the one for plain tensors.

Random gradients are held against torch and against exact norms in tests/models.
"""

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

import gradclip
from gradclip import GradClipError
from tests.support.reference import bits_of, norm_of, parameter_with


@pytest.mark.parametrize(
    "name", ["clip_grad_norm_", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"]
)
def test_signatures_are_those_of_torch(name):
    def signature(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default, p.kind) for p in parameters]

    assert signature(getattr(gradclip, name)) == signature(getattr(nn.utils, name))


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 3.0, math.inf])
def test_plain_tensors_have_one_norm_and_are_scaled_once(order):
    """Of all dtypes together; the result is a plain 0-d float64 tensor."""
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
    conjugate = torch.randn(9, dtype=torch.complex128).conj()
    tensors = [conjugate, *(torch.randn(9).to(kind) for kind in kinds)]
    needed = norm_of(tensors, order)
    norm = gradclip.clip_gradients_(iter([*tensors, tensors[1]]), needed / 2, order)
    assert (type(norm), norm.shape, norm.dtype) == (Tensor, (), torch.float64)
    assert norm.item() == pytest.approx(needed, rel=1e-6)
    assert norm_of(tensors, order) == pytest.approx(needed / 2, rel=4e-3)  # of bfloat16


def test_the_modulus_of_a_large_complex_element_is_finite():
    norm = gradclip.get_total_norm([torch.tensor([3e38 + 3e38j])], math.inf)
    assert norm.item() == pytest.approx(3e38 * math.sqrt(2))


@pytest.mark.parametrize(
    ("gradient", "max_norm"),
    [([3.0, 4.0], 5.0), ([3.0, 4.0], math.inf), ([0.0, 0.0], 0), ([math.nan, -2.0], 1e-3)],
)
def test_nothing_is_written(gradient, max_norm):
    """At or below the threshold, without one, or if the norm is not finite."""
    tensors = [torch.tensor(gradient), torch.zeros(1, dtype=torch.float16)]
    before = [(bits_of(tensor), tensor._version) for tensor in tensors]
    norm = gradclip.clip_gradients_(tensors, max_norm)
    assert norm.item() == pytest.approx(math.hypot(*gradient), nan_ok=True)
    assert [(bits_of(tensor), tensor._version) for tensor in tensors] == before


def test_gradients_with_a_graph_are_scaled_outside_of_it():
    weight = nn.Parameter(torch.tensor([3.0]))
    [gradient] = torch.autograd.grad((weight**2).sum(), weight, create_graph=True)
    weight.grad = gradient
    assert gradient.requires_grad
    for tracked in (True, False):
        with torch.set_grad_enabled(tracked):
            assert not gradclip.clip_grad_norm_([weight], 1.0).requires_grad
            assert torch.is_grad_enabled() is tracked
    assert weight.grad is gradient
    assert gradient.item() == 1.0
    weight.grad = None  # a cycle through the graph


COMPLEX, NAN = parameter_with(torch.tensor([9j])), parameter_with(torch.tensor([math.nan]))
UNFIT = (
    lambda: torch.ones(2, dtype=torch.int64),
    lambda: torch.ones(2, dtype=torch.bool),
    lambda: torch.ones(2).to(torch.float8_e4m3fn),
    lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    lambda: torch.eye(2).to_sparse_csr(),
    lambda: 3.0,
)


@pytest.mark.filterwarnings("ignore:.*")  # torch warns when half of the unfit ones are made
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: gradclip.clip_grad_norm_([p], -1), "max_norm is -1"),
        (lambda p: gradclip.clip_gradients_([p], True), "max_norm is True"),
        (lambda p: gradclip.clip_grads_with_norm_(p, -1, torch.tensor(5.0)), "max_norm is -1"),
        (lambda p: gradclip.clip_grads_with_norm_(p, 1.0, 5.0), "the tensor of one"),
        (lambda p: gradclip.clip_grads_with_norm_(p, 1.0, torch.ones(2)), "the tensor of one"),
        (lambda p: gradclip.clip_grad_norm_([p, "weight"], 1.0), "Found a str among the param"),
        (lambda p: gradclip.clip_grad_value_([p, COMPLEX], 1.0), "complex elements cannot be"),
        (lambda p: gradclip.clip_grad_norm_([p, NAN], 1.0, 2.0, True), "the gradients is nan: it"),
        *(
            (
                lambda p, make=make: gradclip.clip_gradients_([p.grad, make()], 1.0),
                r"Found a .*(dtype|layout|float among)",
            )
            for make in UNFIT
        ),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_written(call, message):
    weight = parameter_with(torch.tensor([3.0, 4.0]))
    with pytest.raises(GradClipError, match=message):
        call(weight)
    assert weight.grad.tolist() == [3.0, 4.0]

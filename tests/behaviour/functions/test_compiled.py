"""Compiled code: one graph, the same bits as elsewhere, and no gradient copied."""

import math
import os
import re
import shutil
import sys
from ast import literal_eval
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import gradclip
from gradclip import ArgumentError, NonFiniteGradientError
from tests.support.reference import bits_in, parameter_with

needs_cxx = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler"
)
INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, needs_cxx])
BACKENDS = ["eager", "aot_eager", INDUCTOR]

pytestmark = [
    # torch itself, when inductor is imported and, in 2.6, when it stores its settings:
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning"),
]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch.compiler.reset()


def learned(dtype: torch.dtype = torch.float32, width: int = 6) -> list[nn.Parameter]:
    """Return parameters with gradients, one without, and one a second time."""
    torch.manual_seed(1)
    gradients = [torch.randn(shape).to(dtype) * 3 for shape in ((width, 5), (5,), ())]
    parameters = [parameter_with(g, value=torch.randn_like(g)) for g in gradients]
    return [*parameters, nn.Parameter(torch.randn(3).to(dtype)), parameters[0]]


def in_one_graph(function: Callable[..., object], backend: str = "eager") -> Callable[..., object]:
    return torch.compile(function, backend=backend, fullgraph=True)


def assert_equal_parameters(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    assert bits_in([(p, p.grad) for p in ours]) == bits_in([(p, p.grad) for p in theirs])


def two_calls(parameters: list[nn.Parameter]) -> Tensor:
    norm = gradclip.get_total_norm(p.grad for p in parameters if p.grad is not None)
    gradclip.clip_grads_with_norm_(parameters, 1.0, norm)
    return norm


WAYS = {
    "norm": lambda parameters: gradclip.clip_grad_norm_(parameters, 1.0),
    "whole number": lambda parameters: gradclip.clip_grad_norm_(parameters, 1),
    "largest element": lambda parameters: gradclip.clip_grad_norm_(parameters, 1.0, "inf"),
    "measured only": lambda parameters: gradclip.clip_grad_norm_(parameters, math.inf),
    "finite": lambda parameters: gradclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True),
    "generator": lambda parameters: gradclip.clip_grad_norm_((p for p in parameters), 1.0),
    "one tensor": lambda parameters: gradclip.clip_grad_norm_(parameters[0], 1.0),
    "no gradient": lambda parameters: gradclip.clip_grad_norm_(parameters[3], 1.0),
    "no tensor": lambda parameters: gradclip.get_total_norm([]),
    "two calls": two_calls,
    "value": lambda parameters: gradclip.clip_grad_value_(parameters, 0.5),
    "units": lambda parameters: gradclip.clip_grad_units_(parameters, 0.02),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", WAYS)
def test_one_graph_does_what_eager_code_does(way, backend, dtype):
    """Bit by bit, for every function."""
    ours, theirs = learned(dtype), learned(dtype)
    norm, needed = in_one_graph(WAYS[way], backend)(ours), WAYS[way](theirs)
    if needed is not None:
        assert (norm.shape, norm.dtype, norm.requires_grad) == ((), torch.float64, False)
        assert torch.equal(norm, needed)
    assert_equal_parameters(ours, theirs)


def descend(parameters: list[nn.Parameter]) -> Tensor:
    norm = gradclip.clip_grad_norm_(parameters, 1.0)
    with torch.no_grad():
        for parameter in parameters[:3]:
            parameter.sub_(parameter.grad * 0.5)
    return norm


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_follows_in_the_graph_sees_clipped_gradients(backend):
    ours, theirs = learned(), learned()
    assert torch.equal(in_one_graph(descend, backend)(ours), descend(theirs))
    assert_equal_parameters(ours, theirs)


def test_other_shapes_and_thresholds():
    clip = in_one_graph(gradclip.clip_grad_norm_, "aot_eager")
    for width, limit in [(6, 1.0), (9, 1.0), (12, 0.5), (12, 0.25), (1, 100.0)]:
        ours, theirs = learned(width=width), learned(width=width)
        assert torch.equal(clip(ours, limit), gradclip.clip_grad_norm_(theirs, limit))
        assert_equal_parameters(ours, theirs)


def mean_square(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(x @ weights["inner"].t() + weights["bias"])
    return (hidden @ weights["outer"].t()).square().mean() * 100


def made_weights() -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(1)
    shapes = {"inner": (37, 23), "bias": (37,), "outer": (11, 37)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}, torch.randn(8, 23)


def functional_step(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    gradients, _ = torch.func.grad_and_value(mean_square)(weights, x)
    norm = gradclip.clip_gradients_(gradients.values(), 0.5)
    for name, gradient in gradients.items():
        weights[name].sub_(gradient)
    return norm


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_torch_func_are_clipped_in_their_graph(backend):
    (ours, x), (theirs, _) = made_weights(), made_weights()
    norm, needed = in_one_graph(functional_step, backend)(ours, x), functional_step(theirs, x)
    assert needed > 1
    # What inductor makes of the model rounds otherwise.
    tolerance = 1e-5 if backend == "inductor" else 0
    torch.testing.assert_close(norm, needed, rtol=tolerance, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_given_twice_counts_and_is_scaled_once(backend):
    def clip(x: Tensor) -> tuple[Tensor, Tensor]:
        gradient = x * 2
        return gradclip.clip_gradients_([gradient, gradient], 1.0), gradient

    norm, gradient = in_one_graph(clip, backend)(torch.tensor([1.5, 2.0]))
    assert norm.item() == 5.0
    assert gradient.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
def test_the_gradients_themselves_are_handed_over(backend, monkeypatch):
    addresses, module = [], "gradclip.functional.torch_names"
    buckets_of = sys.modules[module].buckets_of

    def noting(gradients: list[Tensor], order: float) -> list[object]:
        addresses.extend(g.data_ptr() for g in gradients)
        return buckets_of(gradients, order)

    monkeypatch.setattr(f"{module}.buckets_of", noting)
    parameters = learned()
    in_one_graph(descend, backend)(parameters)
    assert addresses == [p.grad.data_ptr() for p in parameters[:3]]


def buffers_of_gradients(step: Callable[..., object]) -> list[int]:
    """Count the buffers that compiled code makes which could hold the gradient of each weight."""
    from torch._inductor.utils import run_and_get_code  # takes seconds

    weights, x = made_weights()
    _, [code] = run_and_get_code(in_one_graph(step, "inductor"), weights, x)
    assert "torch.ops.gradclip.clip_norm_.default(" in code
    made = [literal_eval(shape) for shape in re.findall(r"= empty_strided\w*\((\(.*?\))", code)]
    sizes = [math.prod(shape) for shape in made]
    return [sizes.count(weights[name].numel()) for name in ("inner", "outer")]


@pytest.mark.slow
@needs_cxx
def test_compiled_code_makes_room_for_each_gradient_once():
    def step_that_needs_copies(weights: dict[str, Tensor], x: Tensor) -> None:
        gradients, _ = torch.func.grad_and_value(mean_square)(weights, x)
        whole = [gradient.clone() for gradient in gradients.values()]
        gradclip.clip_gradients_(gradients.values(), 0.5)
        for (name, gradient), before in zip(gradients.items(), whole, strict=True):
            weights[name].sub_(gradient * before)

    assert buffers_of_gradients(functional_step) == [1, 1]
    assert buffers_of_gradients(step_that_needs_copies) == [2, 2]  # copies do not go unseen


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_norm_that_is_not_finite_is_an_error_at_run_time(backend):
    def measure(parameters: list[nn.Parameter]) -> None:
        gradclip.get_total_norm([parameters[0].grad], error_if_nonfinite=True)

    for function in (WAYS["finite"], measure):
        parameters = learned()
        run = in_one_graph(function, backend)
        run(parameters)
        parameters[0].grad[0, 0] = math.nan
        before = parameters[1].grad.clone()
        with pytest.raises(NonFiniteGradientError, match="norm of the gradients is nan"):
            run(parameters)
        assert torch.equal(parameters[1].grad, before)
        assert torch.is_grad_enabled()


def test_invalid_arguments_are_refused_in_the_same_words():
    for call, message in {
        lambda p: gradclip.clip_grad_norm_(p, -1.0): "max_norm is -1.0: give a finite number",
        lambda p: gradclip.clip_grad_norm_(p, 1.0, 0.0): "norm_type is 0.0: give a number > 0",
        lambda p: gradclip.clip_grad_value_(p, -1.0): "clip_value is -1.0: give",
        lambda p: gradclip.clip_grad_units_(p, -1.0): "clip_factor is -1.0: give",
    }.items():
        with pytest.raises(ArgumentError, match=message):
            torch.compile(call, backend="eager")(learned())


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_out_of_place_is_compiled_with_what_calls_it(backend):
    """As torch's own operators, whose sums a compiler may order anew."""
    gradients = [torch.randn(3, 4), torch.randn(5)]

    def clip(gradients: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return gradclip.clip_gradients(gradients, 1.0)

    found, needed = in_one_graph(clip, backend)(gradients), clip(gradients)
    torch.testing.assert_close(found, needed)


# torch itself, where it looks at the tensor at which the graph breaks:
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_on_the_way_back_needs_no_whole_graph(backend):
    """It breaks the graph, and clips as outside."""

    def run(x: Tensor) -> Tensor:
        return (gradclip.clip_backward(3 * x, 0.5) * 4).sum()

    ours, theirs = (torch.ones(4, requires_grad=True) for _ in range(2))
    torch.compile(run, backend=backend)(ours).backward()
    run(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.norm().item() == pytest.approx(1.5)


def mixed_gradients() -> list[Tensor]:
    return [torch.randn(3, 4), torch.randn(5).to(torch.bfloat16), torch.randn(2, 3).t()]


OPERATORS = {
    "clip_norm_": lambda: (mixed_gradients(), 1.0, 2.0, True),
    "total_norm": lambda: (mixed_gradients(), 2.0),
    "clip_with_norm_": lambda: (mixed_gradients(), 1.0, torch.tensor(9.0, dtype=torch.float64)),
    "clip_value_": lambda: (mixed_gradients(), 0.1),
    "clip_units_": lambda: (mixed_gradients(), mixed_gradients(), 0.01, 1e-3, 2.0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_do_what_they_say_of_themselves(name):
    """And none writes below the threshold, whatever its schema allows."""
    opcheck(getattr(torch.ops.gradclip, name).default, OPERATORS[name]())
    gradient = torch.tensor([3.0, 4.0])
    version = gradient._version
    torch.ops.gradclip.clip_norm_([gradient], 5.0, 2.0, False)
    assert gradient._version == version

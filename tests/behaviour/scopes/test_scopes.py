"""Which gradients share a norm, held against norms by hand."""

import math
from enum import Enum
from functools import partial

import pytest
import torch
from torch import nn

import gradclip
from gradclip import ArgumentError, GradientClipper, GradientError, Scope
from tests.support.clippers import sgd, stepped, weights_of
from tests.support.reference import clipped, coefficient_of, gradient_norm, norm_of, parameter_with

engines = pytest.mark.parametrize("engine", ["reference", "operators"])


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return a convolution, two matrices and a scalar, with gradients of unlike sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(300, 5), nn.Linear(5, 2)).to(dtype)
    model.scale = nn.Parameter(torch.tensor(1.0, dtype=dtype))
    for parameter in model.parameters():
        factors = torch.rand(len(parameter) if parameter.dim() else 1, dtype=torch.float64) * 2
        shape = (-1, *[1] * (parameter.dim() - 1)) if parameter.dim() else ()
        gradient = torch.randn(parameter.shape, dtype=torch.float64)
        parameter.grad = (gradient * factors.view(shape)).to(dtype)
    return model


def frozen(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def gradients_by_name(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.double().clone() for name, p in model.named_parameters()}


def units(gradient: torch.Tensor) -> list[torch.Tensor]:
    return [*gradient] if gradient.dim() > 1 else [gradient]


PARTS = {
    "global": lambda gradients: [gradients],
    "group": lambda gradients: [gradients],
    "parameter": lambda gradients: [[gradient] for gradient in gradients],
    "unit": lambda gradients: [[unit] for gradient in gradients for unit in units(gradient)],
}
"""What shares a norm, in views of the gradients."""


@engines
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", PARTS)
def test_every_part_is_clipped_by_its_own_norm(kind, dtype, order, engine):
    """A gradient within its threshold is not written at all."""
    model = network(dtype)
    needed = [*gradients_by_name(model).values()]
    parts = PARTS[kind](needed)
    norms = [norm_of(part, order) for part in parts]
    threshold = sorted(norms)[len(norms) // 2] * 0.9
    clipper = stepped(frozen(model), threshold, scope=kind, norm_type=order, engine=engine)
    assert clipper.last.norms.tolist() == pytest.approx(norms, rel=1e-6)
    for part, norm in zip(parts, norms, strict=True):
        for view in part:
            view.mul_(coefficient_of(norm, threshold))
    tolerance = 2.0**-7 if dtype is torch.bfloat16 else 1e-6
    for found, expected in zip(gradients_by_name(model).values(), needed, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    if kind == "parameter":
        untouched = [parameter.grad._version == 0 for parameter in model.parameters()]
        assert untouched == [norm <= threshold for norm in norms]


def test_labels_are_names():
    """Those of groups, parameters and indices, or what a function returns."""
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": [*model[2].parameters()]}]
    optimizer = torch.optim.SGD(groups, lr=0.0)

    class Part(str, Enum):
        HEAD = "head"

    rows = [f"{name}.weight[{row}]" for name, count in (("0", 4), ("2", 2)) for row in range(count)]
    for scope, needed in (
        ("global", ("global",)),
        ("group", ("group 0", "group 1")),
        ("parameter", ("0.weight", "0.bias", "2.weight", "2.bias")),
        ("unit", (*rows[:4], "0.bias", *rows[4:], "2.bias")),
        (lambda name, parameter: name.split(".")[1], ("weight", "bias")),
        (lambda name, parameter: parameter.dim(), ("4", "1", "2")),
        (lambda name, parameter: Part.HEAD, ("head",)),
    ):
        with GradientClipper(optimizer, 1.0, scope=scope, model=model) as clipper:
            assert clipper.labels == needed
            assert {*map(type, clipper.labels)} == {str}  # a checkpoint loads no other type


def test_a_scope_shows_the_call_that_makes_it():
    for call in ("'unit'", "'unit', exclude=('a', 'b')", "'unit', exclude='head.*'"):
        assert repr(eval(f"Scope({call})")) == f"Scope({call})"


def clipper_with(**options) -> GradientClipper:
    return GradientClipper(sgd(torch.full((2, 3), 9.0)), 1.0, **options)


KINDS = (
    "give one of 'global', 'group', 'parameter', 'unit', a Scope, or a function of a parameter's "
    "name and the parameter that returns a label."
)
CHOICE = "give a name or several, or a function of name and parameter."
LABEL = (
    "give a string or a whole number, None for never clipped, or one of these for each index of "
    "dimension 0."
)
GAVE = f"The scope gave {{}} for group 0, parameter 0 of shape (2, 3): {LABEL}"
LABELS = {"1.5": 1.5, "True": True, "<class 'object'>": object, "b'ab'": b"ab"}
LABELS |= {"3 labels": [1, 2, 3], "2.5": [1, 2.5], "0 labels": []}
INVALID = [
    *((f"scope is {s!r}: {KINDS}", lambda s=s: s) for s in ("globe", "", 3, None, Scope, ["unit"])),
    *((GAVE.format(said), lambda label=label: lambda *_: label) for said, label in LABELS.items()),
    *(
        (f"exclude is {e!r}: {CHOICE}", partial(Scope, exclude=e))
        for e in (3, None, [3], ["a", None])
    ),
]


@pytest.mark.parametrize(("message", "make"), INVALID)
def test_an_invalid_scope_is_refused(message, make):
    """With what was found and what is needed."""
    with pytest.raises(ArgumentError) as refused:
        clipper_with(scope=make())
    assert str(refused.value) == message


# Units of every kind of gradient


@engines
@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("max_value", [None, 4.0])
def test_rows_of_sparse_gradients_are_units(engine, coalesced, max_value):
    """An index that comes twice counts as the sum of its values."""
    values = torch.tensor([[1.0, 1.0], [0.3, 0.4], [2.0, 3.0]])
    gradient = torch.sparse_coo_tensor(torch.tensor([[3, 0, 3]]), values, (5, 2))
    [table] = weights_of(optimizer := sgd(gradient.coalesce() if coalesced else gradient))
    clipper = stepped(optimizer, 1.0, scope="unit", max_value=max_value, engine=engine)
    assert clipper.last.norm.tolist() == pytest.approx([0.5, 0.0, 0.0, 5.0, 0.0])
    needed = [[0.3, 0.4], [0, 0], [0, 0], [0.6, 0.8], [0, 0]]
    torch.testing.assert_close(table.grad.to_dense(), torch.tensor(needed))
    assert table.grad._nnz() == (2 if coalesced or max_value else 3)


@engines
def test_rows_of_complex_gradients_are_units(engine):
    """Of real and imaginary parts together."""
    gradient = torch.tensor([[3 + 4j, 0], [0.3j, 0.4]])
    clipper = stepped(sgd(gradient), 1.0, scope="unit", engine=engine)
    assert clipper.last.norm.tolist() == pytest.approx([5.0, 0.5])
    torch.testing.assert_close(gradient, torch.tensor([[0.6 + 0.8j, 0], [0.3j, 0.4]]))


@pytest.mark.parametrize("scope", ["unit", lambda name, parameter: range(4)])
def test_rows_that_share_memory_are_refused(scope):
    """As one norm the gradient can be clipped."""
    weight, shared = torch.full((4, 3), 9.0), torch.full((3,), 9.0).expand(4, 3)
    optimizer = sgd(weight, shared)
    with (
        GradientClipper(optimizer, 1.0, scope=scope),
        pytest.raises(GradientError, match=r"strides \(0, 1\).*share memory.*make it contiguous"),
    ):
        optimizer.step()
    assert bool(((weight == 9) & (shared == 9)).all())
    stepped(optimizer, 1.0, scope="parameter")
    assert shared.norm().item() == pytest.approx(1.0)


def test_tensors_without_rows_or_elements_are_units_too():
    """Of norm 0, or of the norm of all their elements."""
    tensors = [torch.full(shape, 2.0) for shape in ((0, 3), (3, 0), (0,), (), (2, 2))]
    clipper = stepped(sgd(*tensors), 1.0, scope="unit")
    assert clipper.last.norm.tolist() == pytest.approx([0, 0, 0, 0, 2, 8**0.5, 8**0.5])
    assert tensors[-1].norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_tied_gradients_belong_to_the_first_parameter():
    """They count and are scaled once."""
    shared = torch.tensor([3.0, 4.0])
    clipper = stepped(sgd(shared, shared), 1.0, scope="parameter")
    assert clipper.last.norm.tolist() == [5.0, 0.0]
    assert shared.tolist() == pytest.approx([0.6, 0.8])


@engines
@pytest.mark.parametrize("policy", ["zero", "skip", "propagate"])
def test_a_row_that_is_not_finite_concerns_its_own_norm(policy, engine):
    """The others are bounded and scaled as ever, unless the step is skipped."""
    gradient = torch.tensor([[3.0, 4.0], [math.nan, 4.0], [0.3, 0.4]])
    optimizer = sgd(gradient)
    clipper = stepped(optimizer, 1.0, scope="unit", nonfinite=policy, max_value=3.5, engine=engine)
    first = [3.0, 4.0] if policy == "skip" else [0.6508, 0.7593]  # bounded to [3, 3.5] first
    assert gradient[0].tolist() == pytest.approx(first, rel=1e-3)
    assert gradient[1].nan_to_num(7.0).tolist() == ([0, 0] if policy == "zero" else [7, 4])
    assert gradient[2].tolist() == pytest.approx([0.3, 0.4])
    assert clipper.skipped == (policy == "skip")
    assert clipper.last.nonfinite.tolist() == [False, True, False]


# Parameters that are excluded


@engines
@pytest.mark.parametrize(
    "exclude",
    [
        *("1.*", ["1.weight", "1.bias"], lambda name, parameter: name.startswith("1.")),
        lambda name, parameter: parameter.shape[:1] == (5,),
    ],
)
@pytest.mark.parametrize("kind", [*PARTS, lambda name, parameter: "one"])
def test_what_is_excluded_is_in_no_norm_and_never_written(kind, exclude, engine):
    """What is not finite in it raises nothing."""
    model = network()
    model[1].weight.grad[0, 0] = math.nan
    before, optimizer = gradients_by_name(model), frozen(model)
    options = {"scope": Scope(kind, exclude=exclude), "nonfinite": "raise", "engine": engine}
    clipper = stepped(optimizer, 0.01, model=model, **options)
    assert not any(label.startswith("1.") for label in clipper.labels)
    for name, gradient in gradients_by_name(model).items():
        if name.startswith("1."):
            assert torch.equal(gradient.nan_to_num(), before[name].nan_to_num())
            assert model.get_parameter(name).grad._version <= 1
        else:
            assert gradient.norm() <= 0.01 * math.sqrt(len(units(gradient))) * (1 + 1e-6)


def test_excluded_names_match_parameters():
    """Brackets are part of a name; what matches nothing is an error, with the names there are."""
    model = network()
    said = r"exclude='haed.\*' matches no parameter; there are scale, 0.weight, 0.bias, 1.weight, "
    with pytest.raises(ArgumentError, match=said + r"1.bias, \.\.\.\. Names are the model's with"):
        GradientClipper(frozen(model), 1.0, scope=Scope(exclude="haed.*"), model=model)
    with pytest.raises(ArgumentError, match=r"there are group 0, parameter 0\. Names are"):
        clipper_with(scope=Scope(exclude="1.*"))
    parameters = [(name, nn.Parameter(torch.zeros(1))) for name in ("a[0]", "a0")]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    clipper = GradientClipper(optimizer, 1.0, scope=Scope("parameter", exclude="a[0]"))
    assert clipper.labels == ("a0",)


def test_where_everything_is_excluded_the_record_says_so():
    """There is one norm, of no gradient."""
    gradient = torch.tensor([[3.0, 4.0]])
    clipper = stepped(sgd(gradient), 1.0, scope=Scope("unit", exclude="*"))
    assert clipper.last.norm.item() == 0.0
    assert gradient.tolist() == [[3.0, 4.0]]


# A function as scope


@engines
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, "array"])
def test_models_along_dimension_0_are_clipped_one_by_one(kind, engine):
    """As each would be by itself."""
    seeds = torch.arange(7)
    factors = torch.logspace(-2, 2, 7)
    gradients = [
        torch.randn(7, *shape) * factors.view(-1, *[1] * len(shape))
        for shape in ((3, 50), (4,), ())
    ]
    needed = [clipped([gradient[seed] for gradient in gradients], 1.0) for seed in seeds]
    norms = [norm_of([gradient[seed] for gradient in gradients]) for seed in seeds]

    def of_seed(name, parameter):
        return seeds.numpy() if kind == "array" else kind(range(7))

    clipper = stepped(sgd(*gradients), 1.0, scope=of_seed, engine=engine)
    assert clipper.labels == tuple(map(str, range(7)))
    assert clipper.last.norm.tolist() == pytest.approx(norms, rel=1e-6)
    for seed, parts in enumerate(needed):
        for gradient, part in zip(gradients, parts, strict=True):
            torch.testing.assert_close(gradient[seed].double(), part, rtol=1e-6, atol=0)


@engines
def test_rows_without_a_label_are_left_alone(engine):
    """By norms, bounds and the policy for what is not finite."""
    gradient = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [6.0, 8.0], [30.0, 40.0]])
    before, labels = gradient.clone(), ["a", None, "a", "b"]
    options = {"max_value": 35.0, "nonfinite": "raise", "engine": engine}
    clipper = stepped(sgd(gradient), 1.0, scope=lambda *_: labels, **options)
    assert clipper.last.norm.tolist() == pytest.approx([125**0.5, 50.0])
    assert torch.equal(gradient[1].nan_to_num(), before[1].nan_to_num())
    assert gradient[[0, 2]].norm().item() == pytest.approx(1.0)
    assert gradient[3].norm().item() == pytest.approx(1.0)


def test_a_label_may_span_rows_and_whole_parameters():
    """And one label for some of the rows is one norm."""
    weight, bias = torch.tensor([[3.0], [7.0]]), torch.tensor([4.0])
    clipper = stepped(
        sgd(weight, bias), 1.0, scope=lambda name, p: ["a", "b"] if p.dim() > 1 else "a"
    )
    assert clipper.last.norm.tolist() == [5.0, 7.0]
    assert [*weight.flatten().tolist(), bias.item()] == pytest.approx([0.6, 1.0, 0.8])
    some = torch.tensor([[3.0], [100.0], [4.0]])
    clipper = stepped(sgd(some), 1.0, scope=lambda name, p: ["a", None, "a"])
    assert clipper.last.norm.item() == 5.0
    assert some.flatten().tolist() == pytest.approx([0.6, 100.0, 0.8])


def test_labels_need_the_rows_they_were_given_for():
    """A scalar has none, and a parameter may have been resized."""
    with pytest.raises(ArgumentError, match=r"gave 1 labels for .* of shape \(\)"):
        GradientClipper(sgd(torch.tensor(1.0)), 1.0, scope=lambda name, parameter: [1])
    for rows in (1, 3):
        optimizer = sgd(torch.ones(2, 2), torch.full((2, 2), 9.0))
        GradientClipper(optimizer, 1.0, scope="unit")
        one, other = optimizer.param_groups[0]["params"]
        one.grad, one.data = None, torch.zeros(rows, 2)
        one.grad = torch.ones(rows, 2)
        said = rf"shape \({rows}, 2\), whose parameter had 2 rows"
        with pytest.raises(GradientError, match=said):
            optimizer.step()
        assert bool((other.grad == 9).all())


# Parameters and groups that come, go and move


@pytest.mark.parametrize("scope", ["group", "parameter", "unit", lambda name, parameter: "x"])
def test_what_is_added_later_gets_labels_of_its_own(scope):
    """After those that were there."""
    model, later = network(), nn.Linear(4, 3)
    optimizer = frozen(model)
    clipper = stepped(optimizer, 1.0, scope=scope)
    old = clipper.labels
    for parameter in later.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    optimizer.add_param_group({"params": later.weight})
    optimizer.param_groups[0]["params"].append(later.bias)
    optimizer.step()
    new = clipper.labels
    assert new[: len(old)] == old
    added = {"group": 1, "parameter": 2, "unit": 4}
    assert len(new) - len(old) == (added[scope] if isinstance(scope, str) else 0)
    bound = 1.0 if scope != "unit" else 3**0.5
    assert gradient_norm([later.weight]) <= bound * (1 + 1e-6)


def test_a_parameter_in_place_of_another_has_its_label():
    """Where there is no model, names are positions."""
    optimizer, second = sgd([3.0]), parameter_with(torch.tensor([4.0]))
    clipper = stepped(optimizer, 1.0, scope="parameter")
    optimizer.param_groups[0]["params"][0] = second
    optimizer.step()
    assert clipper.labels == ("group 0, parameter 0",)
    assert clipper.last.norm.item() == 4.0
    assert second.grad.item() == 1.0


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_parameters_that_moved_onto_the_name_of_another_are_an_error(scope):
    """They would be clipped together."""
    optimizer, third = sgd([9.0], [9.0]), parameter_with(torch.tensor([9.0]))
    _, second = optimizer.param_groups[0]["params"]
    GradientClipper(optimizer, 1.0, scope=scope)
    optimizer.param_groups[0]["params"][:] = [second, third]
    with pytest.raises(gradclip.AttachError, match="group 0, parameter 1 is the name of 2 of them"):
        optimizer.step()
    assert [second.grad.item(), third.grad.item()] == [9.0, 9.0]


def test_an_added_group_that_cannot_be_labelled_changes_nothing():
    """At every step that meets it."""
    gradient = torch.full((2, 2), 9.0)
    optimizer = sgd(gradient)
    [weight] = optimizer.param_groups[0]["params"]
    clipper = GradientClipper(
        optimizer, 1.0, scope=lambda name, p: range(2) if p is weight else 1.5
    )
    optimizer.add_param_group({"params": [parameter_with(torch.full((2, 2), 9.0))]})
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"The scope gave 1\.5"):
            optimizer.step()
    assert clipper.labels == ("0", "1")
    assert gradient[0, 0].item() == 9.0


# Beside everything else


def test_the_error_names_parameters_and_says_how_many_norms():
    """Not those that are in no norm."""
    model = network()
    model[0].weight.grad.fill_(math.nan)
    model[1].weight.grad[2:4, 0] = math.inf
    optimizer = frozen(model)
    scope = Scope("unit", exclude="0.*")
    GradientClipper(optimizer, 1.0, scope=scope, model=model, nonfinite="raise")
    with pytest.raises(
        gradclip.NonFiniteGradientError,
        match=r"not finite for 2 labels at step 0, .*: 1.weight \(2 of 1500 elements\)",
    ) as raised:
        optimizer.step()
    assert "0.weight" not in str(raised.value)


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_several_optimizers_share_the_norms_of_any_scope(scope):
    """As if one held all parameters."""
    model, twin = network(), network()
    parameters = [*model.parameters()]
    optimizers = [torch.optim.SGD(part, lr=0.0) for part in (parameters[::2], parameters[1::2])]
    clipper = stepped(optimizers, 0.5, scope=scope, model=model)
    stepped(frozen(twin), 0.5, scope=scope, model=twin)
    both = (gradients_by_name(net).values() for net in (model, twin))
    assert all(map(torch.equal, *both))
    assert clipper.steps == 1

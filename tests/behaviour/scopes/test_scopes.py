"""Which gradients share a norm, held against norms by hand."""

import math
from enum import Enum
from functools import partial

import pytest
import torch
from torch import nn

import gradclip
from gradclip import ArgumentError, GradientClipper, GradientError, Scope
from tests.support.clippers import sgd, stepped
from tests.support.reference import coefficient_of, gradient_norm, norm_of, parameter_with

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
    "global": lambda tensors: [[*tensors.values()]],
    "group": lambda tensors: [[*tensors.values()]],
    "parameter": lambda tensors: [[gradient] for gradient in tensors.values()],
    "unit": lambda tensors: [[unit] for gradient in tensors.values() for unit in units(gradient)],
}
"""What shares a norm, in views of the gradients."""


@engines
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", PARTS)
def test_every_part_is_clipped_by_its_own_norm(kind, dtype, order, engine):
    """A gradient within its threshold is not written at all."""
    model = network(dtype)
    needed = gradients_by_name(model)
    parts = PARTS[kind](needed)
    norms = [norm_of(part, order) for part in parts]
    threshold = sorted(norms)[len(norms) // 2] * 0.9
    clipper = GradientClipper(
        frozen(model), threshold, scope=kind, model=model, norm_type=order, engine=engine
    )
    before = [p.grad.clone() for p in model.parameters()]
    clipper.step()
    assert clipper.last.norm.reshape(-1).tolist() == pytest.approx(norms, rel=1e-6)
    for part, norm in zip(parts, norms, strict=True):
        for view in part:
            view.mul_(coefficient_of(norm, threshold))
    tolerance = 2.0**-7 if dtype is torch.bfloat16 else 1e-6
    for found, expected in zip(gradients_by_name(model).values(), needed.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    if kind == "parameter":
        for parameter, old, norm in zip(model.parameters(), before, norms, strict=True):
            assert torch.equal(parameter.grad, old) == (norm <= threshold)
            assert (parameter.grad._version == 0) == (norm <= threshold)


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


def test_a_scope_shows_itself():
    """As the call that makes it."""
    assert repr(Scope("unit")) == "Scope('unit')"
    assert repr(Scope("unit", exclude=["a", "b"])) == "Scope('unit', exclude=('a', 'b'))"
    assert repr(Scope("unit", exclude="head.*")) == "Scope('unit', exclude='head.*')"


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
LABELS = [(1.5, "1.5"), (True, "True"), (object, "<class 'object'>"), (b"ab", "b'ab'")]
LABELS += [([1, 2, 3], "3 labels"), ([1, 2.5], "2.5"), ([], "0 labels")]
INVALID = {
    f"scope is {scope!r}: {KINDS}": partial(clipper_with, scope=scope)
    for scope in ("globe", "", 3, None, Scope, ["unit"])
}
INVALID |= {
    f"exclude is {exclude!r}: {CHOICE}": partial(Scope, exclude=exclude)
    for exclude in (3, None, [3], ["a", None])
}
INVALID |= {
    f"The scope gave {said} for group 0, parameter 0 of shape (2, 3): {LABEL}": partial(
        clipper_with, scope=lambda name, parameter, label=label: label
    )
    for label, said in LABELS
}


@pytest.mark.parametrize("message", INVALID)
def test_an_invalid_scope_is_refused(message):
    """With what was found and what is needed."""
    with pytest.raises(ArgumentError) as refused:
        INVALID[message]()
    assert str(refused.value) == message


# Parameters that are excluded


@engines
@pytest.mark.parametrize(
    "exclude",
    [
        "1.*",
        ["1.weight", "1.bias"],
        lambda name, parameter: name.startswith("1."),
        lambda name, parameter: parameter.shape[:1] == (5,),
    ],
    ids=["pattern", "names", "predicate of the name", "predicate of the parameter"],
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
    with pytest.raises(
        ArgumentError,
        match=r"exclude='haed.\*' matches no parameter; there are scale, 0.weight, 0.bias, "
        r"1.weight, 1.bias, \.\.\.\. Names are the model's with model=",
    ):
        GradientClipper(frozen(model), 1.0, scope=Scope(exclude="haed.*"), model=model)
    with pytest.raises(ArgumentError, match=r"there are group 0, parameter 0\. Names are"):
        clipper_with(scope=Scope(exclude="1.*"))
    parameters = [(name, nn.Parameter(torch.zeros(1))) for name in ("a[0]", "a0")]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    clipper = GradientClipper(optimizer, 1.0, scope=Scope("parameter", exclude="a[0]"))
    assert clipper.labels == ("a0",)


def test_where_everything_is_excluded_the_record_says_so():
    """There is one norm, of no gradient."""
    model = network()
    before = gradients_by_name(model)
    scope = Scope("unit", exclude="*")
    clipper = stepped(frozen(model), 1.0, scope=scope, model=model)
    assert clipper.last.norm.item() == 0.0
    assert all(map(torch.equal, before.values(), gradients_by_name(model).values()))


# A function as scope


@engines
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, "array"])
def test_models_along_dimension_0_are_clipped_one_by_one(kind, engine):
    """As each would be by itself."""
    seeds, threshold = 7, 1.0
    torch.manual_seed(1)
    shapes = {"matrices": (seeds, 3, 50), "biases": (seeds, 4), "scales": (seeds,)}
    factors = torch.logspace(-2, 2, seeds)
    batched = {}
    for name, shape in shapes.items():
        gradient = torch.randn(shape) * factors.view(-1, *[1] * (len(shape) - 1))
        batched[name] = parameter_with(gradient)
    needed = [{k: p.grad[seed].double() for k, p in batched.items()} for seed in range(seeds)]

    def of_seed(name, parameter):
        index = range(len(parameter))
        return torch.tensor(index).numpy() if kind == "array" else kind(index)

    optimizer = torch.optim.SGD(batched.values(), lr=0.0)
    clipper = GradientClipper(optimizer, threshold, scope=of_seed, engine=engine)
    assert clipper.labels == tuple(map(str, range(seeds)))
    clipper.step()
    for seed, parts in enumerate(needed):
        norm = norm_of(parts.values())
        assert clipper.last.norm[seed].item() == pytest.approx(norm, rel=1e-6)
        for name, part in parts.items():
            expected = part * coefficient_of(norm, threshold)
            found = batched[name].grad[seed].double()
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


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
        with pytest.raises(
            GradientError, match=rf"shape \({rows}, 2\), whose parameter had 2 rows"
        ):
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
    weights, others = [model[0].weight, model[1].weight], [model[0].bias, model[1].bias]
    others += [*model[2].parameters(), model.scale]
    optimizers = [torch.optim.SGD(parameters, lr=0.0) for parameters in (weights, others)]
    clipper = stepped(optimizers, 0.5, scope=scope, model=model)
    stepped(frozen(twin), 0.5, scope=scope, model=twin)
    assert all(
        map(torch.equal, gradients_by_name(model).values(), gradients_by_name(twin).values())
    )
    assert clipper.steps == 1

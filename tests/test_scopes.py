"""Which gradients share a norm, seen through the clipper and held against norms by hand."""

from __future__ import annotations

import math
from enum import Enum

import pytest
import torch
from torch import nn

import gradclip
from gradclip import ArgumentError, GradientClipper, GradientError, Scope

ENGINES = ["reference", "operators"]


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


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.double().clone() for name, p in model.named_parameters()}


def units(gradient: torch.Tensor) -> list[torch.Tensor]:
    return list(gradient) if gradient.dim() > 1 else [gradient]


def clipped(gradient: torch.Tensor, threshold: float, order: float = 2.0) -> torch.Tensor:
    norm = torch.linalg.vector_norm(gradient, order)
    return gradient * min(1.0, threshold / norm.item())


PARTS = {
    "global": lambda found: [list(found.values())],
    "group": lambda found: [list(found.values())],
    "parameter": lambda found: [[gradient] for gradient in found.values()],
    "unit": lambda found: [[unit] for gradient in found.values() for unit in units(gradient)],
}
"""What shares a norm, in views of the gradients."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", list(PARTS))
def test_every_part_is_clipped_by_its_own_norm(kind, dtype, order, engine):
    model = network(dtype)
    needed = gradients(model)
    parts = PARTS[kind](needed)
    norms = [
        torch.linalg.vector_norm(torch.cat([p.flatten() for p in part]), order).item()
        for part in parts
    ]
    threshold = sorted(norms)[len(norms) // 2] * 0.9
    clipper = GradientClipper(
        sgd(model), threshold, scope=kind, model=model, norm_type=order, engine=engine
    )
    before = [p.grad.clone() for p in model.parameters()]
    clipper.step()
    assert clipper.last.norm.reshape(-1).tolist() == pytest.approx(norms, rel=1e-6)
    for part, norm in zip(parts, norms, strict=True):
        for view in part:
            view.mul_(min(1.0, threshold / norm))
    tolerance = 2.0**-7 if dtype is torch.bfloat16 else 1e-6
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad.double(), needed[name], rtol=tolerance, atol=0, msg=name
        )
    unclipped = [norm <= threshold for norm in norms]
    if kind == "parameter":
        for parameter, old, whole in zip(model.parameters(), before, unclipped, strict=True):
            assert torch.equal(parameter.grad, old) == whole
            assert (parameter.grad._version == 0) == whole  # not written at all


def test_labels_are_names():
    model = network()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": [*model[2].parameters()]}], lr=0.0
    )

    def labels(scope):
        with GradientClipper(optimizer, 1.0, scope=scope, model=model) as clipper:
            return clipper.labels

    assert labels("global") == ("global",)
    assert labels("group") == ("group 0", "group 1")
    assert labels("parameter") == ("0.weight", "0.bias", "2.weight", "2.bias")
    rows = [f"{name}.weight[{row}]" for name, count in (("0", 4), ("2", 2)) for row in range(count)]
    assert labels("unit") == (*rows[:4], "0.bias", *rows[4:], "2.bias")
    assert labels(lambda name, parameter: name.split(".")[1]) == ("weight", "bias")
    assert labels(lambda name, parameter: parameter.dim()) == ("4", "1", "2")


def test_without_a_model_parameters_are_numbered():
    optimizer = sgd(network())
    clipper = GradientClipper(optimizer, 1.0, scope="parameter")
    assert clipper.labels[:2] == ("group 0, parameter 0", "group 0, parameter 1")


def test_parameters_of_several_optimizers_are_told_apart():
    optimizers = [sgd(network()), sgd(network())]
    clipper = GradientClipper(optimizers, 1.0, scope="parameter")
    assert len(clipper.labels) == len(set(clipper.labels)) == 14
    groups = GradientClipper([sgd(network()), sgd(network())], 1.0, scope="group")
    assert groups.labels == ("optimizer 0, group 0", "optimizer 1, group 0")


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
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_excluded_is_in_no_norm_and_never_written(kind, exclude, engine):
    model = network()
    model[1].weight.grad[0, 0] = math.nan
    before = gradients(model)
    optimizer = sgd(model)
    scope = Scope(kind, exclude=exclude)
    clipper = GradientClipper(
        optimizer, 0.01, scope=scope, model=model, nonfinite="raise", engine=engine
    )
    optimizer.step()
    assert not any(label.startswith("1.") for label in clipper.labels)
    after = gradients(model)
    for name, gradient in before.items():
        if name.startswith("1."):
            assert torch.equal(after[name].nan_to_num(), gradient.nan_to_num())
            assert model.get_parameter(name).grad._version <= 1
        else:
            assert after[name].norm() <= 0.01 * math.sqrt(len(units(gradient))) * (1 + 1e-6)


def test_an_exclusion_that_matches_nothing_is_an_error():
    model = network()
    with pytest.raises(
        ArgumentError, match=r"exclude='haed.\*' matches no parameter; there are scale, 0"
    ):
        GradientClipper(sgd(model), 1.0, scope=Scope(exclude="haed.*"), model=model)
    with pytest.raises(ArgumentError, match="Names are the model's with model="):
        GradientClipper(sgd(model), 1.0, scope=Scope(exclude="1.*"))
    GradientClipper(sgd(model), 1.0, scope=Scope(exclude="1.*"), model=model)


def test_where_everything_is_excluded_the_record_says_so():
    model = network()
    clipper = GradientClipper(sgd(model), 1.0, scope=Scope("unit", exclude="*"), model=model)
    before = gradients(model)
    clipper.step()
    assert clipper.last.norm.item() == 0.0
    assert all(torch.equal(before[name], g) for name, g in gradients(model).items())


@pytest.mark.parametrize("given", ["globe", "", 3, None, Scope, ["unit"]])
def test_what_is_no_scope_is_refused(given):
    with pytest.raises(
        ArgumentError,
        match="^scope is .*: give one of 'global', 'group', 'parameter', 'unit', a Scope, or a "
        r"function of a parameter's name and the parameter that returns a label\.$",
    ):
        GradientClipper(sgd(network()), 1.0, scope=given)


@pytest.mark.parametrize("exclude", [3, None, [3], ["a", None]])
def test_what_is_no_exclusion_is_refused(exclude):
    with pytest.raises(ArgumentError, match="exclude is .*: give a name or several, or a function"):
        Scope(exclude=exclude)


def test_brackets_in_a_name_are_brackets():
    parameters = [("a[0]", nn.Parameter(torch.zeros(1))), ("a0", nn.Parameter(torch.zeros(1)))]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    clipper = GradientClipper(optimizer, 1.0, scope=Scope("parameter", exclude="a[0]"))
    assert clipper.labels == ("a0",)


def test_a_scope_shows_itself():
    assert repr(Scope("unit")) == "Scope('unit')"
    assert repr(Scope("unit", exclude=["a", "b"])) == "Scope('unit', exclude=('a', 'b'))"
    assert repr(Scope("unit", exclude="head.*")) == "Scope('unit', exclude='head.*')"


# A function as scope


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, "array"])
def test_models_along_dimension_0_are_clipped_one_by_one(kind, engine):
    seeds, threshold = 7, 1.0
    torch.manual_seed(1)
    shapes = {"matrices": (seeds, 3, 50), "biases": (seeds, 4), "scales": (seeds,)}
    batched = nn.ParameterDict({k: nn.Parameter(torch.zeros(s)) for k, s in shapes.items()})
    factors = torch.logspace(-2, 2, seeds)
    for parameter in batched.values():
        shape = (-1, *[1] * (parameter.dim() - 1))
        parameter.grad = torch.randn(parameter.shape) * factors.view(shape)
    needed = [{k: p.grad[seed].double() for k, p in batched.items()} for seed in range(seeds)]

    def of_seed(name, parameter):
        found = range(len(parameter))
        if kind == "array":
            return torch.tensor(found).numpy()
        return kind(found)

    clipper = GradientClipper(sgd(batched), threshold, scope=of_seed, engine=engine)
    assert clipper.labels == tuple(map(str, range(seeds)))
    clipper.step()
    for seed, parts in enumerate(needed):
        norm = torch.cat([part.flatten() for part in parts.values()]).norm()
        assert clipper.last.norm[seed].item() == pytest.approx(norm.item(), rel=1e-6)
        for name, part in parts.items():
            expected = part * min(1.0, threshold / norm.item())
            torch.testing.assert_close(
                batched[name].grad[seed].double(), expected, rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_without_a_label_are_left_alone(engine):
    weight = nn.Parameter(torch.zeros(4, 2))
    weight.grad = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [6.0, 8.0], [30.0, 40.0]])
    before = weight.grad.clone()
    clipper = GradientClipper(
        torch.optim.SGD([weight], lr=0.0),
        1.0,
        scope=lambda name, parameter: ["a", None, "a", "b"],
        max_value=35.0,
        nonfinite="raise",
        engine=engine,
    )
    clipper.step()
    assert clipper.last.norm.tolist() == pytest.approx([125**0.5, 50.0])
    assert torch.equal(weight.grad[1].nan_to_num(), before[1].nan_to_num())
    assert weight.grad[[0, 2]].norm().item() == pytest.approx(1.0)
    assert weight.grad[3].norm().item() == pytest.approx(1.0)


def test_one_label_for_some_of_the_rows_is_one_norm():
    weight = nn.Parameter(torch.zeros(3, 1))
    weight.grad = torch.tensor([[3.0], [100.0], [4.0]])
    scope = Scope(lambda name, parameter: ["a", None, "a"])
    clipper = GradientClipper(torch.optim.SGD([weight], lr=0.0), 1.0, scope=scope)
    clipper.step()
    assert clipper.last.norm.item() == 5.0
    assert weight.grad.flatten().tolist() == pytest.approx([0.6, 100.0, 0.8])


def test_a_label_may_span_rows_and_whole_parameters():
    weight, bias = nn.Parameter(torch.zeros(2, 1)), nn.Parameter(torch.zeros(1))
    weight.grad, bias.grad = torch.tensor([[3.0], [7.0]]), torch.tensor([4.0])
    clipper = GradientClipper(
        torch.optim.SGD([weight, bias], lr=0.0),
        1.0,
        scope=lambda name, parameter: ["a", "b"] if parameter.dim() > 1 else "a",
    )
    clipper.step()
    assert clipper.last.norm.tolist() == [5.0, 7.0]
    assert [*weight.grad.flatten().tolist(), bias.grad.item()] == pytest.approx([0.6, 1.0, 0.8])


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (1.5, r"gave 1.5 for group 0, parameter 0 of shape \(2, 3\)"),
        (True, "gave True for group"),
        (object, "gave <class 'object'> for group"),
        (b"ab", "gave b'ab' for group"),
        ([1, 2, 3], r"gave 3 labels for group 0, parameter 0 of shape \(2, 3\)"),
        ([1, 2.5], r"gave 2.5 for group 0, parameter 0 of shape \(2, 3\)"),
        ([], "gave 0 labels for group"),
    ],
)
def test_what_is_no_label_is_an_error(label, said):
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.full((2, 3), 9.0)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    remedy = (
        "give a string or a whole number, None for never clipped, or one of these for each index "
        r"of dimension 0\."
    )
    with pytest.raises(ArgumentError, match=f"^The scope {said}.*: {remedy}$"):
        GradientClipper(optimizer, 1.0, scope=lambda name, parameter: label)
    GradientClipper(optimizer, 1.0)


def test_labels_are_plain_strings():
    class Part(str, Enum):
        HEAD = "head"

    weight = nn.Parameter(torch.zeros(1))
    clipper = GradientClipper(
        torch.optim.SGD([weight], lr=0.0), 1.0, scope=lambda name, parameter: Part.HEAD
    )
    assert clipper.labels == ("head",)
    assert type(clipper.labels[0]) is str


@pytest.mark.parametrize("rows", [1, 3])
def test_a_parameter_that_was_resized_is_an_error(rows):
    one, other = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([one, other], lr=0.0)
    GradientClipper(optimizer, 1.0, scope="unit")
    one.data = torch.zeros(rows, 2)
    one.grad, other.grad = torch.ones(rows, 2), torch.full((2, 2), 9.0)
    with pytest.raises(GradientError, match=rf"of shape \({rows}, 2\), whose parameter had 2 rows"):
        optimizer.step()
    assert bool((other.grad == 9).all())


def test_a_scalar_has_no_rows_to_label():
    scalar = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ArgumentError, match=r"gave 1 labels for .* of shape \(\)"):
        GradientClipper(torch.optim.SGD([scalar], lr=0.0), 1.0, scope=lambda name, p: [1])


# Kinds of gradients


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("max_value", [None, 4.0])
def test_rows_of_sparse_gradients_are_units(engine, coalesced, max_value):
    table = nn.Parameter(torch.ones(5, 2))
    indices = torch.tensor([[3, 0, 3]])
    values = torch.tensor([[1.0, 1.0], [0.3, 0.4], [2.0, 3.0]])
    table.grad = torch.sparse_coo_tensor(indices, values, (5, 2))
    if coalesced:
        table.grad = table.grad.coalesce()
    clipper = GradientClipper(
        torch.optim.SGD([table], lr=0.0), 1.0, scope="unit", max_value=max_value, engine=engine
    )
    clipper.step()
    assert clipper.last.norm.tolist() == pytest.approx([0.5, 0.0, 0.0, 5.0, 0.0])
    dense = table.grad.to_dense()
    assert dense[0].tolist() == pytest.approx([0.3, 0.4])
    assert dense[3].tolist() == pytest.approx([0.6, 0.8])
    assert dense[[1, 2, 4]].count_nonzero() == 0
    assert table.grad._nnz() == (2 if coalesced or max_value else 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_complex_gradients_are_units(engine):
    weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    weight.grad = torch.tensor([[3 + 4j, 0], [0.3j, 0.4]])
    clipper = GradientClipper(torch.optim.SGD([weight], lr=0.0), 1.0, scope="unit", engine=engine)
    clipper.step()
    assert clipper.last.norm.tolist() == pytest.approx([5.0, 0.5])
    torch.testing.assert_close(weight.grad, torch.tensor([[0.6 + 0.8j, 0], [0.3j, 0.4]]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced", "within"])
def test_rows_of_any_layout_are_units(engine, layout):
    torch.manual_seed(2)
    if layout == "transposed":
        gradient = torch.randn(30, 8).t()
    elif layout == "channels_last":
        gradient = torch.randn(8, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        gradient = torch.randn(16, 60)[::2, 10:40]
    else:
        gradient = torch.randn(8, 1).expand(8, 30)
    around = gradient._base.clone() if layout == "sliced" else None
    needed = torch.stack([clipped(row, 0.9) for row in gradient.double()])
    weight = nn.Parameter(torch.zeros(gradient.shape))
    weight.grad = gradient
    GradientClipper(torch.optim.SGD([weight], lr=0.0), 0.9, scope="unit", engine=engine).step()
    torch.testing.assert_close(gradient.double(), needed, rtol=1e-6, atol=0)
    if around is not None:
        assert torch.equal(gradient._base[1::2], around[1::2])
        assert torch.equal(gradient._base[:, 40:], around[:, 40:])


@pytest.mark.parametrize("scope", ["unit", lambda name, parameter: range(4)])
def test_rows_that_share_memory_are_refused(scope):
    weight, other = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4, 3))
    weight.grad, other.grad = torch.full((4, 3), 9.0), torch.full((3,), 9.0).expand(4, 3)
    optimizer = torch.optim.SGD([weight, other], lr=0.0)
    with (
        GradientClipper(optimizer, 1.0, scope=scope),
        pytest.raises(GradientError, match=r"strides \(0, 1\).*share memory.*make it contiguous"),
    ):
        optimizer.step()
    assert bool((weight.grad == 9).all())
    assert bool((other.grad == 9).all())
    GradientClipper(optimizer, 1.0, scope="parameter").step()
    assert other.grad.norm().item() == pytest.approx(1.0)


def test_tensors_without_rows_or_elements_are_units_too():
    parameters = [nn.Parameter(torch.ones(s)) for s in ((0, 3), (3, 0), (0,), (), (2, 2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    clipper = GradientClipper(torch.optim.SGD(parameters, lr=0.0), 1.0, scope="unit")
    clipper.step()
    assert clipper.last.norm.tolist() == pytest.approx([0, 0, 0, 0, 2, 8**0.5, 8**0.5])
    assert parameters[-1].grad.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_tied_gradients_belong_to_the_first():
    shared = torch.tensor([3.0, 4.0])
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    one.grad = other.grad = shared
    clipper = GradientClipper(torch.optim.SGD([one, other], lr=0.0), 1.0, scope="parameter")
    clipper.step()
    assert clipper.last.norm.tolist() == [5.0, 0.0]
    assert shared.tolist() == pytest.approx([0.6, 0.8])


# Beside everything else


@pytest.mark.parametrize("policy", ["zero", "skip", "propagate"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_row_that_is_not_finite_concerns_its_own_norm(policy, engine):
    weight = nn.Parameter(torch.zeros(3, 2))
    weight.grad = torch.tensor([[3.0, 4.0], [math.nan, 4.0], [0.3, 0.4]])
    optimizer = torch.optim.SGD([weight], lr=0.0)
    clipper = GradientClipper(
        optimizer, 1.0, scope="unit", nonfinite=policy, max_value=3.5, engine=engine
    )
    optimizer.step()
    first = [3.0, 4.0] if policy == "skip" else [0.6508, 0.7593]  # bounded to [3, 3.5] first
    assert weight.grad[0].tolist() == pytest.approx(first, rel=1e-3)
    assert weight.grad[1].nan_to_num(7.0).tolist() == ([0, 0] if policy == "zero" else [7, 4])
    assert weight.grad[2].tolist() == pytest.approx([0.3, 0.4])
    assert clipper.skipped == (policy == "skip")
    assert clipper.last.nonfinite.tolist() == [False, True, False]


def test_the_error_names_the_parameter_and_says_how_many_norms():
    model = network()
    model[1].weight.grad[2:4, 0] = math.inf
    optimizer = sgd(model)
    GradientClipper(optimizer, 1.0, scope="unit", model=model, nonfinite="raise")
    with pytest.raises(
        gradclip.NonFiniteGradientError,
        match=r"not finite for 2 labels at step 0, .*: 1.weight \(2 of 1500 elements\)",
    ):
        optimizer.step()


def test_the_error_does_not_name_what_is_in_no_norm():
    model = network()
    for name in ("0.weight", "1.weight"):
        model.get_parameter(name).grad.fill_(math.nan)
    optimizer = sgd(model)
    scope = Scope("parameter", exclude="0.*")
    GradientClipper(optimizer, 1.0, scope=scope, model=model, nonfinite="raise")
    with pytest.raises(gradclip.NonFiniteGradientError, match="parameters: 1.weight") as found:
        optimizer.step()
    assert "0.weight" not in str(found.value)


def test_groups_with_their_own_threshold_stand_beside_any_scope():
    model = network()
    optimizer = torch.optim.SGD(
        [
            {"params": model[0].parameters()},
            {"params": model[1].parameters(), "max_norm": 0.5},
            {"params": model[2].parameters(), "max_norm": None},
            {"params": [model.scale]},
        ],
        lr=0.0,
    )
    before = gradients(model)
    clipper = GradientClipper(optimizer, 0.1, scope="parameter", model=model)
    clipper.step()
    assert clipper.labels == ("0.weight", "0.bias", "group 1", "scale")
    assert clipper.last.threshold.tolist() == [0.1, 0.1, 0.5, 0.1]
    after = gradients(model)
    assert after["0.weight"].norm().item() == pytest.approx(0.1, rel=1e-6)
    own = torch.cat([after["1.weight"].flatten(), after["1.bias"]])
    assert own.norm().item() == pytest.approx(0.5, rel=1e-6)
    assert torch.equal(after["2.weight"], before["2.weight"])


@pytest.mark.parametrize("scope", ["group", "parameter", "unit", lambda name, parameter: "x"])
def test_what_is_added_later_gets_labels_of_its_own(scope):
    model, later = network(), nn.Linear(4, 3)
    optimizer = sgd(model)
    clipper = GradientClipper(optimizer, 1.0, scope=scope)
    optimizer.step()
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
    assert later.weight.grad.norm().item() <= bound * (1 + 1e-6)


def test_a_parameter_in_place_of_another_has_its_label():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer = torch.optim.SGD([first], lr=0.0)
    clipper = GradientClipper(optimizer, 1.0, scope="parameter")
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = second
    optimizer.step()
    assert clipper.labels == ("group 0, parameter 0",)
    assert clipper.last.norm.item() == 4.0
    assert second.grad.item() == 1.0


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_parameters_that_moved_onto_the_name_of_another_are_an_error(scope):
    first, second, third = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    for parameter in (first, second, third):
        parameter.grad = torch.tensor([9.0])
    optimizer = torch.optim.SGD([first, second], lr=0.0)
    GradientClipper(optimizer, 1.0, scope=scope)
    optimizer.param_groups[0]["params"][:] = [second, third]
    with pytest.raises(gradclip.AttachError, match="group 0, parameter 1 is the name of 2 of them"):
        optimizer.step()
    assert [second.grad.item(), third.grad.item()] == [9.0, 9.0]


def test_groups_that_are_taken_away_are_an_error_where_they_are_numbered():
    model = network()
    groups = [{"params": model[i].parameters()} for i in range(3)]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    GradientClipper(optimizer, 1.0, scope="group")
    del optimizer.param_groups[1]
    with pytest.raises(gradclip.AttachError, match="SGD had 3 parameter groups and has 2"):
        optimizer.step()


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_an_added_group_that_cannot_be_labelled_changes_nothing(scope):
    weight, later = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))
    weight.grad, later.grad = torch.full((2, 2), 9.0), torch.full((2, 2), 9.0)
    optimizer = torch.optim.SGD([weight], lr=0.0)

    def only_known(name, parameter):
        return range(2) if parameter is weight else 1.5

    clipper = GradientClipper(optimizer, 1.0, scope=only_known)
    optimizer.add_param_group({"params": [later]})
    for _ in range(2):
        with pytest.raises(ArgumentError, match="The scope gave 1.5"):
            optimizer.step()
    assert clipper.labels == ("0", "1")
    assert weight.grad[0, 0].item() == 9.0


@pytest.mark.parametrize("scope", ["group", "parameter", "unit"])
def test_the_log_has_the_total_over_all_norms(scope):
    class Rows(gradclip.Sink):
        def __init__(self) -> None:
            self.rows = []

        def write(self, steps):
            self.rows += steps

    model, sink = network(), Rows()
    total = torch.cat([g.flatten() for g in gradients(model).values()]).norm().item()
    clipper = GradientClipper(sgd(model), 0.5, scope=scope, log=sink)
    clipper.step()
    clipper.close()
    assert sink.rows[0].norm == pytest.approx(total)
    left = torch.cat([g.flatten() for g in gradients(model).values()]).norm().item()
    assert sink.rows[0].clipped_norm == pytest.approx(left)


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_several_optimizers_share_the_norms_of_any_scope(scope):
    model, twin = network(), network()
    optimizers = [
        torch.optim.SGD([model[0].weight, model[1].weight], lr=0.0),
        torch.optim.SGD(
            [model[0].bias, model[1].bias, *model[2].parameters(), model.scale], lr=0.0
        ),
    ]
    clipper = GradientClipper(optimizers, 0.5, scope=scope, model=model)
    clipper.step()
    GradientClipper(sgd(twin), 0.5, scope=scope, model=twin).step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert clipper.steps == 1


@pytest.mark.parametrize("scope", ["group", "parameter", "unit", lambda name, p: range(len(p))])
def test_nothing_is_read_on_the_host(scope):
    with torch.device("meta"):
        model = nn.Linear(3, 4)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer = sgd(model)
    clipper = GradientClipper(optimizer, 1.0, scope=scope, max_value=0.5)
    optimizer.step()
    assert clipper.last.norm.device.type == "meta"
    clipper._recorder._buffer._waiting.clear()  # what has no data cannot be counted at the end

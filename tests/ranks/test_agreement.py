"""What ranks agree on when a clipper is attached, and what they refuse on all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import (
    ArgumentError,
    AttachError,
    GradientClipper,
    MemorySink,
    Ranks,
    Scope,
    Threshold,
)
from tests.support.dtensors import mesh_of, placements_of, spread

Shapes = dict[str, tuple[int, ...]]


def optimizer_of(shapes: Shapes, **group: Any) -> torch.optim.Optimizer:
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.SGD([{"params": named, **group}], lr=0.1)


def squares(clipper: GradientClipper) -> list[float]:
    """Return how many elements of 1 each norm has."""
    return [round(square, 9) for square in clipper.last.norms.square().tolist()]


def attached(each: list[dict[str, Any]]) -> Any:
    """Attach with the options of this rank; return the labels and the norms of a step."""
    own = dict(each[distributed.get_rank()])
    optimizer = optimizer_of(own.pop("shapes"), **own.pop("group", {}))
    replicated = own.pop("replicated", ())
    clipper = GradientClipper(
        optimizer, **{"max_norm": 1.0} | own, ranks=Ranks(replicated=replicated)
    )
    optimizer.step()
    return clipper.labels, squares(clipper)


def refused(each: list[dict[str, Any]], kind: type) -> str:
    with pytest.raises(kind) as caught:
        attached(each)
    return str(caught.value)


def without(name: str) -> Scope:
    return Scope("parameter", exclude=name)


def in_both(**same: Any) -> Any:
    """Return options of two ranks, of which the second has another parameter."""
    return [{"shapes": {"a": (2,)}} | same, {"shapes": {"b": (3,)}} | same]


def test_all_ranks_have_the_labels_of_all(two_ranks):
    one, other = two_ranks.run(attached, in_both(scope="parameter"))
    assert one == other == (("a", "b"), [2.0, 3.0])


def test_labels_are_in_the_order_of_their_names_on_any_ranks(two_ranks):
    """So that a state fits a run that has its parameters on other ranks."""
    one, other = ["b.10", "a.2", "b.9"], ["a.10", "a.1"]
    shapes = [
        {"shapes": dict.fromkeys(names, (2,)), "scope": "parameter"} for names in (one, other)
    ]
    needed = ("a.1", "a.2", "a.10", "b.9", "b.10")
    for each in (shapes, shapes[::-1]):
        assert [labels for labels, _ in two_ranks.run(attached, each)] == [needed] * 2


def test_a_group_has_one_norm_on_all_ranks(two_ranks):
    one, other = two_ranks.run(attached, in_both(scope="group"))
    assert one == other == (("group 0",), [5.0])


def test_thresholds_of_groups_hold_on_all_ranks(two_ranks):
    each = in_both()
    each[0]["group"] = {"max_norm": 0.5}
    one, other = two_ranks.run(attached, each)
    assert one == other == (("global", "group 0"), [3.0, 2.0])


def test_what_is_excluded_may_be_on_another_rank(two_ranks):
    one, other = two_ranks.run(attached, in_both(scope=without("b")))
    assert one == other == (("a",), [2.0])


def tied(name: str, parameter: Any) -> str | None:
    return {"embed": "tokens", "head": "tokens"}.get(name)


def test_copies_of_other_names_share_the_norm_of_the_first(two_ranks):
    each = [{"shapes": {"embed": (4,), "a": (2,)}}, {"shapes": {"b": (3,), "head": (4,)}}]
    for own in each:
        own |= {"replicated": tied, "scope": "parameter"}
    one, other = two_ranks.run(attached, each)
    assert one == other == (("a", "b", "embed"), [2.0, 3.0, 4.0])


def test_copies_of_rows_share_the_norms_of_the_first(two_ranks):
    each = [{"shapes": {"embed": (2, 2)}}, {"shapes": {"b": (3,), "head": (2, 2)}}]
    for own in each:
        own |= {"replicated": tied, "scope": "unit"}
    one, other = two_ranks.run(attached, each)
    assert one == other == (("b", "embed[0]", "embed[1]"), [3.0, 2.0, 2.0])


def tied_twice(name: str, parameter: Any) -> str | bool:
    """Two copies on one rank, of which the other rank tells one alone."""
    return "a"


class Own(Threshold):
    def __init__(self, value: float) -> None:
        self.value = value

    def thresholds(self, norms: Tensor, context: Any) -> Tensor:
        return torch.full_like(norms, self.value)


SCALER = torch.amp.GradScaler("cpu")
WRONG = {
    "a copy of nothing": (
        in_both(replicated="a"),
        AttachError,
        "a is replicated, and only rank 0 has a parameter called a",
    ),
    "no such name": (
        in_both(replicated="c"),
        ArgumentError,
        "replicated='c' matches no parameter; there are a, b.",
    ),
    "nothing to exclude": (
        in_both(scope=without("c")),
        ArgumentError,
        "exclude='c' matches no parameter; there are a, b.",
    ),
    "copies of other shapes": (
        [{"shapes": {"a": (2,)}, "replicated": "a"}, {"shapes": {"a": (3,)}, "replicated": "a"}],
        AttachError,
        r"a has the shape \(3,\) on rank 1, and a, of which it is a copy, has \(2,\)",
    ),
    "another max_norm": (
        [{"shapes": {"a": (2,)}, "max_norm": value} for value in (1.0, 2.0)],
        AttachError,
        r"clippers of several ranks differ: max_norm is Fixed\(1.0\) on rank 0 and Fixed\(2.0\)",
    ),
    "another scope": (
        [{"shapes": {"a": (2,)}, "scope": value} for value in ("global", "group")],
        AttachError,
        "differ: scope is global on rank 0 and group on rank 1",
    ),
    "another threshold of a group": (
        [{"shapes": {"a": (2,)}, "group": {"max_norm": value}} for value in (1.0, 2.0)],
        AttachError,
        "The group 'group 0' has max_norm 2.0 on rank 1 and 1.0 on an earlier rank",
    ),
    "another threshold of a copy": (
        [
            {"shapes": {"a": (2,)}, "group": {"max_norm": value}, "replicated": "a"}
            for value in (1.0, 2.0)
        ],
        AttachError,
        "a on rank 1 is a copy of a on rank 0, and their parameter groups have different max_norm",
    ),
    "a copy on one rank alone": (
        [{"shapes": {"a": (2,), "b": (2,)}, "replicated": names} for names in (["a", "b"], "a")],
        AttachError,
        "b is replicated, and only rank 0 has a parameter called b",
    ),
    "a copy on some ranks": (
        [{"shapes": {"a": (2,), "b": (2,)}, "replicated": names} for names in (tied_twice, "a")],
        AttachError,
        "b is replicated on rank 0 and not on rank 1: give all ranks the same replicated=",
    ),
    "another rule of one's own": (
        [{"shapes": {"a": (2,)}, "max_norm": Own(value)} for value in (1.0, 2.0)],
        AttachError,
        "differ: threshold is {'value': 1.0} on rank 0 and {'value': 2.0} on rank 1",
    ),
    "a scaler on one rank": (
        [{"shapes": {"a": (2,)}, "grad_scaler": scaler} for scaler in (SCALER, None)],
        AttachError,
        "differ: grad_scaler is that of 1 optimizers on rank 0 and None on rank 1",
    ),
    "no parts of one": (
        [{"shapes": {"a": shape}, "scope": "parameter"} for shape in ((2, 3), (4, 2))],
        AttachError,
        r"a has the shape \(4, 2\) on rank 1 and \(2, 3\) on rank 0, which cannot be shards of one",
    ),
    "rows of parts": (
        [{"shapes": {"a": (2, 3)}, "scope": "unit"}] * 2,
        AttachError,
        "a is on ranks 0 and 1, and only of DTensors is it known which indices of dimension 0",
    ),
    "places for names": (
        [{"shapes": {"": (2,)}, "scope": "parameter"}] * 2,
        AttachError,
        "group 0, parameter 0 of rank 0 has a generated name",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_together_is_refused_on_all_ranks(two_ranks, case):
    each, kind, needed = WRONG[case]
    for message in two_ranks.run(refused, each, kind):
        with pytest.raises(kind, match=needed):
            raise kind(message)


def alone_wrong(option: dict[str, Any]) -> tuple[str, list[float]]:
    """Attach wrongly on the second rank, then rightly on both."""
    optimizer = optimizer_of({f"rank{distributed.get_rank()}": (2,)})
    wrong = option if distributed.get_rank() else {}
    with pytest.raises((AttachError, ArgumentError)) as caught:
        GradientClipper(optimizer, **{"max_norm": 1.0} | wrong, ranks=Ranks())
    clipper = GradientClipper(optimizer, 1.0, ranks=Ranks())
    optimizer.step()
    return str(caught.value), squares(clipper)


@pytest.mark.parametrize("option", [{"max_norm": -1.0}, {"model": 3}, {"max_norm": "large"}])
def test_ranks_hear_of_an_error_that_one_of_them_has(two_ranks, option):
    one, other = two_ranks.run(alone_wrong, option)
    assert one == (f"The clipper of rank 1 could not be attached: ArgumentError: {other[0]}", [4.0])
    assert other[1] == [4.0]


def experts_unlike() -> str:
    """Experts of two pairs of ranks, of which the first pair does not fit together."""
    rank = distributed.get_rank()
    expert = spread(torch.zeros(4), mesh_of("b"), placements_of("0"))
    dense = spread(torch.zeros(4), mesh_of("one"), placements_of("0"))
    name = f"expert{rank}" if rank < 2 else "expert"
    named = [(name, nn.Parameter(expert)), ("dense", nn.Parameter(dense))]
    with pytest.raises(AttachError) as caught:
        GradientClipper(torch.optim.SGD(named, lr=0.1), 1.0)
    return str(caught.value)


@pytest.mark.slow
def test_ranks_of_other_groups_hear_of_it_too(four_ranks):
    for message in four_ranks.run(experts_unlike):
        assert "need ranks=gradclip.Ranks(group)" in message


def grown(scope: str, name: str, replicated: str) -> Any:
    rank = distributed.get_rank()
    optimizer = optimizer_of({f"rank{rank}": (2,), "both": (4,)})
    ranks = Ranks(replicated=replicated)
    clipper = GradientClipper(optimizer, 1.0, scope=scope, ranks=ranks, log=MemorySink())
    added = nn.Parameter(torch.zeros(3))
    added.grad = torch.ones(3)
    optimizer.add_param_group({"params": [(name, added)]})
    try:
        optimizer.step()
    except AttachError as error:
        return str(error), added.grad.tolist()
    return squares(clipper), added.grad.square().sum().item()


def test_a_parameter_added_later_counts_where_it_changes_no_labels(two_ranks):
    """Two own ones of 2 elements, one of 4 on both, and two new ones of 3."""
    for norms, share in two_ranks.run(grown, "global", "new", "both"):
        assert norms == [2 + 2 + 4 + 3 + 3]
        assert share == pytest.approx(3 / 14)


@pytest.mark.parametrize(("scope", "name"), [("parameter", "new"), ("global", "both.again")])
def test_a_parameter_added_later_that_changes_them_is_refused(two_ranks, scope, name):
    for message, gradient in two_ranks.run(grown, scope, name, "both*"):
        assert f"{name} was added after the ranks had agreed" in message
        assert gradient == [1.0] * 3


def unlike(option: str) -> str:
    rank, mesh = distributed.get_rank(), mesh_of("one")
    whole = nn.Parameter(spread(torch.zeros(4), mesh, placements_of("0")))
    here = nn.Parameter(torch.zeros(2))
    named = [("whole", whole), (f"rank{rank}", here)] if option == "names" else [("whole", whole)]
    optimizer = torch.optim.SGD(named, lr=0.1)
    with pytest.raises(AttachError) as caught:
        GradientClipper(optimizer, 1.0 + rank if option == "max_norm" else 1.0)
    return str(caught.value)


def test_ranks_of_dtensors_have_the_same_parameters_and_options(two_ranks):
    for message in two_ranks.run(unlike, "names"):
        assert "clips [whole, rank" in message
        assert "need ranks=gradclip.Ranks(group)" in message
    for message in two_ranks.run(unlike, "max_norm"):
        assert "max_norm is Fixed(1.0) on rank 0 and Fixed(2.0) on rank 1" in message


def on_a_mesh_of(ranks: list[int], beside: bool) -> str:
    from torch.distributed.device_mesh import DeviceMesh

    some = DeviceMesh("cpu", ranks)
    named = [("stage", nn.Parameter(spread(torch.zeros(4), some, placements_of("0"))))]
    if beside:
        whole = spread(torch.zeros(4), mesh_of("one"), placements_of("0"))
        named.append(("whole", nn.Parameter(whole)))
    try:
        GradientClipper(torch.optim.SGD(named, lr=0.1), 1.0)
    except AttachError as error:
        return str(error)
    return "attached"


def test_dtensors_on_other_ranks_alone_are_refused(two_ranks):
    """Where no other parameter brings the ranks together, those with a part do not hear of it."""
    needed = "[stage] of rank 1 are DTensors whose mesh does not include that rank"
    one, other = two_ranks.run(on_a_mesh_of, [0], True)
    assert one == other
    assert needed in one
    one, other = two_ranks.run(on_a_mesh_of, [0], False)
    assert one == "attached"
    assert needed in other


def in_some_of_a_group() -> Any:
    group = distributed.new_group([0])
    optimizer = optimizer_of({"a": (2,)})
    if distributed.get_rank() == 0:
        clipper = GradientClipper(optimizer, 1.0, ranks=Ranks(group))
        optimizer.step()
        return squares(clipper)
    with pytest.raises(ArgumentError) as caught:
        Ranks(group)
    return str(caught.value)


def test_a_rank_that_is_not_in_the_group_is_told_so(two_ranks):
    one, other = two_ranks.run(in_some_of_a_group)
    assert one == [2.0]
    assert "that this rank is in" in other


def in_a_mesh() -> Any:
    optimizer = optimizer_of({"a": (2,)})
    ranks = Ranks(mesh_of("one"))
    clipper = GradientClipper(optimizer, 1.0, ranks=ranks)
    optimizer.step()
    return repr(ranks), squares(clipper)


def test_a_mesh_of_one_dimension_is_a_group(two_ranks):
    assert two_ranks.run(in_a_mesh) == [("Ranks(2 ranks)", [4.0])] * 2


def test_without_a_process_group_ranks_are_refused():
    with pytest.raises(AttachError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        GradientClipper(optimizer_of({"a": (2,)}), 1.0, ranks=Ranks())


@pytest.mark.parametrize("given", [2, "world", object()])
def test_what_is_no_group_is_refused(given):
    with pytest.raises(ArgumentError, match="give a torch.distributed.ProcessGroup"):
        Ranks(given)


def test_it_shows_what_it_was_given():
    assert repr(Ranks()) == "Ranks()"
    assert repr(Ranks(replicated=["a", "b.*"])) == "Ranks(replicated=('a', 'b.*'))"

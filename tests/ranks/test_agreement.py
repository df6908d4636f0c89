"""The agreement of ranks when clippers attach, and the errors that all of them raise."""

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


def sgd_of_shapes(shapes: dict[str, tuple[int, ...]], **group: Any) -> torch.optim.Optimizer:
    """Return an optimizer of parameters of these shapes, whose gradients have elements of 1."""
    named = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    return torch.optim.SGD([{"params": named, **group}], lr=0.1)


def squares(clipper: GradientClipper) -> list[float]:
    """Return how many elements of 1 each norm has."""
    return [round(square, 9) for square in clipper.last.norms.square().tolist()]


def labels_and_norms(options: list[dict[str, Any]]) -> Any:
    """Attach with the options of this rank; return the labels and the norms of a step."""
    own = dict(options[distributed.get_rank()])
    optimizer = sgd_of_shapes(own.pop("shapes"), **own.pop("group", {}))
    ranks = Ranks(replicated=own.pop("replicated", ()))
    clipper = GradientClipper(optimizer, **{"max_norm": 1.0} | own, ranks=ranks)
    optimizer.step()
    return clipper.labels, squares(clipper)


def with_shapes(*shapes: dict[str, tuple[int, ...]], **options: Any) -> list[dict[str, Any]]:
    """Return the options of two ranks, which have these parameters and the same options."""
    return [{"shapes": own, **options} for own in shapes]


def that_differ(name: str, *values: Any, **options: Any) -> list[dict[str, Any]]:
    """Return the options of two ranks with the same parameter, which differ in one option."""
    return [{"shapes": {"a": (2,)}, **options, name: value} for value in values]


def without(name: str) -> Scope:
    return Scope("parameter", exclude=name)


def tied(name: str, parameter: Any) -> str | None:
    return {"embed": "tokens", "head": "tokens"}.get(name)


def tied_twice(name: str, parameter: Any) -> str | bool:
    """Return one name for two parameters of a rank, of which the other rank copies one alone."""
    return "a"


A, B = {"a": (2,)}, {"b": (3,)}
AGREED = {
    "parameters": (with_shapes(A, B, scope="parameter"), ("a", "b"), [2, 3]),
    "groups": (with_shapes(A, B, scope="group"), ("group 0",), [5]),
    "a group with a max_norm": (
        [{"shapes": A, "group": {"max_norm": 0.5}}, {"shapes": B}],
        ("global", "group 0"),
        [3, 2],
    ),
    "a name excluded on another rank": (with_shapes(A, B, scope=without("b")), ("a",), [2]),
    "everything excluded": (with_shapes(A, B, scope=without("*")), ("global",), [0]),
    "copies under two names": (
        with_shapes(A | {"embed": (4,)}, B | {"head": (4,)}, replicated=tied, scope="parameter"),
        ("a", "b", "embed"),
        [2, 3, 4],
    ),
    "copies of rows under two names": (
        with_shapes({"embed": (2, 2)}, B | {"head": (2, 2)}, replicated=tied, scope="unit"),
        ("b", "embed[0]", "embed[1]"),
        [3, 2, 2],
    ),
}


@pytest.mark.parametrize("case", AGREED)
def test_labels(two_ranks, case):
    """All ranks have the norms of all."""
    options, labels, norms = AGREED[case]
    assert two_ranks.run(labels_and_norms, options) == [(labels, norms)] * 2


def test_order_of_labels(two_ranks):
    """It is that of their names, so that a state fits a run with parameters on other ranks."""
    names = [["b.10", "a.2", "b.9"], ["a.10", "a.1"]]
    needed = ("a.1", "a.2", "a.10", "b.9", "b.10")
    for ordered in (names, names[::-1]):
        options = with_shapes(*(dict.fromkeys(own, (2,)) for own in ordered), scope="parameter")
        assert [labels for labels, _ in two_ranks.run(labels_and_norms, options)] == [needed] * 2


class Own(Threshold):
    def __init__(self, value: float) -> None:
        self.value = value

    def thresholds(self, norms: Tensor, context: Any) -> Tensor:
        return torch.full_like(norms, self.value)


REFUSED = {
    "a copy of nothing": (
        with_shapes(A, B, replicated="a"),
        "a is replicated, and only rank 0 has a parameter called a",
    ),
    "a copy on one rank": (
        [{"shapes": A | {"b": (2,)}, "replicated": names} for names in (["a", "b"], "a")],
        "b is replicated, and only rank 0 has a parameter called b",
    ),
    "a copy that one rank does not call so": (
        [{"shapes": A | {"b": (2,)}, "replicated": names} for names in (tied_twice, "a")],
        "b is replicated on rank 0 and not on rank 1: give all ranks the same replicated=",
    ),
    "copies of other shapes": (
        with_shapes(A, {"a": (3,)}, replicated="a"),
        r"a has the shape \(3,\) on rank 1, and a, of which it is a copy, has \(2,\) on rank 0",
    ),
    "copies with other thresholds": (
        that_differ("group", {"max_norm": 1.0}, {"max_norm": 2.0}, replicated="a"),
        "a on rank 1 is a copy of a on rank 0, and their parameter groups have different max_norm",
    ),
    "other thresholds of a group": (
        that_differ("group", {"max_norm": 1.0}, {"max_norm": 2.0}),
        "The group 'group 0' has max_norm 2.0 on rank 1 and 1.0 on an earlier rank",
    ),
    "replicated= without a match": (
        with_shapes(A, B, replicated="c"),
        "replicated='c' matches no parameter; there are a, b.",
    ),
    "exclude= without a match": (
        with_shapes(A, B, scope=without("c")),
        "exclude='c' matches no parameter; there are a, b.",
    ),
    "another max_norm": (
        that_differ("max_norm", 1.0, 2.0),
        r"clippers of several ranks differ: max_norm is Fixed\(1.0\) on rank 0 and Fixed\(2.0\)",
    ),
    "another scope": (
        that_differ("scope", "global", "group"),
        "differ: scope is global on rank 0 and group on rank 1",
    ),
    "another rule of one's own": (
        that_differ("max_norm", Own(1.0), Own(2.0)),
        "differ: threshold is {'value': 1.0} on rank 0 and {'value': 2.0} on rank 1",
    ),
    "a scaler on one rank": (
        that_differ("grad_scaler", torch.amp.GradScaler("cpu"), None),
        "differ: grad_scaler is that of 1 optimizers on rank 0 and None on rank 1",
    ),
    "shapes of no shards": (
        with_shapes({"a": (2, 3)}, {"a": (4, 2)}, scope="parameter"),
        r"a has the shape \(4, 2\) on rank 1 and \(2, 3\) on rank 0, which cannot be shards",
    ),
    "rows of shards": (
        with_shapes({"a": (2, 3)}, {"a": (2, 3)}, scope="unit"),
        "a is on ranks 0 and 1, and only of DTensors is it known which indices of dimension 0",
    ),
    "generated names": (
        with_shapes({"": (2,)}, {"": (2,)}, scope="parameter"),
        "group 0, parameter 0 of rank 0 has a generated name",
    ),
}


def messages_of(options: list[dict[str, Any]]) -> str:
    with pytest.raises((AttachError, ArgumentError)) as caught:
        labels_and_norms(options)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(two_ranks, case):
    """All ranks raise, whichever of them is wrong."""
    options, needed = REFUSED[case]
    kind = "ArgumentError" if "matches no parameter" in needed else "AttachError"
    for message in two_ranks.run(messages_of, options):
        with pytest.raises(AttachError, match=f"^{kind}: .*{needed}"):
            raise AttachError(message)


def wrong_on_rank_1(option: dict[str, Any]) -> tuple[str, list[float]]:
    """Attach wrongly on rank 1, then rightly on both."""
    optimizer = sgd_of_shapes({f"rank{distributed.get_rank()}": (2,)})
    wrong = option if distributed.get_rank() else {}
    with pytest.raises((AttachError, ArgumentError)) as caught:
        GradientClipper(optimizer, **{"max_norm": 1.0} | wrong, ranks=Ranks())
    clipper = GradientClipper(optimizer, 1.0, ranks=Ranks())
    optimizer.step()
    return str(caught.value), squares(clipper)


@pytest.mark.parametrize("option", [{"max_norm": -1.0}, {"model": 3}, {"max_norm": "large"}])
def test_an_error_of_one_rank(two_ranks, option):
    """The others hear of it, and all can attach again."""
    one, other = two_ranks.run(wrong_on_rank_1, option)
    assert one == (f"The clipper of rank 1 could not be attached: ArgumentError: {other[0]}", [4.0])
    assert other[1] == [4.0]


def grown(scope: str, name: str, replicated: str) -> Any:
    """Add a parameter on each rank after attaching, and step."""
    optimizer = sgd_of_shapes({f"rank{distributed.get_rank()}": (2,), "both": (4,)})
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


def test_a_parameter_added_later(two_ranks):
    """It counts if it changes no labels: own ones of 2, one of 4 on both, and new ones of 3."""
    for norms, share in two_ranks.run(grown, "global", "new", "both"):
        assert norms == [2 + 2 + 4 + 3 + 3]
        assert share == pytest.approx(3 / 14)


@pytest.mark.parametrize(("scope", "name"), [("parameter", "new"), ("global", "both.again")])
def test_a_parameter_added_later_that_changes_labels(two_ranks, scope, name):
    """It is refused, and nothing is written."""
    for message, gradient in two_ranks.run(grown, scope, name, "both*"):
        assert f"{name} was added after the ranks had agreed" in message
        assert gradient == [1.0] * 3


# DTensors without ranks=


def attached_dtensors(case: str) -> str:
    """Attach to DTensors on all ranks, and something beside; return the error."""
    from torch.distributed.device_mesh import DeviceMesh

    rank, zeros, sharded = distributed.get_rank(), torch.zeros(4), placements_of("0")
    tensors = {"whole": spread(zeros, mesh_of("one"), sharded)}
    if case == "other names":
        tensors[f"rank{rank}"] = torch.zeros(2)
    elif case == "experts":  # the first of two pairs of ranks has experts of different names
        expert = spread(zeros, mesh_of("b"), sharded)
        tensors = {f"expert{rank}" if rank < 2 else "expert": expert, **tensors}
    elif case.startswith("elsewhere"):
        tensors["stage"] = spread(zeros, DeviceMesh("cpu", [0]), sharded)
        if case == "elsewhere alone":
            del tensors["whole"]
    named = [(name, nn.Parameter(tensor)) for name, tensor in tensors.items()]
    try:
        GradientClipper(torch.optim.SGD(named, lr=0.1), 1.0 + rank * (case == "other max_norm"))
    except AttachError as error:
        return str(error)
    return "attached"


ELSEWHERE = "[stage] of rank 1 are DTensors whose mesh does not include that rank"
DTENSORS = {
    "other names": ["clips [whole, rank", "need ranks=gradclip.Ranks(group)"],
    "other max_norm": ["max_norm is Fixed(1.0) on rank 0 and Fixed(2.0) on rank 1"],
    "elsewhere": [ELSEWHERE],
}


@pytest.mark.parametrize("case", DTENSORS)
def test_refusals_of_dtensors(two_ranks, case):
    """The ranks of a DTensor have the same parameters and options, and all of them raise."""
    for message in two_ranks.run(attached_dtensors, case):
        assert all(text in message for text in DTENSORS[case])


def test_dtensors_on_other_ranks_alone(two_ranks):
    """If nothing else brings the ranks together, those with a shard do not hear of the refusal."""
    one, other = two_ranks.run(attached_dtensors, "elsewhere alone")
    assert one == "attached"
    assert ELSEWHERE in other


@pytest.mark.slow
def test_refusals_of_other_groups(four_ranks):
    """Ranks that share another group with those that do not fit together raise, too."""
    for message in four_ranks.run(attached_dtensors, "experts"):
        assert "need ranks=gradclip.Ranks(group)" in message


# The group


def in_a_group(of: str) -> Any:
    optimizer = sgd_of_shapes(A)
    group = mesh_of("one") if of == "mesh" else distributed.new_group([0])
    try:
        ranks = Ranks(group)
    except ArgumentError as error:
        return str(error)
    clipper = GradientClipper(optimizer, 1.0, ranks=ranks)
    optimizer.step()
    return repr(ranks), squares(clipper)


def test_groups(two_ranks):
    """A mesh of one dimension is a group; a group without this rank is refused."""
    assert two_ranks.run(in_a_group, "mesh") == [("Ranks(2 ranks)", [4.0])] * 2
    one, other = two_ranks.run(in_a_group, "rank 0")
    assert one == ("Ranks(1 ranks)", [2.0])
    assert "that this rank is in" in other


def test_without_a_process_group():
    """The option is refused."""
    with pytest.raises(AttachError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        GradientClipper(sgd_of_shapes(A), 1.0, ranks=Ranks())


@pytest.mark.parametrize("group", [2, "world", object()])
def test_invalid_groups(group):
    """They are refused."""
    with pytest.raises(ArgumentError, match="give a torch.distributed.ProcessGroup"):
        Ranks(group)


def test_repr():
    """It shows the options that were given."""
    assert repr(Ranks()) == "Ranks()"
    assert repr(Ranks(replicated=["a", "b.*"])) == "Ranks(replicated=('a', 'b.*'))"

"""The agreement of ranks when clippers attach, and the errors that all of them raise."""

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import ArgumentError, AttachError, GradientClipper, MemorySink, Ranks, Scope
from gradclip.thresholds import Threshold
from tests.support.clippers import stepped
from tests.support.dtensors import mesh_of, placements_of, spread
from tests.support.processes import on_ranks
from tests.support.reference import parameter_with


def sgd_of_shapes(shapes: dict[str, tuple[int, ...]], **group: Any) -> torch.optim.Optimizer:
    """Return an optimizer of parameters of these shapes, whose gradients have elements of 1."""
    named = [(name, parameter_with(torch.ones(shape))) for name, shape in shapes.items()]
    return torch.optim.SGD([{"params": named, **group}], lr=0.1)


def squares(clipper: GradientClipper) -> list[float]:
    """Return how many elements of 1 each norm has."""
    return [round(square, 9) for square in clipper.last.norms.square().tolist()]


def labels_and_norms(options: list[dict[str, Any]]) -> Any:
    """Attach with the options of this rank; return the labels and the norms of a step."""
    own = dict(options[distributed.get_rank()])
    optimizer = sgd_of_shapes(own.pop("shapes"), **own.pop("group", {}))
    own["ranks"] = Ranks(replicated=own.pop("replicated", ()))
    clipper = stepped(optimizer, **own)
    return clipper.labels, squares(clipper)


def with_shapes(*shapes: dict[str, tuple[int, ...]], **options: Any) -> list[dict[str, Any]]:
    """Return the options of two ranks, which have these parameters and the same options."""
    return [{"shapes": own, **options} for own in shapes]


def that_differ(name: str, *values: Any, **options: Any) -> list[dict[str, Any]]:
    """Return the options of two ranks with the same parameters, which differ in one option."""
    return [{"shapes": {"a": (2,)}, **options, name: value} for value in values]


def without(name: str) -> Scope:
    return Scope("parameter", exclude=name)


def tied(name: str, parameter: Any) -> str | None:
    return {"embed": "tokens", "head": "tokens"}.get(name)


A, B = {"a": (2,)}, {"b": (3,)}
FIVE = [dict.fromkeys(names, (2,)) for names in (["b.10", "a.2", "b.9"], ["a.10", "a.1"])]
IN_ORDER = (("a.1", "a.2", "a.10", "b.9", "b.10"), [2] * 5)
"""So that a state fits a run with parameters on other ranks."""
AGREED = {
    "order of names": (with_shapes(*FIVE, scope="parameter"), *IN_ORDER),
    "order of names on other ranks": (with_shapes(*FIVE[::-1], scope="parameter"), *IN_ORDER),
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
@on_ranks("two_ranks")
def test_labels(case):
    """All ranks have the norms of all."""
    options, labels, norms = AGREED[case]
    assert labels_and_norms(options) == (labels, norms)


class Own(Threshold):
    def __init__(self, value: float) -> None:
        self.value = value

    def thresholds(self, norms: Tensor, context: Any) -> Tensor:
        return torch.full_like(norms, self.value)


RULES_OF_OWN = that_differ("max_norm", Own(1.0), Own(2.0))
SCALER_OR_NONE = that_differ("grad_scaler", torch.amp.GradScaler("cpu"), None)
OTHER_GROUPS = ("group", {"max_norm": 1.0}, {"max_norm": 2.0})
TWO = A | {"b": (2,)}
REFUSED = {
    "a is replicated, and only rank 0 has a parameter called a": with_shapes(A, B, replicated="a"),
    "b is replicated, and only rank 0 has a parameter called b": (
        that_differ("replicated", ["a", "b"], "a", shapes=TWO)
    ),
    "b is replicated on rank 0 and not on rank 1: give all ranks the same replicated=": (
        that_differ("replicated", lambda *_: "a", "a", shapes=TWO)  # one name for both
    ),
    "a has the shape (3,) on rank 1, and a, of which it is a copy, has (2,) on rank 0": (
        with_shapes(A, {"a": (3,)}, replicated="a")
    ),
    "a on rank 1 is a copy of a on rank 0, and their parameter groups have different max_norm": (
        that_differ(*OTHER_GROUPS, replicated="a")
    ),
    "The group 'group 0' has max_norm 2.0 on rank 1 and 1.0 on an earlier rank": (
        that_differ(*OTHER_GROUPS)
    ),
    "replicated='c' matches no parameter; there are a, b.": with_shapes(A, B, replicated="c"),
    "exclude='c' matches no parameter; there are a, b.": with_shapes(A, B, scope=without("c")),
    "differ: max_norm is Fixed(1.0) on rank 0 and Fixed(2.0)": that_differ("max_norm", 1.0, 2.0),
    "differ: scope is global on rank 0 and group on rank 1": (
        that_differ("scope", "global", "group")
    ),
    "differ: threshold is {'value': 1.0} on rank 0 and {'value': 2.0} on rank 1": RULES_OF_OWN,
    "grad_scaler is that of 1 optimizers on rank 0 and None on rank 1": SCALER_OR_NONE,
    "a has the shape (4, 2) on rank 1 and (2, 3) on rank 0, which cannot be shards": (
        with_shapes({"a": (2, 3)}, {"a": (4, 2)}, scope="parameter")
    ),
    "a is on ranks 0 and 1, and only of DTensors is it known which indices of dimension 0": (
        with_shapes({"a": (2, 3)}, {"a": (2, 3)}, scope="unit")
    ),
    "group 0, parameter 0 of rank 0 has a generated name": (
        with_shapes({"": (2,)}, {"": (2,)}, scope="parameter")
    ),
}


@pytest.mark.parametrize("needed", REFUSED)
@on_ranks("two_ranks")
def test_refusals(needed):
    """All ranks raise, whichever of them is wrong."""
    kind = ArgumentError if "matches no parameter" in needed else AttachError
    with pytest.raises(kind, match=re.escape(needed)):
        labels_and_norms(REFUSED[needed])


@pytest.mark.parametrize("option", [{"max_norm": -1.0}, {"model": 3}, {"max_norm": "large"}])
@on_ranks("two_ranks")
def test_an_error_of_one_rank(option):
    """The others hear of it, and all can attach again."""
    rank, errors = distributed.get_rank(), [None, None]
    optimizer = sgd_of_shapes({f"rank{rank}": (2,)})
    with pytest.raises(ArgumentError if rank else AttachError) as raised:
        GradientClipper(optimizer, **{"max_norm": 1.0} | (option if rank else {}), ranks=Ranks())
    distributed.all_gather_object(errors, str(raised.value))
    start = "The clipper of rank 1 could not be attached: ArgumentError: "
    assert errors[0] == f"{start}{errors[1]}"
    clipper = stepped(optimizer, ranks=Ranks())
    assert squares(clipper) == [4.0]


@pytest.mark.parametrize(
    ("scope", "name", "replicated"),
    [("global", "new", "both"), ("parameter", "new", "both*"), ("global", "both.again", "both*")],
)
@on_ranks("two_ranks")
def test_a_parameter_added_later(scope, name, replicated):
    """It counts if it changes no labels, else it is refused and nothing is written."""
    optimizer = sgd_of_shapes({f"rank{distributed.get_rank()}": (2,), "both": (4,)})
    ranks = Ranks(replicated=replicated)
    clipper = GradientClipper(optimizer, 1.0, scope=scope, ranks=ranks, log=MemorySink())
    added = parameter_with(torch.ones(3))
    optimizer.add_param_group({"params": [(name, added)]})
    if replicated == "both":
        optimizer.step()
        assert squares(clipper) == [2 + 2 + 4 + 3 + 3]  # own ones, one on both, and new ones
        assert added.grad.tolist() == pytest.approx([14**-0.5] * 3)
    else:
        with pytest.raises(AttachError, match=f"{name} was added after the ranks had agreed"):
            optimizer.step()
        assert added.grad.tolist() == [1.0] * 3


# DTensors without ranks=


def attach_dtensors(*, max_norm: float = 1.0, whole: bool = True, **others: Tensor) -> None:
    """Attach to other tensors and to a DTensor on all ranks."""
    tensors = others | ({"whole": spread(torch.zeros(4), "one", "0")} if whole else {})
    named = [(name, nn.Parameter(tensor)) for name, tensor in tensors.items()]
    GradientClipper(torch.optim.SGD(named, lr=0.1), max_norm)


def shard_of_rank_0() -> Tensor:
    """Return a DTensor that rank 1 has no shard of."""
    from torch.distributed.tensor import DeviceMesh, distribute_tensor

    return distribute_tensor(torch.zeros(4), DeviceMesh("cpu", [0]), placements_of("0"))


ELSEWHERE = "[stage] of rank 1 are DTensors whose mesh does not include that rank"
OTHER_NAMES = "DTensors lie on both. Parameters that only some ranks have need ranks=gradclip"
DTENSORS = {
    OTHER_NAMES: lambda rank: {f"rank{rank}": torch.zeros(2)},
    "max_norm is Fixed(1.0) on rank 0 and Fixed(2.0)": lambda rank: {"max_norm": 1.0 + rank},
    ELSEWHERE: lambda rank: {"stage": shard_of_rank_0()},
}


@pytest.mark.parametrize("needed", DTENSORS)
@on_ranks("two_ranks")
def test_refusals_of_dtensors(needed):
    """The ranks of a DTensor have the same parameters and options, and all of them raise."""
    options = DTENSORS[needed](distributed.get_rank())
    with pytest.raises(AttachError, match=re.escape(needed)):
        attach_dtensors(**options)


@on_ranks("two_ranks")
def test_dtensors_on_other_ranks_alone():
    """If nothing else brings the ranks together, those with a shard do not hear of the refusal."""
    refused = pytest.raises(AttachError, match=re.escape(ELSEWHERE))
    with refused if distributed.get_rank() else nullcontext():
        attach_dtensors(stage=shard_of_rank_0(), whole=False)


@pytest.mark.slow
@on_ranks("four_ranks")
def test_refusals_of_other_groups():
    """Ranks that share another group with those that do not fit together raise, too."""
    rank, expert = distributed.get_rank(), spread(torch.zeros(4), "b", "0")
    with pytest.raises(AttachError, match=r"need ranks=gradclip\.Ranks\(group\)"):
        attach_dtensors(**{f"expert{rank}" if rank < 2 else "expert": expert})


# The group


@on_ranks("two_ranks")
def test_groups():
    """A mesh of one dimension is a group; a group without this rank is refused."""
    groups = [mesh_of("one"), distributed.new_group([0])]
    if distributed.get_rank() == 1:
        with pytest.raises(ArgumentError, match="that this rank is in"):
            Ranks(groups.pop())
    for count, group in zip((2, 1), groups, strict=False):
        assert squares(stepped(sgd_of_shapes(A), ranks=(ranks := Ranks(group)))) == [2.0 * count]
        assert repr(ranks) == f"Ranks({count} ranks)"


def test_without_a_process_group():
    """A clipper is refused, and so is a group that is none; the text of a `Ranks` needs none."""
    assert repr(Ranks()) == "Ranks()"
    ranks = Ranks(replicated=["a", "b.*"])
    assert repr(ranks) == "Ranks(replicated=('a', 'b.*'))"
    with pytest.raises(AttachError, match=r"call torch\.distributed\.init_process_group\(\) first"):
        GradientClipper(sgd_of_shapes(A), 1.0, ranks=ranks)
    for group in (2, "world", object()):
        with pytest.raises(ArgumentError, match="give a torch.distributed.ProcessGroup"):
            Ranks(group)

"""The ``max_norm`` keys of parameter groups: norms and thresholds of their own."""

import copy
import math

import pytest
import torch

import gradclip
from gradclip import ArgumentError, AttachError, GradientClipper, MemorySink
from tests.support.clippers import stepped
from tests.support.reference import gradient_norm, parameter_with

ABSENT = object()
THREE = ((0.5, [3.0, 4.0]), (ABSENT, [6.0, 8.0]), (None, [30.0, 40.0]))
OUTER, BOTH = ((ABSENT, [3.0]), (2, [7.0]), (ABSENT, [4.0])), ((1, [4.0]), (2, [8.0]))
FOUR = ((ABSENT, [3.0]), (0.5, [3.0, 4.0]), (None, [9.0]), (ABSENT, [4.0]))
ONE = ((ABSENT, [3.0, 4.0]), (None, [9.0]))
FIRST, LAST = "group 0, parameter 0", "group 3, parameter 0"


def group_of(key: object, gradient: list[float]) -> dict:
    """Return a parameter group with a key, or without one if it is `ABSENT`."""
    group = {"params": [parameter_with(torch.tensor(gradient))], "max_norm": key}
    return {name: value for name, value in group.items() if value is not ABSENT}


def groups_with(*groups: tuple[object, list[float]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([group_of(*group) for group in groups], lr=1.0)


def norms(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the norm of the gradient of every group."""
    return [gradient_norm(group["params"]) for group in optimizer.param_groups]


def never_asked(step: int) -> float:
    pytest.fail("no norm is left for the clipper's threshold")


@pytest.mark.parametrize(
    ("groups", "max_norm", "scope", "after", "thresholds"),
    [
        (THREE, 1.0, "global", [0.5, 1.0, 50.0], {"group 0": 0.5, "global": 1.0}),
        (THREE, None, "global", [0.5, 10.0, 50.0], {"group 0": 0.5, "global": math.inf}),
        (OUTER, 1.0, "global", [0.6, 2.0, 0.8], {"global": 1.0, "group 1": 2.0}),
        (BOTH, never_asked, "global", [1.0, 2.0], {"group 0": 1.0, "group 1": 2.0}),
        (FOUR, 0.1, "parameter", [0.1, 0.5, 9.0, 0.1], {FIRST: 0.1, "group 1": 0.5, LAST: 0.1}),
        (ONE, 1.0, "global", [1.0, 9.0], {"global": 1.0}),
    ],
)
def test_a_group_with_the_key_has_its_own_norm(groups, max_norm, scope, after, thresholds):
    """Groups without it share the norms of the scope; one norm is a record of 0-d tensors."""
    optimizer = groups_with(*groups)
    last = (clipper := stepped(optimizer, max_norm, scope=scope)).last
    assert norms(optimizer) == pytest.approx(after, rel=1e-6)
    assert [*zip(clipper.labels, last.thresholds.tolist(), strict=True)] == [*thresholds.items()]
    assert last.norm.shape == ((len(thresholds),) if len(thresholds) > 1 else ())


def test_several_norms_are_logged_as_the_norm_of_all():
    """Of several optimizers, too, whose groups have their own names."""
    sink, optimizers = MemorySink(), [groups_with(*THREE), groups_with(*THREE)]
    clipper = stepped(optimizers[0], 1.0, log=sink)
    clipper.close()
    assert clipper.last.norm.tolist() == [5.0, 10.0]
    assert clipper.last.clipped_norm.tolist() == pytest.approx([0.5, 1.0])
    assert clipper.clip_rate() == 1.0
    [step] = sink.steps
    assert (step.norm, step.clipped_norm) == pytest.approx((125**0.5, 1.25**0.5))
    assert step.threshold is None
    optimizers[0] = groups_with(*THREE)
    clipper = stepped(optimizers, 1.0)
    assert clipper.labels == ("optimizer 0, group 0", "global", "optimizer 1, group 0")
    assert [*map(norms, optimizers)] == [pytest.approx([0.5, 0.5**0.5, 50.0], rel=1e-6)] * 2
    assert clipper.steps == 1


def test_a_group_outside_every_norm_does_not_hide_or_cause_anything():
    """Its NaN raises nothing, and the norms that exceed skip the step."""
    optimizer = groups_with(*THREE)
    optimizer.param_groups[2]["params"][0].grad[0] = math.nan
    clipper = stepped(optimizer, 1.0, nonfinite="raise", exceed="skip", max_value=100.0)
    assert not clipper.last.nonfinite.any()
    assert clipper.skipped == 1
    optimizer.param_groups[0]["params"][0].grad[0] = math.nan
    with pytest.raises(gradclip.NonFiniteGradientError, match="group 0, parameter 0"):
        optimizer.step()


@pytest.mark.parametrize("key", [-1.0, math.nan, math.inf, True, "1", torch.tensor(1.0)])
def test_an_invalid_key_is_refused_with_the_group_it_was_found_in(key):
    """When the clipper is made, and when the group is added."""
    said = "The max_norm of group 1 is .*: give a "
    optimizer = groups_with((ABSENT, [3.0, 4.0]))
    GradientClipper(optimizer, 1.0)
    optimizer.add_param_group(group_of(key, [9.0]))
    for _ in range(2):
        with pytest.raises(ArgumentError, match=said):
            optimizer.step()
    assert norms(optimizer) == [5.0, 9.0]
    optimizer = groups_with((ABSENT, [3.0, 4.0]), (key, [1.0]))
    with pytest.raises(ArgumentError, match=said):
        GradientClipper(optimizer, 1.0)
    optimizer.param_groups[1]["max_norm"] = 1.0
    GradientClipper(optimizer, 1.0).detach()


@pytest.mark.parametrize(
    ("first", "added", "norm", "after", "labels"),
    [
        ((ABSENT, [3.0, 4.0]), (2.0, [8.0]), 5.0, [1.0, 2.0], ("global", "group 1")),
        ((None, [3.0]), (ABSENT, [4.0]), 0.0, [3.0, 1.0], ("global",)),
    ],
)
def test_a_group_that_is_added_is_read_at_the_next_step(first, added, norm, after, labels):
    """Its norm comes after the others; where there was none, it is the first."""
    optimizer = groups_with(first)
    clipper = stepped(optimizer, 1.0)
    assert clipper.last.norm.item() == norm
    optimizer.add_param_group(group_of(*added))
    optimizer.step()
    assert norms(optimizer) == pytest.approx(after)
    assert clipper.labels == labels


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize(
    ("index", "key", "said"),
    [
        (2, ABSENT, "group 2 was attached with max_norm=None and now has no max_norm"),
        (0, 7.0, "group 0 was attached with max_norm=0.5 and now has max_norm=7.0"),
        (1, 3.0, "group 1 was attached with no max_norm and now has max_norm=3.0"),
    ],
)
def test_a_changed_key_gets_a_warning_once_and_changes_nothing(index, key, said, loaded):
    """Whether a checkpoint or a hand changed it."""
    optimizer = groups_with(*THREE)
    clipper = GradientClipper(optimizer, 1.0)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copy.deepcopy(state))
    group = (state["param_groups"] if loaded else optimizer.param_groups)[index]
    group["max_norm"] = key
    if key is ABSENT:
        del group["max_norm"]
    with pytest.warns(UserWarning, match=said):
        optimizer.load_state_dict(state) if loaded else optimizer.step()
    optimizer.step()
    optimizer.load_state_dict(state)
    assert norms(optimizer) == pytest.approx([0.5, 1.0, 50.0])
    assert clipper.labels == ("group 0", "global")


def test_after_detaching_no_key_matters():
    optimizer = groups_with(*THREE)
    GradientClipper(optimizer, 1.0).detach()
    state = optimizer.state_dict()
    del state["param_groups"][0]["max_norm"]
    optimizer.load_state_dict(state)
    optimizer.step()


def test_groups_may_be_removed_only_where_nothing_numbers_them():
    """Else nothing says which keys or labels belong to the groups that are left."""
    optimizer = groups_with((ABSENT, [3.0]), (ABSENT, [4.0]))
    clipper = stepped(optimizer, 1.0)
    del optimizer.param_groups[0]
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(0.8)
    optimizer.add_param_group(group_of(2.0, [6.0]))
    optimizer.step()
    assert norms(optimizer) == pytest.approx([0.8, 2.0])
    for groups, scope in ((THREE, "global"), ([(ABSENT, [10.0])] * 3, "group")):
        optimizer = groups_with(*groups)
        GradientClipper(optimizer, 1.0, scope=scope)
        del optimizer.param_groups[0]
        with pytest.raises(AttachError, match="SGD had 3 parameter groups and has 2, .* attach a"):
            optimizer.step()
        assert norms(optimizer)[0] == 10.0

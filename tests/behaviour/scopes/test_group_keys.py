"""The ``max_norm`` keys of parameter groups: norms and thresholds of their own."""

import copy
import math
import warnings

import pytest
import torch

import gradclip
from gradclip import ArgumentError, AttachError, GradientClipper, MemorySink
from tests.support.clippers import stepped
from tests.support.reference import gradient_norm, parameter_with

ABSENT = object()


def groups_with(*groups: tuple[object, list[float]]) -> torch.optim.Optimizer:
    """Return an optimizer with a group for each key, `ABSENT` for none, and gradient."""
    dicts = [{"params": [parameter_with(torch.tensor(g))], "max_norm": key} for key, g in groups]
    for group in dicts:
        if group["max_norm"] is ABSENT:
            del group["max_norm"]
    return torch.optim.SGD(dicts, lr=1.0)


def three_groups() -> torch.optim.Optimizer:
    return groups_with((0.5, [3.0, 4.0]), (ABSENT, [6.0, 8.0]), (None, [30.0, 40.0]))


def norms(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the norm of the gradient of every group."""
    return [gradient_norm(group["params"]) for group in optimizer.param_groups]


def test_a_group_with_the_key_has_a_norm_and_a_threshold_of_its_own():
    """Groups without it share one norm."""
    optimizer, sink = three_groups(), MemorySink()
    clipper = stepped(optimizer, 1.0, log=sink)
    clipper.close()
    assert norms(optimizer) == pytest.approx([0.5, 1.0, 50.0], rel=1e-6)
    assert clipper.labels == ("group 0", "global")
    assert clipper.last.norm.tolist() == [5.0, 10.0]
    assert clipper.last.threshold.tolist() == [0.5, 1.0]
    assert clipper.last.clipped_norm.tolist() == pytest.approx([0.5, 1.0])
    assert clipper.clip_rate() == 1.0
    assert sink.steps[0].norm == pytest.approx(125**0.5)
    assert sink.steps[0].clipped_norm == pytest.approx(1.25**0.5)
    assert sink.steps[0].threshold is None
    optimizer = three_groups()
    clipper = stepped(optimizer, None)
    assert norms(optimizer) == pytest.approx([0.5, 10.0, 50.0])
    assert clipper.last.threshold.tolist() == [0.5, math.inf]
    optimizer = groups_with((ABSENT, [3.0]), (2, [7.0]), (ABSENT, [4.0]))
    clipper = stepped(optimizer, 1.0)
    assert norms(optimizer) == pytest.approx([0.6, 2.0, 0.8], rel=1e-6)
    assert clipper.labels == ("global", "group 1")
    optimizer = groups_with((1, [4.0]), (2, [8.0]))  # no norm is left for the clipper's threshold
    clipper = stepped(optimizer, lambda step: pytest.fail("asked"))
    assert norms(optimizer) == pytest.approx([1.0, 2.0])
    assert clipper.labels == ("group 0", "group 1")


def test_groups_with_keys_stand_beside_any_scope():
    """And beside several optimizers."""
    optimizer = groups_with((ABSENT, [3.0]), (0.5, [3.0, 4.0]), (None, [9.0]), (ABSENT, [4.0]))
    clipper = stepped(optimizer, 0.1, scope="parameter")
    positions = [f"group {group}, parameter 0" for group in (0, 3)]
    assert clipper.labels == (positions[0], "group 1", positions[1])
    assert clipper.last.threshold.tolist() == [0.1, 0.5, 0.1]
    assert norms(optimizer) == pytest.approx([0.1, 0.5, 9.0, 0.1], rel=1e-6)
    one, other = three_groups(), three_groups()
    clipper = stepped([one, other], 1.0)
    assert clipper.labels == ("optimizer 0, group 0", "global", "optimizer 1, group 0")
    for optimizer in (one, other):
        assert norms(optimizer) == pytest.approx([0.5, 0.5**0.5, 50.0], rel=1e-6)
    assert clipper.steps == 1


def test_one_norm_left_is_a_record_of_0d_tensors():
    """Also where none is left, until a group is added."""
    optimizer = groups_with((ABSENT, [3.0, 4.0]), (None, [9.0]))
    clipper = stepped(optimizer, 1.0)
    assert (clipper.last.norm.shape, clipper.last.norm.item()) == ((), 5.0)
    assert norms(optimizer) == pytest.approx([1.0, 9.0])
    optimizer = groups_with((None, [3.0]))
    clipper = stepped(optimizer, 1.0)
    assert (norms(optimizer), clipper.last.norm.item()) == ([3.0], 0.0)
    optimizer.add_param_group({"params": [parameter_with(torch.tensor([4.0]))]})
    optimizer.step()
    assert norms(optimizer) == pytest.approx([3.0, 1.0])


def test_a_group_outside_every_norm_does_not_hide_or_cause_anything():
    """Its NaN raises nothing, and the norms that exceed skip the step."""
    optimizer = three_groups()
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
    optimizer = groups_with((ABSENT, [3.0, 4.0]), (key, [1.0]))
    with pytest.raises(ArgumentError, match=said):
        GradientClipper(optimizer, 1.0)
    optimizer.param_groups[1]["max_norm"] = 1.0
    GradientClipper(optimizer, 1.0).detach()
    optimizer = groups_with((ABSENT, [3.0, 4.0]))
    GradientClipper(optimizer, 1.0)
    added = {"params": [parameter_with(torch.tensor([9.0]))], "max_norm": key}
    optimizer.add_param_group(added)
    for _ in range(2):
        with pytest.raises(ArgumentError, match=said):
            optimizer.step()
    assert norms(optimizer) == [5.0, 9.0]


def test_a_group_that_is_added_is_read_at_the_next_step():
    """Its norm comes after the others."""
    optimizer = groups_with((ABSENT, [3.0, 4.0]))
    clipper = stepped(optimizer, 1.0)
    optimizer.add_param_group({"params": [parameter_with(torch.tensor([8.0]))], "max_norm": 2.0})
    optimizer.step()
    assert norms(optimizer) == pytest.approx([1.0, 2.0])
    assert clipper.labels == ("global", "group 1")
    assert clipper.last.norm.tolist() == pytest.approx([1.0, 8.0])


CHANGES = {
    "group 2 was attached with max_norm=None and now has no max_norm": (2, ABSENT),
    "group 0 was attached with max_norm=0.5 and now has max_norm=7.0": (0, 7.0),
    "group 1 was attached with no max_norm and now has max_norm=3.0": (1, 3.0),
}


def set_key(group: dict, key: object) -> None:
    if key is ABSENT:
        del group["max_norm"]
    else:
        group["max_norm"] = key


@pytest.mark.parametrize("said", CHANGES)
def test_a_changed_key_gets_a_warning_once_and_changes_nothing(said):
    """Whether a checkpoint or a hand changed it."""
    index, key = CHANGES[said]
    optimizer = three_groups()
    clipper = GradientClipper(optimizer, 1.0)
    state = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(state))
    set_key(state["param_groups"][index], key)
    with pytest.warns(UserWarning, match=said):
        optimizer.load_state_dict(state)
    optimizer.step()
    optimizer.load_state_dict(state)
    assert norms(optimizer) == pytest.approx([0.5, 1.0, 50.0])
    assert clipper.labels == ("group 0", "global")
    optimizer = three_groups()
    GradientClipper(optimizer, 1.0)
    set_key(optimizer.param_groups[index], key)
    with pytest.warns(UserWarning, match=said):
        optimizer.step()
    assert norms(optimizer) == pytest.approx([0.5, 1.0, 50.0])


def test_after_detaching_no_key_matters():
    """Nobody keeps them."""
    optimizer = three_groups()
    GradientClipper(optimizer, 1.0).detach()
    state = optimizer.state_dict()
    del state["param_groups"][0]["max_norm"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state)
        optimizer.step()


def test_groups_may_be_removed_only_where_nothing_numbers_them():
    """Else nothing says which keys or labels belong to the groups that are left."""
    optimizer = groups_with((ABSENT, [3.0]), (ABSENT, [4.0]))
    clipper = stepped(optimizer, 1.0)
    del optimizer.param_groups[0]
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(0.8)
    optimizer.add_param_group({"params": [parameter_with(torch.tensor([6.0]))], "max_norm": 2.0})
    optimizer.step()
    assert norms(optimizer) == pytest.approx([0.8, 2.0])
    for optimizer, scope in (
        (three_groups(), "global"),
        (groups_with(*[(ABSENT, [10.0])] * 3), "group"),
    ):
        GradientClipper(optimizer, 1.0, scope=scope)
        del optimizer.param_groups[0]
        with pytest.raises(AttachError, match="SGD had 3 parameter groups and has 2, .* attach a"):
            optimizer.step()
        assert norms(optimizer)[0] == 10.0

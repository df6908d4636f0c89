from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from gradclip import ArgumentError, AttachError, GradientClipper, Sink, Threshold


def parameter(*gradient: float) -> nn.Parameter:
    made = nn.Parameter(torch.ones(len(gradient)))
    made.grad = torch.tensor(gradient)
    return made


def norms(optimizer: torch.optim.Optimizer) -> list[float]:
    """Norm of the first gradient of every group."""
    return [group["params"][0].grad.norm().item() for group in optimizer.param_groups]


def three_groups(**options) -> torch.optim.Optimizer:
    groups = [
        {"params": [parameter(3.0, 4.0)], "max_norm": 0.5},
        {"params": [parameter(6.0, 8.0)]},
        {"params": [parameter(30.0, 40.0)], "max_norm": None},
    ]
    return torch.optim.SGD(groups, lr=1.0, **options)


def test_a_group_with_the_key_has_a_norm_and_a_threshold_of_its_own():
    optimizer = three_groups()
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert norms(optimizer) == pytest.approx([0.5, 1.0, 50.0], rel=1e-6)
    assert clipper.labels == ("group 0", "global")
    assert clipper.last.norm.tolist() == [5.0, 10.0]
    assert clipper.last.threshold.tolist() == [0.5, 1.0]
    assert clipper.last.clipped_norm.tolist() == pytest.approx([0.5, 1.0])
    assert clipper.clip_rate() == 1.0


def test_groups_without_the_key_share_one_norm():
    groups = [{"params": [parameter(g)]} for g in (3.0, 4.0)]
    groups.insert(1, {"params": [parameter(7.0)], "max_norm": 2})
    optimizer = torch.optim.SGD(groups, lr=1.0)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert norms(optimizer) == pytest.approx([0.6, 2.0, 0.8], rel=1e-6)
    assert clipper.labels == ("global", "group 1")


def test_one_norm_left_is_a_record_of_0d_tensors():
    optimizer = torch.optim.SGD(
        [{"params": [parameter(3.0, 4.0)]}, {"params": [parameter(9.0)], "max_norm": None}], lr=1.0
    )
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert clipper.last.norm.shape == ()
    assert clipper.last.norm.item() == 5.0
    assert norms(optimizer) == pytest.approx([1.0, 9.0])


def test_where_no_group_is_clipped_the_record_says_so():
    optimizer = torch.optim.SGD([{"params": [parameter(3.0)], "max_norm": None}], lr=1.0)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert norms(optimizer) == [3.0]
    assert clipper.last.norm.item() == 0.0
    optimizer.add_param_group({"params": [parameter(4.0)]})
    optimizer.step()
    assert norms(optimizer) == pytest.approx([3.0, 1.0])


def test_where_all_have_keys_the_threshold_of_the_clipper_is_not_asked():
    class Unasked(Threshold):
        def thresholds(self, norms, context):
            pytest.fail("asked")

        def observe(self, norms, clipped_norms, context):
            pytest.fail("told")

    optimizer = torch.optim.SGD(
        [{"params": [parameter(float(n))], "max_norm": n / 4} for n in (4, 8)], lr=1.0
    )
    clipper = GradientClipper(optimizer, Unasked())
    optimizer.step()
    assert norms(optimizer) == pytest.approx([1.0, 2.0])
    assert clipper.labels == ("group 0", "group 1")


def test_without_a_threshold_of_the_clipper_groups_keep_theirs():
    optimizer = three_groups()
    clipper = GradientClipper(optimizer, None)
    optimizer.step()
    assert norms(optimizer) == pytest.approx([0.5, 10.0, 50.0])
    assert clipper.last.threshold.tolist() == [0.5, math.inf]


def test_a_threshold_of_ones_own_sees_the_shared_norm_alone():
    class Half(Threshold):
        def __init__(self) -> None:
            self.seen = []

        def thresholds(self, norms, context):
            assert context.present.tolist() == [True]
            return norms / 2

        def observe(self, norms, clipped_norms, context):
            self.seen.append((norms.tolist(), clipped_norms.tolist()))

    optimizer, rule = three_groups(), Half()
    GradientClipper(optimizer, rule)
    optimizer.step()
    assert norms(optimizer) == pytest.approx([0.5, 5.0, 50.0])
    assert rule.seen == [([10.0], [5.0])]


@pytest.mark.parametrize("policy", ["zero", "skip", "propagate"])
def test_a_norm_that_is_not_finite_concerns_its_own_group(policy):
    optimizer = three_groups()
    optimizer.param_groups[0]["params"][0].grad[0] = math.nan
    clipper = GradientClipper(optimizer, 1.0, nonfinite=policy)
    optimizer.step()
    shared = 10.0 if policy == "skip" else 1.0
    assert norms(optimizer)[1:] == pytest.approx([shared, 50.0])
    assert norms(optimizer)[0] == 0.0 if policy == "zero" else math.isnan(norms(optimizer)[0])
    assert clipper.skipped == (policy == "skip")
    assert clipper.clip_rate() == (0.0 if policy == "skip" else 1.0)


def test_a_group_outside_every_norm_does_not_hide_or_cause_anything():
    optimizer = three_groups()
    optimizer.param_groups[2]["params"][0].grad[0] = math.nan
    clipper = GradientClipper(optimizer, 1.0, nonfinite="raise", exceed="skip", max_value=100.0)
    optimizer.step()
    assert not clipper.last.nonfinite.any()
    assert clipper.skipped == 1  # the two norms exceed their thresholds


@pytest.mark.parametrize("key", [-1.0, math.nan, math.inf, True, "1", torch.tensor(1.0)])
def test_an_impossible_key_is_refused_with_the_group_it_was_found_in(key):
    optimizer = torch.optim.SGD([parameter(3.0, 4.0)], lr=1.0)
    optimizer.add_param_group({"params": [parameter(1.0)], "max_norm": key})
    with pytest.raises(ArgumentError, match="The max_norm of group 1 is .*: give a "):
        GradientClipper(optimizer, 1.0)
    optimizer.param_groups[1]["max_norm"] = 1.0
    GradientClipper(optimizer, 1.0)


def test_a_group_that_is_added_is_read_at_the_next_step():
    optimizer = torch.optim.SGD([parameter(3.0, 4.0)], lr=1.0)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    optimizer.add_param_group({"params": [parameter(8.0)], "max_norm": 2.0})
    optimizer.step()
    assert norms(optimizer) == pytest.approx([1.0, 2.0])
    assert clipper.labels == ("global", "group 1")
    assert clipper.last.norm.tolist() == pytest.approx([1.0, 8.0])
    optimizer.add_param_group({"params": [parameter(9.0)], "max_norm": -2.0})
    before = norms(optimizer)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="The max_norm of group 2 is -2.0"):
            optimizer.step()
    assert norms(optimizer) == before


@pytest.mark.parametrize("change", ["drop", "change", "add"])
def test_a_checkpoint_that_changes_a_key_gets_a_warning_and_changes_nothing(change):
    optimizer = three_groups()
    clipper = GradientClipper(optimizer, 1.0)
    state = copy.deepcopy(optimizer.state_dict())
    if change == "drop":
        del state["param_groups"][2]["max_norm"]
        said = "group 2 was attached with max_norm=None and now has no max_norm"
    elif change == "change":
        state["param_groups"][0]["max_norm"] = 7.0
        said = "group 0 was attached with max_norm=0.5 and now has max_norm=7.0"
    else:
        state["param_groups"][1]["max_norm"] = 3.0
        said = "group 1 was attached with no max_norm and now has max_norm=3.0"
    with pytest.warns(UserWarning, match=said):
        optimizer.load_state_dict(state)
    optimizer.step()
    optimizer.load_state_dict(state)  # said once
    assert norms(optimizer) == pytest.approx([0.5, 1.0, 50.0])
    assert clipper.labels == ("group 0", "global")


def test_a_key_that_was_changed_by_hand_gets_a_warning_too():
    optimizer = three_groups()
    GradientClipper(optimizer, 1.0)
    optimizer.param_groups[0]["max_norm"] = 2.0
    with pytest.warns(UserWarning, match="group 0 was attached with max_norm=0.5 and now has"):
        optimizer.step()
    assert norms(optimizer) == pytest.approx([0.5, 1.0, 50.0])


def test_a_checkpoint_with_the_same_keys_gets_no_warning():
    optimizer = three_groups()
    GradientClipper(optimizer, 1.0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert norms(optimizer) == pytest.approx([0.5, 1.0, 50.0])


def test_groups_that_are_taken_away_are_forgotten_where_none_has_a_key():
    groups = [{"params": [parameter(g)]} for g in (3.0, 4.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    del optimizer.param_groups[0]
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(0.8)
    optimizer.add_param_group({"params": [parameter(6.0)], "max_norm": 2.0})
    optimizer.step()
    assert norms(optimizer) == pytest.approx([0.8, 2.0])


def test_groups_that_are_taken_away_are_an_error_where_keys_are_kept():
    optimizer = three_groups()
    GradientClipper(optimizer, 1.0)
    del optimizer.param_groups[0]
    with pytest.raises(AttachError, match="SGD had 3 parameter groups and has 2, .* attach a new"):
        optimizer.step()
    assert norms(optimizer) == [10.0, 50.0]


def test_after_detaching_no_key_matters():
    optimizer = three_groups()
    GradientClipper(optimizer, 1.0).detach()
    state = optimizer.state_dict()
    del state["param_groups"][0]["max_norm"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(state)
        optimizer.step()


def test_a_sink_gets_the_total_and_no_threshold_where_there_are_several():
    class Rows(Sink):
        def __init__(self) -> None:
            self.rows = []

        def write(self, steps):
            self.rows += steps

    optimizer, sink = three_groups(), Rows()
    clipper = GradientClipper(optimizer, 1.0, log=sink)
    optimizer.step()
    clipper.close()
    assert sink.rows[0].norm == pytest.approx(125**0.5)
    assert sink.rows[0].clipped_norm == pytest.approx(1.25**0.5)
    assert sink.rows[0].threshold is None


def test_groups_of_several_optimizers_are_told_apart():
    one, other = three_groups(), three_groups()
    clipper = GradientClipper([one, other], 1.0)
    clipper.step()
    assert clipper.labels == ("optimizer 0, group 0", "global", "optimizer 1, group 0")
    for optimizer in (one, other):
        assert norms(optimizer) == pytest.approx([0.5, 0.5**0.5, 50.0], rel=1e-6)
    assert clipper.steps == 1

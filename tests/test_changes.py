from __future__ import annotations

import math

import torch
from torch import nn

from gradclip import GradientClipper
from gradclip.optimizers.step_changes import GuardedArguments, StepChanges


class Counting(torch.optim.Optimizer):
    """Counts its steps in its groups, whether there are gradients or not."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"lr": 1.0, "k": 0, "name": "a"})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["name"] += "b"


def counting() -> tuple[Counting, nn.Parameter]:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([3.0, 4.0])
    return Counting([weight, nn.Parameter(torch.ones(1))]), weight


def test_hidden_gradients_come_back_as_the_same_objects():
    optimizer, weight = counting()
    gradient = weight.grad
    step_changes = StepChanges(optimizer)
    assert not step_changes
    step_changes.hide_gradients()
    assert step_changes
    assert weight.grad is None
    step_changes.undo()
    assert weight.grad is gradient
    assert not step_changes


def test_what_a_group_counts_while_gradients_are_hidden_is_put_back():
    optimizer, _ = counting()
    step_changes = StepChanges(optimizer)
    step_changes.hide_gradients()
    optimizer.step()
    step_changes.undo()
    assert optimizer.param_groups[0]["k"] == 0
    assert optimizer.param_groups[0]["name"] == "ab"


def test_an_attribute_that_was_absent_is_deleted_and_one_that_was_there_restored():
    optimizer, _ = counting()
    optimizer.there = there = object()
    step_changes = StepChanges(optimizer)
    for name in ("there", "absent"):
        step_changes.set(name, 1)
        step_changes.set(name, 2)
        assert getattr(optimizer, name) == 2
    step_changes.undo()
    assert optimizer.there is there
    assert not hasattr(optimizer, "absent")
    step_changes.undo()
    assert optimizer.there is there


def test_what_somebody_else_has_set_since_stays():
    optimizer, _ = counting()
    step_changes = StepChanges(optimizer)
    step_changes.set("found_inf", 1)
    optimizer.found_inf = theirs = object()
    step_changes.undo()
    assert optimizer.found_inf is theirs


def test_what_was_deleted_since_stays_deleted():
    optimizer, _ = counting()
    optimizer.found_inf = object()
    step_changes = StepChanges(optimizer)
    step_changes.set("found_inf", 1)
    del optimizer.found_inf
    step_changes.undo()
    assert not hasattr(optimizer, "found_inf")


def test_arguments_undo_the_changes_when_they_are_let_go():
    optimizer, weight = counting()
    gradient = weight.grad
    step_changes = StepChanges(optimizer)
    arguments = GuardedArguments({"closure": None}, step_changes)
    step_changes.hide_gradients()
    assert dict(**arguments) == {"closure": None}
    assert weight.grad is None
    del arguments
    assert weight.grad is gradient


class CountingInState(torch.optim.SGD):
    """Counts in its groups: in a key that it makes, in a tensor, in one that becomes a number."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["made"] = group.get("made", 0) + 1
            group["counted"] += 1
            group["replaced"] = float(group["replaced"]) + 1
        return super().step(closure)


def test_a_skipped_step_leaves_groups_as_they_were_whatever_they_count_in():
    weight = nn.Parameter(torch.ones(2))
    optimizer = CountingInState(
        [{"params": [weight], "counted": torch.zeros(()), "replaced": torch.zeros(1)}], lr=0.1
    )
    GradientClipper(optimizer, 1.0, nonfinite="skip")
    for gradient, made, counted in ((math.nan, None, 0.0), (1.0, 1, 1.0), (math.inf, 1, 1.0)):
        weight.grad = torch.full((2,), gradient)
        optimizer.step()
        [group] = optimizer.param_groups
        assert group.get("made") == made
        assert group["counted"] == group["replaced"] == counted

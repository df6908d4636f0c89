"""A rule of a user's own, from the base classes."""

from __future__ import annotations

import math

import pytest
import torch

from gradclip.errors import StateError
from gradclip.thresholds import AdaptiveThreshold, Threshold


class Sum(AdaptiveThreshold):
    """Allows the sum of all norms so far, which it returns as it is and changes in place."""

    def fresh(self, count, device, dtype):
        return {"sum": torch.zeros(count, device=device, dtype=dtype)}

    def limits(self, norms, context):
        return self.state["sum"]

    def learn(self, norms, clipped_norms, observed):
        self.state["sum"].add_(norms).add_(0 * clipped_norms)


@pytest.mark.parametrize("count", [1, 3])
def test_norms_that_are_not_observed_come_as_zero(count, driver):
    class Watching(Sum):
        clipped = ()

        def learn(self, norms, clipped_norms, observed):
            super().learn(norms, clipped_norms, observed)
            self.clipped = (*self.clipped, clipped_norms[0].item())

    run = driver(Watching(), count)
    run.run([[1.0] * count, [math.nan] * count, [None] * count, [2.0] * count])
    norms = run.tensor([1.0] * count)
    run.rule.observe(norms, norms * math.nan, run.context([1.0] * count))
    assert run.ask([0.0] * count).tolist() == [3.0] * count
    assert run.rule.clipped == (0.0, 0.0, 0.0, 1.0, 0.0)  # the first was clipped to 0


def test_a_tensor_of_the_state_is_not_given_away(driver):
    run = driver(Sum(), 2)
    first = run.step([1.0, 2.0])
    run.step([1.0, 2.0])
    assert first.tolist() == [0.0, 0.0]


def test_it_needs_no_constructor_of_its_own(driver):
    assert repr(Sum(cap=2.0)) == "Sum(cap=2.0)"
    assert driver(Sum(cap=2.0)).run([[3.0], [3.0]]) == [[0.0], [2.0]]


def test_it_shows_what_it_keeps_under_the_names_of_its_arguments():
    class Named(Sum):
        def __init__(self, one, *, other, kept):
            super().__init__()
            self.kept = kept

    assert repr(Named(1, other=2, kept=3)) == "Named(None, kept=3)"


def test_its_state_is_named_after_it(driver):
    run = driver(Sum(), 2)
    run.step([1.0, 2.0])
    state = run.rule.state_dict()
    assert (state["rule"], state["sum"].tolist()) == ("Sum", [1.0, 2.0])


def test_all_labels_observed_need_no_mask(driver):
    masks = []

    class Watching(Sum):
        def learn(self, norms, clipped_norms, observed):
            masks.append(None if observed is None else observed.tolist())

    for count in (1, 2):
        run = driver(Watching(), count)
        run.run([[1.0] * count, [1.0] * (count - 1) + [None]])
    assert masks == [None, [False], None, [True, False]]


def test_a_rule_without_the_convenience_goes_on_working(driver):
    class Previous(Threshold):
        previous = math.inf

        def thresholds(self, norms, context):
            return torch.full_like(norms, self.previous)

        def observe(self, norms, clipped_norms, context):
            self.previous = norms.item()

    assert driver(Previous()).run([[2.0], [1.0], [1.0]]) == [[math.inf], [2.0], [1.0]]
    with pytest.raises(StateError, match="Previous keeps no state"):
        Previous().load_state_dict({"previous": 1.0})

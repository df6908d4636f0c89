from __future__ import annotations

import math

import pytest
import torch

from gradclip.thresholds import Percentile
from gradclip.thresholds.window import WindowThreshold

FREE = torch.finfo(torch.float64).max


def double(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


class Plain(WindowThreshold):
    heard = ()

    def limits(self, norms, context):
        return torch.full_like(norms, math.inf)

    def replaced(self, oldest, newest):
        self.heard = (*self.heard, (oldest.squeeze(1).tolist(), newest.squeeze(1).tolist()))

    def replaced_one(self, oldest, newest):
        self.replaced(double(oldest), double(newest))


def test_the_newest_norm_takes_the_place_of_the_oldest(driver):
    run = driver(Plain(3))
    run.run([[1.0], [2.0]])
    assert run.rule.state["window"].tolist() == [[1.0, 2.0, FREE]]
    run.run([[3.0], [4.0]])
    assert run.rule.state["window"].tolist() == [[4.0, 2.0, 3.0]]
    assert run.rule.heard == (([FREE], [1.0]), ([FREE], [2.0]), ([FREE], [3.0]), ([1.0], [4.0]))


def test_each_label_has_its_own_place_and_count(driver):
    run = driver(Plain(2), 3)
    run.run([[1.0, None, 3.0], [4.0, 5.0, math.nan], [6.0, 7.0, None]])
    assert run.rule.state["window"].tolist() == [[6.0, 4.0], [5.0, 7.0], [3.0, FREE]]
    assert run.rule.state["counts"].tolist() == [3, 2, 1]
    assert run.rule.kept().tolist() == [2, 2, 1]
    assert run.rule.filled().tolist() == [[True, True], [True, True], [True, False]]


@pytest.mark.parametrize(
    "make", [lambda: Plain(3), lambda: Percentile(50.0, 4)], ids=["window", "percentile"]
)
def test_what_free_places_hold_in_a_saved_state_does_not_matter(make, driver):
    rule = make()
    run = driver(rule)
    run.run([[1.0], [2.0]])
    state, expected = rule.state_dict(), run.ask([2.0])
    state["window"][0, 2] = 0.25
    rule.load_state_dict(state)
    assert rule.state["window"].tolist() == [[1.0, 2.0, FREE]]
    assert torch.equal(run.ask([2.0]), expected)

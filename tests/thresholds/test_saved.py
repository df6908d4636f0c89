from __future__ import annotations

import pytest
import torch

from gradclip.errors import StateError
from gradclip.thresholds import MeanDeviation, Percentile, ZScore


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1], "The state of the threshold ZScore is a list, not a dict: load the state into a"),
        ({}, "The threshold is ZScore and the state is of no rule: load"),
        ({"rule": "Percentile"}, "The threshold is ZScore and the state is of Percentile: load"),
        (
            {"rule": "ZScore", "mean": 1},
            r"ZScore has the keys \['mean', 'rule'\] and needs \['counts', 'mean', 'rule', 'vari",
        ),
    ],
)
def test_the_error_says_what_was_found_and_what_is_needed(wrong, message, driver):
    with pytest.raises(StateError, match=message):
        driver(ZScore()).rule.load_state_dict(wrong)


def test_the_error_ends_with_the_remedy(driver):
    remedy = (
        ": load the state into a clipper with the labels and the threshold it was saved from. "
        "Nothing was loaded."
    )
    with pytest.raises(StateError) as found:
        driver(ZScore()).rule.load_state_dict({})
    assert str(found.value).endswith(remedy)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", 1.0, "ZScore's 'mean' is a float, not a dense tensor with values: load"),
        ("mean", torch.zeros(1, device="meta"), "not a dense tensor with values: load"),
        ("mean", torch.zeros(2), r"'mean' has the shape \(2,\) and needs \(1,\), which are the nu"),
        ("mean", torch.zeros(1).long(), "'mean' is of torch.int64 and needs torch.float64: load"),
        ("mean", -torch.ones(1), "'mean' holds numbers that are negative, not finite or endless"),
    ],
)
def test_the_error_says_which_tensor(name, value, message, driver):
    rule = driver(ZScore()).rule
    with pytest.raises(StateError, match=message):
        rule.load_state_dict({**rule.state_dict(), name: value})


@pytest.mark.parametrize("make", [lambda n: MeanDeviation(window=n), lambda n: Percentile(9, n)])
def test_a_window_of_another_size_is_refused(make, driver):
    state = driver(make(20)).rule.state_dict()
    with pytest.raises(StateError, match=r"'window' has the shape .* the size of the window: load"):
        driver(make(30)).rule.load_state_dict(state)


def test_norms_beyond_a_narrower_dtype_become_its_largest(driver):
    rule = driver(ZScore(), dtype=torch.float32).rule
    rule.load_state_dict({**rule.state_dict(), "mean": torch.tensor([1e300], dtype=torch.float64)})
    assert rule.state["mean"].item() == torch.finfo(torch.float32).max

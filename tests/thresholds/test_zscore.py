from __future__ import annotations

import math
import statistics

import pytest

from gradclip.errors import ArgumentError
from gradclip.thresholds import ZScore


def oracle(z=2.5, decay=0.97, warmup=25, eps=1e-6, cap=math.inf):
    """ZClip as its paper has it: a list of the warm-up's norms, then moving averages."""

    def limits(norms):
        first, mean, variance, expected = [], None, None, []
        for norm in norms:
            limit = math.inf
            usable = norm is not None and math.isfinite(norm)
            if usable and mean is not None and mean > 0:
                score = (norm - mean) / (math.sqrt(variance) + eps)
                if score > z:
                    limit = mean + z * z * math.sqrt(variance) / score
            expected.append(min(limit, cap) if usable else None)
            if usable and mean is None:
                first.append(norm)
                if len(first) == warmup:
                    mean, variance = statistics.fmean(first), statistics.pvariance(first)
            elif usable:
                own = min(norm, limit)
                mean = decay * mean + (1 - decay) * own
                variance = decay * variance + (1 - decay) * (own - mean) ** 2
        return expected

    return limits


@pytest.mark.parametrize(
    "arguments",
    [
        {"z": 2.5, "warmup": 25},
        {"z": 1.5, "warmup": 3, "decay": 0.9},
        {"z": 0.5, "warmup": 1, "decay": 0.5, "eps": 0.1},
        {"z": 2.0, "warmup": 5, "cap": 1.5},  # the averages observe the limit before the cap
    ],
    ids=str,
)
def test_it_is_the_limit_of_the_paper(arguments, agrees_per_label):
    agrees_per_label(lambda: ZScore(**arguments), oracle(**arguments))


@pytest.mark.parametrize("count", [1, 2])
def test_a_norm_that_is_just_as_many_deviations_out_has_no_limit(count, driver):
    run = driver(ZScore(z=1.0, warmup=2, eps=1.0), count)
    run.run([[1.0] * count, [3.0] * count])  # the mean is 2, the deviation 1
    assert run.ask([4.0] * count).tolist() == [math.inf] * count
    assert run.ask([6.0] * count).tolist() == [2.5] * count


def test_one_norm_that_is_not_finite_changes_nothing(driver):
    norms = [[1.0 + step % 5 / 10] for step in range(30)]
    clean, hit = driver(ZScore()), driver(ZScore())
    clean.run(norms)
    hit.run([*norms[:20], [math.nan], *norms[20:], [math.inf]])
    assert hit.run([[50.0]]) == clean.run([[50.0]])
    assert hit.rule.state["mean"].item() > 0


def test_norms_of_zero_do_not_hold_it_at_zero(driver):
    assert driver(ZScore(warmup=3)).run([[0.0]] * 4 + [[5.0]])[-1] == [math.inf]


def test_a_square_that_overflows_does_not_end_the_limits(driver):
    run = driver(ZScore(warmup=2, decay=0.5))
    run.run([[1e200], [3e200]] + [[1.0]] * 1100)
    assert run.run([[1e200]])[0][0] < 1e3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z": 0}, "z is 0: give a finite number > 0"),
        ({"z": math.nan}, "z is nan: give a finite number > 0"),
        ({"decay": 1}, "decay is 1: give a number >= 0 and < 1"),
        ({"decay": -0.1}, "decay is -0.1: give a number >= 0 and < 1"),
        ({"warmup": 0}, "warmup is 0: give a whole number >= 1"),
        ({"eps": 0.0}, "eps is 0.0: give a finite number > 0"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        ZScore(**arguments)

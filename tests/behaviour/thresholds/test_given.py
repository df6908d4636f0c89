"""What a user may give as ``max_norm``: numbers, functions, rules, and rules of their own."""

import math
import re

import pytest
import torch

from gradclip import ArgumentError, StateError, Threshold, thresholds
from gradclip.thresholds import AdaptiveThreshold, Fixed, Schedule, StepContext, threshold_from
from tests.support.rules import Driver


def ask(rule: Threshold, norms: torch.Tensor, step: int = 0) -> torch.Tensor:
    return rule.thresholds(norms, StepContext(step, torch.ones(len(norms), dtype=torch.bool)))


def test_the_public_names_are_these():
    """Others import them by name."""
    needed = "AdaptiveThreshold Auto Fixed GrowthLimit MeanDeviation MedianDeviation MovingAverage "
    needed += "Percentile Quantile RelativeToWeights Schedule StepContext Threshold ZScore "
    needed += "threshold_from"
    assert thresholds.__all__ == needed.split()


def test_a_function_is_asked_once_a_step():
    """None at a step means no limit, as None for ``max_norm`` does."""
    asked = []
    rule = threshold_from(lambda step: asked.append(step) or [0.5, None, 0.25][step])
    assert [ask(rule, torch.ones(1), step).item() for step in range(3)] == [0.5, math.inf, 0.25]
    assert asked == [0, 1, 2]
    assert ask(threshold_from(None), torch.ones(1)).item() == math.inf


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "1", torch.ones(2)])
def test_an_invalid_number_is_refused(value):
    """When it is given, or when a function returns it."""
    with pytest.raises(ArgumentError, match="^max_norm is .*: give "):
        threshold_from(value)
    with pytest.raises(ArgumentError, match=r"max_norm\(7\) is "):
        ask(threshold_from(lambda step: value), torch.ones(1), 7)


class Half(Threshold):
    """A rule of a user's own, without any convenience."""

    def thresholds(self, norms, context):
        return norms / 2


class Duck:
    """Looks like a rule, and like a function."""

    thresholds = __call__ = Half.thresholds


CLASS = "max_norm is the class Fixed itself: give an instance, Fixed(...)."
DUCK = "max_norm is a Duck, which is not a Threshold: derive its class from gradclip.Threshold."
FUNCTION = "a function of the step that returns a number >= 0, or None for no limit."
BOUND = "give a finite number >= 0, or None for no"
POSITIVE, DECAY, WHOLE = "a finite number > 0", "a number >= 0 and < 1", "a whole number >="
WINDOWS = ("MeanDeviation", "MedianDeviation")
INVALID = [
    ("Percentile", "percentile", [-1, 100.5, math.nan, True, "10", None], "a number from 0 to 100"),
    ("Percentile", "window", [1, 0, -3, 10.0, True], f"{WHOLE} 2"),
    *((rule, "factor", [0, -1.0, math.inf], POSITIVE) for rule in ("Percentile", "Quantile")),
    ("Quantile", "percentile", [-1, 101], "a number from 0 to 100"),
    ("Quantile", "rate", [0, -0.1, 1.5, math.nan, True, None], "a number > 0 and <= 1"),
    ("ZScore", "z", [0, math.nan, math.inf], POSITIVE),
    ("ZScore", "decay", [1, -0.1, math.nan, True], DECAY),
    ("ZScore", "warmup", [0, 1.0], f"{WHOLE} 1"),
    ("ZScore", "eps", [0.0], POSITIVE),
    ("MovingAverage", "factor", [0], POSITIVE),
    ("MovingAverage", "decay", [1.0], DECAY),
    ("MovingAverage", "warmup", [0], f"{WHOLE} 1"),
    ("MovingAverage", "warmup_norm", [0.0, math.inf], POSITIVE),
    ("RelativeToWeights", "factor", [-0.01], POSITIVE),
    ("RelativeToWeights", "eps", [0, math.nan], POSITIVE),
    ("GrowthLimit", "factor", [0, -1.0, math.inf, math.nan, "2"], POSITIVE),
    *((rule, "factor", [0, math.inf], POSITIVE) for rule in WINDOWS),
    *((rule, "window", [1, 2.5], f"{WHOLE} 2") for rule in WINDOWS),
    *((rule, "warmup", [-1], f"{WHOLE} 0") for rule in WINDOWS),
]


@pytest.mark.parametrize(("rule", "option", "values", "needed"), INVALID)
def test_invalid_arguments_are_refused(rule, option, values, needed):
    """Each error says what was found and what is needed."""
    for value in values:
        found = re.escape(f"{option} is {value!r}")
        with pytest.raises(ArgumentError, match=f"^{found}: give {needed}"):
            getattr(thresholds, rule)(**{option: value})


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (threshold_from, Fixed, CLASS),
        (threshold_from, Duck(), DUCK),
        (Schedule, 1.0, f"Schedule got 1.0: give {FUNCTION}"),
        (Schedule, None, f"Schedule got None: give {FUNCTION}"),
        (Schedule, Fixed, f"Schedule got {Fixed!r}: give {FUNCTION}"),
        (lambda value: Fixed(1, cap=value), -1, f"cap is -1: {BOUND} cap."),
        (lambda value: Fixed(1, floor=value), -1, f"floor is -1: {BOUND} floor."),
    ],
)
def test_what_is_no_rule_is_refused(make, value, message):
    """With the remedy."""
    with pytest.raises(ArgumentError) as refused:
        make(value)
    assert str(refused.value) == message


def test_a_fixed_threshold_is_made_once_for_the_same_kind_of_norms():
    """And again for norms of another shape, dtype or device."""
    rule = Fixed(2.0)
    limits = ask(rule, torch.ones(3))
    assert ask(rule, torch.zeros(3)) is limits
    for other in (torch.ones(2), torch.ones(2).double(), torch.ones(2, device="meta")):
        made = ask(rule, other)
        assert (made.shape, made.dtype, made.device) == (other.shape, other.dtype, other.device)


def test_a_rule_without_the_convenience_works_as_it_is():
    """It is not copied, and keeps no state unless it says so."""
    rule = Half()
    assert threshold_from(rule) is rule
    assert Driver(rule).run([[2.0], [1.0]]) == [[1.0], [0.5]]
    with pytest.raises(StateError, match="Half keeps no state"):
        rule.load_state_dict({"previous": 1.0})


class Sum(AdaptiveThreshold):
    """Allows the sum of all norms so far, which it returns as it is and changes in place."""

    learned = ()

    def fresh(self, count, device, dtype):
        return {"sum": torch.zeros(count, device=device, dtype=dtype)}

    def limits(self, norms, context):
        return self.state["sum"]

    def learn(self, norms, clipped_norms, observed):
        self.state["sum"].add_(norms)
        mask = None if observed is None else observed.tolist()
        self.learned = (*self.learned, (norms.tolist(), clipped_norms.tolist(), mask))


@pytest.mark.parametrize("count", [1, 3])
def test_norms_that_are_not_observed_come_as_zero(count):
    """A rule that looks at no mask learns nothing from them; without them there is none."""
    run, zeros, ones = Driver(Sum(), count), [0.0] * count, [1.0] * count
    run.run([ones, [math.nan] * count, [None] * count])
    norms = run.tensor(ones)
    run.rule.observe(norms, norms * math.nan, run.context(ones))
    assert run.rule.state["sum"].tolist() == ones
    none = (zeros, zeros, [False] * count)
    assert run.rule.learned == ((ones, zeros, None), none, none, none)
    run.step([*ones[1:], None])
    assert run.rule.learned[-1][2] == [True] * (count - 1) + [False]


def test_a_tensor_of_the_state_is_not_given_away():
    """The record of the first step would change with the state."""
    run = Driver(Sum(), 2)
    first = run.step([1.0, 2.0])
    run.step([1.0, 2.0])
    assert first.tolist() == [0.0, 0.0]


def test_an_own_rule_needs_no_constructor():
    """It has a cap, a repr, and a state that is named after it."""

    class Named(Sum):
        def __init__(self, one, *, other, kept):
            super().__init__()
            self.kept = kept

    assert repr(Sum(cap=2.0)) == "Sum(cap=2.0)"
    assert repr(Named(1, other=2, kept=3)) == "Named(None, kept=3)"
    run = Driver(Sum(cap=2.0))
    assert run.run([[3.0], [3.0]]) == [[0.0], [2.0]]
    state = run.rule.state_dict()
    assert (state["rule"], state["sum"].tolist()) == ("Sum", [6.0])

"""``max_norm="auto"``: what the rule without a number does with norms of each kind."""

import math
import random
import statistics

import pytest
import torch

from gradclip import GradientClipper, MemorySink
from gradclip.errors import ArgumentError
from gradclip.thresholds import Auto
from tests.support.curves import Training, log_run
from tests.support.rules import Driver

ORDINARY = [1.0 + 0.1 * math.sin(step) for step in range(200)]


def thresholds_of(norms: list[float], **options) -> list[float]:
    """Take a step with each norm, clipped by the rule; return the thresholds, infinite for none."""
    sink = MemorySink()
    log_run(sink, *norms, max_norm="auto", **options)
    return [math.inf if step.threshold is None else step.threshold for step in sink.steps]


def test_it_is_called_by_its_name():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    clipper = GradientClipper(optimizer, "auto")
    assert "Auto()" in repr(clipper)
    assert repr(Auto(cap=3)) == "Auto(cap=3.0)"
    with pytest.raises(ArgumentError, match="max_norm is 'Auto': give 'auto', a finite number"):
        GradientClipper(optimizer, "Auto")


def test_it_limits_from_the_second_step_on():
    """The first norm sets the level."""
    first, second, *_ = thresholds_of([2.0, 50.0, 3.0])
    assert first == math.inf
    assert 2.0 <= second <= 2.5


def test_norms_that_stay_close_are_not_clipped_but_spikes_are():
    thresholds = thresholds_of([*ORDINARY, 100.0])
    assert all(norm <= limit for norm, limit in zip(ORDINARY, thresholds, strict=False))
    assert thresholds[-1] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("spike", [20.0, 1e30])
def test_a_spike_moves_the_threshold_by_little_whatever_its_height(spike):
    """And spikes at every tenth step do not lift it."""
    before, after = thresholds_of([*ORDINARY, spike, 1.0])[-2:]
    assert after < 1.05 * before
    norms = [norm if step % 10 < 9 else spike for step, norm in enumerate(ORDINARY * 3)]
    assert max(thresholds_of(norms)[1:]) < 3.5


def without_order(*norms: float, steps: int) -> list[float]:
    """Return so many of these norms, drawn at random."""
    return random.Random(1).choices(norms, k=steps)


def test_norms_that_jump_are_clipped_to_the_level_of_the_small_ones():
    thresholds = thresholds_of(without_order(1.0, 10.0, 1.2, 40.0, steps=400))
    assert 1.0 < statistics.median(thresholds[-100:]) < 5.0


def test_norms_that_rise_and_fall_by_turns_are_clipped_to_three_times_their_level():
    """Each is far from the last, and near to the last but one; without order they are not."""
    by_turns = thresholds_of([1.0, 8.0] * 50)
    assert min(by_turns[10:]) > 3.0
    assert 1.0 < statistics.median(thresholds_of(without_order(1.0, 8.0, steps=100))[10:]) < 2.0


@pytest.mark.parametrize("rate", [0.005, -0.005, -0.01])
def test_a_level_that_rises_or_falls_by_decades_is_followed_and_not_clipped(rate):
    """By half a percent and one percent a step."""
    norms = [norm * math.exp(rate * step) for step, norm in enumerate(ORDINARY * 5)]
    pairs = [*zip(norms, thresholds_of(norms), strict=True)]
    assert all(norm <= limit for norm, limit in pairs[5:])
    assert pairs[-1][1] < 4.5 * pairs[-1][0]


def test_a_spike_at_the_first_step_hides_others_until_the_level_has_come_down():
    thresholds = thresholds_of([1000.0, *ORDINARY, *ORDINARY])
    assert thresholds[1] >= 1000.0
    assert 0.9 < thresholds[-1] < 3.5


def test_a_level_that_changes_at_once_is_found_again():
    for ratio, steps in ((100.0, 450), (0.01, 170)):
        thresholds = thresholds_of([*ORDINARY, *[ratio * norm for norm in ORDINARY * 5][:steps]])
        assert 0.9 * ratio < thresholds[-1] < 3.5 * ratio


@pytest.mark.parametrize("growth", [1.1, 1.5, 3.0, 100.0])
def test_an_explosion_that_rises_step_by_step_does_not_lift_it(growth):
    """In a hundred steps it rises at least ten thousand times, from the beginning or later."""
    exploding = [growth**step for step in range(100)]
    for norms in (exploding, ORDINARY + exploding):
        assert thresholds_of(norms)[-1] < 60.0


@pytest.mark.parametrize("growth", [1.03, 1.05, 1.06])
def test_a_slow_explosion_lifts_it_by_four_percent_a_step_and_no_more(growth):
    exploding = [growth**step for step in range(200)]
    assert 10.0 < thresholds_of(ORDINARY + exploding)[-1] < 3.0 * 1.04**200


def test_an_explosion_that_rises_and_falls_by_turns_lifts_it_by_four_percent_a_step():
    """It cannot be told from steps that bounce between the sides of a valley."""
    exploding = [1.5**step * (1.0, 8.0)[step % 2] for step in range(100)]
    assert 30.0 < thresholds_of(ORDINARY + exploding)[-1] < 3.0 * 1.04**100


@pytest.mark.parametrize("norms", [[1.0, 3.0] * 40, [1.0, 1.3] * 40, [1.0, 1.7, 2.0, 5.0] * 20])
@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_it_follows_the_formulas_of_its_docstring(norms, noise):
    chance = random.Random(1)
    norms = [norm * math.exp(chance.gauss(0, noise)) for norm in norms]
    calm, turns, level, last, before = 1.33, -1.0, 0.0, 0.0, 0.0
    for norm, threshold in zip(norms, thresholds_of(norms), strict=True):
        factor = min(max(calm, turns, 1), 3)
        assert threshold == pytest.approx(factor * level if level else math.inf, rel=1e-5)
        near, nearer = (min(norm / one, one / norm) if one else 0 for one in (last, before))
        calm += 0.04 * (9 * min(near, threshold / norm) - 3.8 - calm)
        turns += 0.08 * (20 * (nearer - near) - 1 - turns)
        change = 0.04 * (min(norm, 2 * level) - level)
        level = level + min(change, factor / 3 * change) if level else norm
        last, before = norm, last


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_norms_leave_a_finite_level(count, dtype):
    largest = torch.finfo(dtype).max
    run = Driver(Auto(), count, dtype)
    for share in (0.9, 0.3, 1e-300, *[0.45] * 30, 1.0, 1e-300):
        run.step([share * largest] * count)
        assert all(bool(tensor.isfinite().all()) for tensor in run.rule.state.values())
        assert bool((run.rule.state["level"] > 0).all())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_level_that_became_denormal_moves_on(count, dtype):
    """A change of a few parts in a hundred would be rounded away."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    run = Driver(Auto(), count, dtype)
    levels = [run.step([smallest] * count)[0].item() for _ in range(300)][-1:]
    levels += [run.step([1.0] * count)[0].item() for _ in range(300)][-1:]
    assert levels[1] > 40 * levels[0] >= 40 * torch.finfo(dtype).tiny


def test_norms_of_zero_and_nan_are_as_if_they_were_not_there():
    """Wherever they come, the first included."""
    mixed = [0.0, math.nan]
    for norm in ORDINARY:
        mixed += [norm, math.inf, 0.0]
    mixed.append(1.0)
    assert thresholds_of(mixed, nonfinite="zero")[-1] == thresholds_of([*ORDINARY, 1.0])[-1]


def test_each_norm_has_its_own_level():
    weights = [torch.ones(3, requires_grad=True) for _ in range(2)]
    with GradientClipper(torch.optim.SGD(weights, lr=0.0), "auto", scope="parameter") as clipper:
        for step in range(100):
            for scale, weight in zip((1.0, 1e-3), weights, strict=True):
                weight.grad = torch.full((3,), scale * (1 + step % 3 / 10))
            clipper.step()
        large, small = clipper.last.threshold.tolist()
    assert large == pytest.approx(1e3 * small)


@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_state_is_resumed_bit_for_bit_also_before_the_first_norm(count):
    whole, resumed = AutoRun(), AutoRun()
    _ = [whole.threshold(norm) for norm in ORDINARY[:count]]
    resumed.clipper.load_state_dict(whole.clipper.state_dict())
    for norm in ORDINARY[count:60]:
        assert resumed.threshold(norm) == whole.threshold(norm)


class AutoRun:
    """A clipper whose steps have given norms."""

    def __init__(self) -> None:
        self.training = Training()
        self.clipper = GradientClipper(self.training.optimizer, "auto")

    def threshold(self, norm: float) -> float:
        """Take a step with a norm; return its threshold."""
        self.training.take(norm)
        return self.clipper.last.threshold.item()

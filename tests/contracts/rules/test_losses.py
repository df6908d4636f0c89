"""The rule that also limits losses, against OLMo-core's by hand, for numbers and tensors."""

import math
import statistics

import pytest
import torch

from gradclip.errors import ArgumentError, StateError
from gradclip.thresholds import MeanDeviation, StepContext
from tests.support.rules import Driver

NAN, INF, NO_LOSS = math.nan, math.inf, -math.inf
CPU, META = torch.device("cpu"), torch.device("meta")
FACTOR, WINDOW, WARMUP = 2.0, 6, 4


def loss_rule(**options):
    return MeanDeviation(FACTOR, WINDOW, WARMUP, loss=True, **options)


class Losses(Driver):
    """Gives each step a loss as well: a number beside a number, else a tensor."""

    loss = 1.0

    def context(self, step):
        made = super().context(step)
        loss = self.loss if self.numbers else torch.tensor(self.loss, dtype=self.dtype)
        made.loss = loss
        return made

    def run_with(self, losses, norm=1.0):
        """Return the thresholds of steps with these losses and one norm."""
        found = []
        for loss in losses:
            self.loss = loss
            found.append(self.step([norm] * len(self.labels)).tolist())
        return found


def allowed_by_hand(losses):
    """Return which losses OLMo-core would not skip."""
    past, found = [], []
    for loss in losses:
        line = INF
        if len(past) + 1 >= WARMUP:
            window = past[-WINDOW:]
            line = statistics.fmean(window) + FACTOR * statistics.stdev(window)
        found.append(loss < INF and loss <= line)  # false for NaN
        past += [loss] if math.isfinite(loss) else []
    return found


LOSSES = {
    "calm": [2.0 + step % 3 / 10 for step in range(20)],
    "spikes": [9.0 if step in (2, 8, 9, 15) else 2.0 + step % 3 / 10 for step in range(20)],
    "below 0": [{8: -1.0, 12: -9.0}.get(step, -3.0 - step % 3) for step in range(20)],
    "not finite": [NAN, 2.0, INF, 2.1, 2.2, NAN, 2.0, 2.1, INF, 2.15, 30.0, 2.0, -INF, 2.0],
    "rising": [1.2**step for step in range(20)],
}


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("count", "numbers"), [(1, True), (1, False), (3, False)])
def test_losses_are_allowed_as_by_hand(losses, count, numbers):
    """A spike makes all thresholds 0; else they are those of the norms."""
    run = Losses(loss_rule(), count, numbers=numbers)
    plain = Driver(MeanDeviation(FACTOR, WINDOW, WARMUP), count, numbers=numbers)
    without = plain.run([[1.0] * count] * len(losses))
    allowed = allowed_by_hand(losses)
    assert run.run_with(losses) == [
        row if is_allowed else [0.0] * count
        for row, is_allowed in zip(without, allowed, strict=True)
    ]


@pytest.mark.parametrize("numbers", [True, False])
@pytest.mark.parametrize("bounds", [{"floor": 5.0}, {"floor": 5.0, "cap": 6.0}])
def test_a_floor_holds_no_spike_back(bounds, numbers):
    run = Losses(loss_rule(**bounds), numbers=numbers)
    found = [limit for [limit] in run.run_with([*LOSSES["calm"], 100.0])]
    assert min(found[:-1]) >= 5.0
    assert found[-1] == 0.0


def test_losses_are_learned_where_norms_are_not():
    """At steps whose norm is not finite, or that have no gradient; and the other way round."""
    run, other = Losses(loss_rule()), Losses(loss_rule())
    run.run_with(LOSSES["calm"][:5], norm=NAN)
    run.run_with(LOSSES["calm"][5:8], norm=None)
    other.run_with([NAN] * 8)
    assert int(run.rule.state_dict()["loss_counts"]) == 8
    assert int(run.rule.state_dict()["counts"]) == 0
    assert int(other.rule.state_dict()["loss_counts"]) == 0
    assert int(other.rule.state_dict()["counts"]) == 8


def test_added_labels_leave_the_losses_and_other_labels_begin_anew():
    run = Losses(loss_rule(), 2)
    run.run_with(LOSSES["calm"][:5])
    before = run.rule.state_dict()
    run.rule.start([*run.labels, "new"], CPU, torch.float64)
    after = run.rule.state_dict()
    assert torch.equal(after["losses"], before["losses"])
    assert int(after["loss_counts"]) == 5
    run.rule.start(["other"], CPU, torch.float64)
    assert int(run.rule.state_dict()["loss_counts"]) == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_state_goes_on_with_the_same_decisions(count):
    """Also of losses below 0, and what was saved stays as it is."""
    losses = LOSSES["below 0"]
    run = Losses(loss_rule(), count)
    run.run_with(losses[:7])
    saved = run.rule.state_dict()
    bits = repr(saved)
    expected = run.run_with(losses[7:])
    assert [0.0] * count in expected
    other = Losses(loss_rule(), count)
    other.rule.load_state_dict(saved)
    assert other.run_with(losses[7:]) == expected
    assert repr(saved) == bits


def test_a_state_without_losses_loads_and_they_begin_anew():
    """As one that was saved without the option; the other way round is refused."""
    old = Driver(MeanDeviation(FACTOR, WINDOW, WARMUP))
    old.run([[1.0]] * 5)
    run = Losses(loss_rule())
    run.run_with(LOSSES["spikes"])
    run.rule.load_state_dict(old.rule.state_dict())
    state = run.rule.state_dict()
    assert (int(state["counts"]), int(state["loss_counts"])) == (5, 0)
    assert run.run_with([9.0]) != [[0.0]]
    with pytest.raises(StateError, match=r"has the keys .*'loss_counts', 'losses'.* and needs"):
        old.rule.load_state_dict(state)


WRONG = [
    (
        {"losses": torch.full((1, WINDOW), INF)},
        "'losses' holds numbers that are negative, not fini",
    ),
    ({"losses": torch.zeros(1, 2)}, r"'losses' has the shape \(1, 2\) and needs \(1, 6\)"),
    ({"loss_counts": torch.tensor([-1])}, "'loss_counts' holds numbers that are negative"),
    ({"loss_counts": None}, "'loss_counts' is a NoneType, not a dense tensor"),
    ({"window": torch.zeros(1, 2)}, r"'window' has the shape \(1, 2\)"),
]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_a_wrong_state_is_refused_whole(wrong, said):
    run = Losses(loss_rule())
    run.run_with(LOSSES["calm"])
    before = repr(run.rule.state_dict())
    other = Losses(loss_rule()).rule.state_dict()
    with pytest.raises(StateError, match=f"MeanDeviation's {said}.*Nothing was loaded"):
        run.rule.load_state_dict({**other, **wrong})
    del other["losses"]
    with pytest.raises(StateError, match="has the keys .*'loss_counts'.* and needs .*'losses'"):
        run.rule.load_state_dict(other)
    with pytest.raises(StateError, match="is a list, not a dict"):
        run.rule.load_state_dict([1])
    assert repr(run.rule.state_dict()) == before


def test_a_state_loads_on_a_device_without_float64_and_back():
    losses = LOSSES["below 0"]
    whole, narrow = Losses(loss_rule()), Losses(loss_rule(), 1, torch.float32)
    whole.run_with(losses[:3])
    narrow.rule.load_state_dict(whole.rule.state_dict())
    found = [limit for [limit] in narrow.run_with(losses[3:])]
    needed = [limit for [limit] in whole.run_with(losses[3:])]
    assert found == pytest.approx(needed, rel=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_the_host_reads_nothing_of_another_device(count):
    rule = loss_rule()
    rule.start([str(index) for index in range(count)], META, torch.float64)
    norms = torch.ones(count, dtype=torch.float64, device=META)
    context = StepContext(0, norms > 0, loss=norms.new_ones(()))
    for _ in range(3):
        limits = rule.thresholds(norms, context)
        rule.observe(norms, norms, context)
    assert (limits.device, limits.dtype, limits.shape) == (META, torch.float64, (count,))


def test_the_option_is_true_or_false():
    """And shown where it is given."""
    with pytest.raises(
        ArgumentError, match="loss is 2.5: give True or False, and the loss of each"
    ):
        MeanDeviation(6, loss=2.5)
    assert repr(MeanDeviation(6, loss=True)) == (
        "MeanDeviation(6.0, window=128, warmup=64, loss=True)"
    )
    assert "loss" not in repr(MeanDeviation(6))

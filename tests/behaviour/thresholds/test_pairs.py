"""Pairs of scope and threshold in training: all run, and the known ones do what they say."""

import io
import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from gradclip import ArgumentError, GradientClipper, MemorySink, Scope, StateError, thresholds
from gradclip.thresholds import (
    GrowthLimit,
    MeanDeviation,
    MedianDeviation,
    Percentile,
    Quantile,
    ZScore,
)
from tests.support.clippers import sgd, stepped
from tests.support.curves import log_run
from tests.support.reference import parameter_with
from tests.support.rules import ADAPTIVE, RULES

SCOPES = {
    **{kind: kind for kind in ("global", "group", "parameter", "unit")},
    "excluding": Scope("unit", exclude="2.*"),
    "seeds": lambda name, parameter: range(len(parameter)),
    "modules": lambda name, parameter: name.split(".")[0],
}


class HostileRun:
    """A model that is trained on the same batches every time, some of which are hostile."""

    def __init__(self, scope, rule, **options) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))
        self.idle = nn.Parameter(torch.ones(4))  # has a gradient in some steps only
        groups = [{"params": self.model.parameters()}, {"params": [self.idle]}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)
        options |= {"scope": scope, "model": self.model}
        self.clipper = GradientClipper(self.optimizer, rule, **options)

    def steps(self, first: int, last: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Take steps; yield thresholds, coefficients and parameters after each."""
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            batch = torch.randn(8, 6, generator=generator)
            scale = 30.0 if step % 7 == 6 else 1.0
            self.optimizer.zero_grad()
            out = self.model(batch) * scale
            (out.square().mean() + (out.sum(0) @ self.idle if step % 3 == 0 else 0)).backward()
            if step % 10 == 9:
                self.model[0].weight.grad[1, 2] = math.nan
            self.optimizer.step()
            record, parameters = self.clipper.last, [*self.model.parameters(), self.idle]
            values = torch.cat([parameter.detach().flatten() for parameter in parameters])
            yield record.thresholds.clone(), record.coefficients.clone(), values


@pytest.mark.parametrize("engine", ["reference", "operators"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", SCOPES)
def test_every_pair_runs_and_clips_to_its_thresholds(scope, rule, engine):
    """Whatever a step brings; what is not finite becomes 0."""
    run = HostileRun(SCOPES[scope], RULES[rule](), engine=engine)
    clipped = 0
    for limits, coefficients, parameters in run.steps(0, 30):
        norms = run.clipper.last.norms
        finite = norms.isfinite()
        assert limits.shape == norms.shape == (len(run.clipper.labels),)
        assert not limits.isnan().any()
        needed = torch.where(norms > limits, limits / norms, 1.0)
        torch.testing.assert_close(coefficients[finite], needed[finite], rtol=1e-12, atol=0)
        assert bool((coefficients[~finite] == 0).all())
        assert parameters.isfinite().all()
        clipped += int((coefficients < 1).sum())
    assert clipped > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_resumed_run_decides_as_one_that_never_stopped(scope, rule):
    """From a checkpoint of any step, bit for bit, whatever it had learned before."""
    stop = random.Random(f"{scope} {rule}").randrange(1, 24)
    whole = [*HostileRun(SCOPES[scope], RULES[rule]()).steps(0, 25)]
    stopped, resumed = (HostileRun(SCOPES[scope], RULES[rule]()) for _ in range(2))
    _ = [*stopped.steps(0, stop)], [*resumed.steps(3, 17)]
    saved = io.BytesIO()
    parts = (stopped.model, stopped.optimizer, stopped.clipper)
    torch.save([*(part.state_dict() for part in parts), stopped.idle.data], saved)
    saved.seek(0)
    model, optimizer, clipper, idle = torch.load(saved, weights_only=True)
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.clipper.load_state_dict(clipper)
    resumed.idle.data.copy_(idle)
    for found, needed in zip(resumed.steps(stop, 25), whole[stop:], strict=True):
        assert all(map(torch.equal, found, needed))
    _ = [*stopped.steps(stop, 25)]
    counters = resumed.clipper.state_dict()["counters"]
    assert counters == stopped.clipper.state_dict()["counters"]


def test_a_state_of_other_norms_is_refused():
    """Other labels, another window, or keys that lack."""
    saved = HostileRun("parameter", Percentile(window=20)).clipper.state_dict()
    for scope, window, said in (
        ("unit", 20, r"has the labels \['0.weight', .*, the clipper has \['0.w"),
        ("parameter", 30, r"'window' has the shape \(5, 19\) and needs \(5, 29\), .* the size of"),
    ):
        with pytest.raises(StateError, match=f"{said}.*Nothing was loaded"):
            HostileRun(scope, Percentile(window=window)).clipper.load_state_dict(saved)
    without = {key: saved[key] for key in saved if key != "labels"}
    with pytest.raises(StateError, match="needs the keys"):
        HostileRun("parameter", Percentile(window=20)).clipper.load_state_dict(without)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_learns_serves_one_clipper_at_a_time(rule):
    """Until it is detached, gone, or could not be made."""
    shared, optimizer, other = RULES[rule](), sgd([1.0]), sgd([1.0])
    with pytest.raises(ArgumentError) as kept:  # with its traceback, and so the clipper
        GradientClipper(optimizer, shared, log=5)
    first = GradientClipper(optimizer, shared)
    assert kept.value is not None
    if rule in ADAPTIVE:
        with pytest.raises(ArgumentError, match="learns from the norms of another clipper"):
            GradientClipper(other, shared)
    first.detach()
    second = GradientClipper(optimizer, shared)
    second.close()
    del first, second
    GradientClipper(other, shared)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_without_any_norm_is_saved_and_loaded(rule):
    """Where all groups have thresholds of their own; a later group is its first."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "max_norm": key} for key in (1.0, None)]
    clipper = stepped(optimizer := torch.optim.SGD(groups, lr=0.1), RULES[rule]())
    clipper.load_state_dict(clipper.state_dict())
    optimizer.add_param_group({"params": [parameter_with(torch.tensor([9.0]))]})
    clipper.step()
    assert clipper.last.norm[1].item() == 9.0


# Known pairs, and what they are for

KNOWN = {
    "Pascanu": {"max_norm": 1.0},
    "clipnorm": {"max_norm": thresholds.Fixed(1.0), "scope": "parameter"},
    "warm-up": {"max_norm": thresholds.Schedule(lambda step: 1.0 + 1.0 / (step + 1))},
    "AutoClip": {"max_norm": Percentile(10)},
    "bitsandbytes": {"max_norm": Percentile(5, window=100), "scope": "parameter"},
    "adaptive clipping": {"max_norm": Quantile(50)},
    "ZClip": {"max_norm": ZScore(2.5)},
    "AdaGC": {"max_norm": thresholds.MovingAverage(1.05), "scope": "parameter"},
    "median": {"max_norm": MedianDeviation(10)},
    "OLMo": {"max_norm": MeanDeviation(6, window=128), "exceed": "skip"},
    "AGC": {"max_norm": thresholds.RelativeToWeights(0.01), "scope": "unit"},
    "Fira": {"max_norm": GrowthLimit(1.01), "scope": "parameter"},
}
"""Algorithms as their authors have them, one line each."""


def feed(rule, norms: list[float], **options) -> tuple[GradientClipper, list[float]]:
    """Take a step with each norm; return the clipper and the norms after clipping."""
    sink = MemorySink()
    clipper = log_run(sink, *norms, max_norm=rule, **options)
    return clipper, [step.clipped_norm for step in sink.steps]


ORDINARY = [1.0 + 0.1 * math.sin(step) for step in range(200)]
TENFOLD = [10 * norm for norm in ORDINARY]


@pytest.mark.parametrize("name", KNOWN)
def test_known_algorithms_are_one_line(name):
    """And a model learns with each."""
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(32, 5, generator=generator)
        noise = torch.randn(32, 1, generator=generator)
        return (model(inputs) - inputs.sum(1, keepdim=True).sin() - noise).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    clipper = GradientClipper(optimizer, **KNOWN[name])
    before = sum(loss(step).item() for step in range(20))
    for step in range(150):
        clipper.zero_grad()
        loss(step).backward()
        clipper.step()
    assert sum(loss(step).item() for step in range(20)) < before
    assert clipper.skipped <= 3
    clipper.detach()


def test_autoclip_at_10_clips_about_90_percent_of_stationary_norms():
    """Once the window shows how they vary."""
    norms = torch.randn(1500, 50, generator=torch.Generator().manual_seed(0)).norm(dim=1)
    assert 0.87 < feed(Percentile(10), norms.tolist())[0].clip_rate() < 0.93


@pytest.mark.parametrize("percentile", [10, 50, 90])
def test_a_quantile_clips_its_share_of_norms_that_rise_and_fall(percentile):
    """Where a window comes late."""
    norms = [norm * (2 + math.sin(step / 400)) for step, norm in enumerate(ORDINARY * 15)]
    clipper, _ = feed(Quantile(percentile), norms)
    assert clipper.clip_rate() == pytest.approx(1 - percentile / 100, abs=0.02)


@pytest.mark.parametrize("rule", [Percentile, Quantile])
def test_a_factor_above_the_spread_of_the_norms_leaves_only_spikes_to_clip(rule):
    clipper, clipped = feed(rule(10, factor=1.5), [*ORDINARY, 30.0])
    assert clipper.clip_rate() == pytest.approx(1 / 201)
    assert clipped[-1] == pytest.approx(1.5 * min(ORDINARY), rel=0.15)


def test_a_rule_that_is_passed_on_keeps_what_it_has_learned():
    rule = Percentile(50)
    first, _ = feed(rule, [1.0] * 20)
    first.detach()
    assert feed(rule, [9.0])[1] == [1.0]


def test_a_quantile_follows_by_at_most_its_rate():
    """Ten times as high or as low after 93 steps, with the defaults."""
    for count, reached in ((91, False), (93, True)):
        rise, fall = (feed(Quantile(), [1.0, *[norm] * count])[0] for norm in (1e9, 1e-9))
        assert (rise.last.threshold.item() > 9.8) == reached
        assert (fall.last.threshold.item() < 1 / 9.8) == reached


@pytest.mark.parametrize("exceed", ["scale", "skip"])
@pytest.mark.parametrize(
    ("rule", "later", "skipped"),
    [
        (MeanDeviation, 1, 1),
        (MeanDeviation, 128, 1),
        (MeanDeviation, 129, 2),
        (MedianDeviation, 1, 2),
    ],
)
def test_one_spike_blinds_the_mean_and_not_the_median(rule, later, skipped, exceed):
    """The mean misses the next spike for 128 steps."""
    spiked = [*ORDINARY, 100.0, *ORDINARY[: later - 1], 50.0]
    clipper, _ = feed(rule(), spiked, exceed=exceed)
    assert bool(clipper.last.norm > clipper.last.threshold) == (skipped == 2)
    assert clipper.skipped == (skipped if exceed == "skip" else 0)


@pytest.mark.parametrize("rule", [ZScore, thresholds.MovingAverage, GrowthLimit])
def test_a_skipped_step_is_learned_from_as_if_it_had_been_scaled(rule):
    """So that skipping does not end the learning."""
    norms = [*(norm / 2 for norm in ORDINARY), 100.0, 0.4, 60.0, *ORDINARY]
    skipping, scaling = (feed(rule(), norms, exceed=exceed)[0] for exceed in ("skip", "scale"))
    assert skipping.skipped >= 1
    assert torch.equal(skipping.last.thresholds, scaling.last.thresholds)


@pytest.mark.parametrize("observes_skipped", [False, True])
def test_an_own_rule_observes_skipped_steps_only_if_it_asks(observes_skipped):
    """With the clipped norm that scaling would have made."""

    class Own(thresholds.Threshold):
        observed = ()

        def thresholds(self, norms, context):
            return torch.full_like(norms, 2.0)

        def observe(self, norms, clipped_norms, context):
            self.observed = (*self.observed, (norms.item(), clipped_norms.item()))

    rule = Own()
    rule.observes_skipped = observes_skipped
    feed(rule, [1.0, 5.0], exceed="skip")
    assert rule.observed == ((1.0, 1.0), (5.0, 2.0))[: 1 + observes_skipped]


RISING = [*ORDINARY, *(3 * norm for norm in ORDINARY * 2)]


@pytest.mark.parametrize(
    "make", [lambda: Percentile(90, window=50), MeanDeviation, MedianDeviation, GrowthLimit]
)
def test_norms_that_rise_for_good_are_followed_while_skipping(make):
    """Most of the last fifty steps are taken."""
    before, after = (
        feed(make(), norms, exceed="skip")[0] for norms in (RISING, RISING + RISING[-50:])
    )
    assert after.skipped - before.skipped < 40


@pytest.mark.parametrize("rule", [ZScore, thresholds.MovingAverage])
def test_norms_that_rise_at_once_and_for_good_are_skipped_by_averages(rule):
    begun, risen = (
        feed(rule(), norms, exceed="skip")[0] for norms in (ORDINARY, ORDINARY + TENFOLD)
    )
    assert risen.skipped - begun.skipped == len(TENFOLD)


def test_zscore_follows_a_slow_rise():
    rising = [ORDINARY[step % 200] * 1.005**step for step in range(600)]
    assert feed(ZScore(2.5), rising)[0].clip_rate() < 0.02
    assert rising[-1] > 15 * rising[0]


def test_growth_limit_lets_norms_come_back_by_1_percent_a_step():
    _, clipped = feed(GrowthLimit(1.01), [1.0, 1.0, 0.1, *[1.0] * 50])
    assert clipped[2:] == pytest.approx([0.1 * 1.01**step for step in range(51)])


@pytest.mark.parametrize(
    ("rule", "steps"), [(ZScore, 25), (MeanDeviation, 63), (MedianDeviation, 49)]
)
def test_in_the_first_steps_there_is_no_threshold_but_a_cap(rule, steps):
    early, late = ([*ORDINARY[:count], 1e6] for count in (steps - 1, steps))
    assert feed(rule(), early)[1][-1] == 1e6 > feed(rule(), late)[1][-1]
    assert feed(rule(cap=5.0), early)[1][-1] == pytest.approx(5.0)


IDLE = [float(step % 5 > 0) for step in range(100)]


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [(Percentile(10), 0.0), (Percentile(10, floor=0.5), 0.5), (Percentile(30), 1.0)],
)
def test_a_percentile_of_norms_that_are_mostly_idle_needs_a_floor(rule, threshold):
    """Here 20 % of the steps are idle, and the last four are not."""
    assert feed(rule, IDLE)[1][-4:] == [threshold] * 4


def test_a_quantile_of_norms_that_are_mostly_idle_is_one_of_the_others():
    assert min(feed(Quantile(10), IDLE)[1][-4:]) > 0.9

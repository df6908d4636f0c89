"""Pairs of scope and threshold in training: all run, and the known ones do what they say."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from gradclip import ArgumentError, GradientClipper, Scope, StateError, Threshold
from gradclip.thresholds import (
    Fixed,
    GrowthLimit,
    MeanDeviation,
    MedianDeviation,
    MovingAverage,
    Percentile,
    RelativeToWeights,
    Schedule,
    ZScore,
)

SCOPES = {
    "global": "global",
    "group": "group",
    "parameter": "parameter",
    "unit": "unit",
    "excluding": Scope("unit", exclude="2.*"),
    "seeds": lambda name, parameter: range(len(parameter)),
    "modules": lambda name, parameter: name.split(".")[0],
}
RULES: dict[str, Callable[[], Threshold]] = {
    "Fixed": lambda: Fixed(0.3),
    "Schedule": lambda: Schedule(lambda step: 0.5 / (step + 1)),
    "Percentile": lambda: Percentile(10, window=20),
    "ZScore": lambda: ZScore(1.5, warmup=5),
    "MovingAverage": lambda: MovingAverage(warmup=5),
    "MeanDeviation": lambda: MeanDeviation(1.0, window=8),
    "MedianDeviation": lambda: MedianDeviation(1.0, window=8),
    "RelativeToWeights": lambda: RelativeToWeights(0.05),
    "GrowthLimit": GrowthLimit,
}


class Run:
    """A model that is trained on the same batches every time, some of which are hostile."""

    def __init__(self, scope, rule: Threshold, **options) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))
        self.idle = nn.Parameter(torch.ones(4))  # has a gradient in some steps only
        groups = [{"params": self.model.parameters()}, {"params": [self.idle]}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)
        self.clipper = GradientClipper(
            self.optimizer, rule, scope=scope, model=self.model, **options
        )

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
            last_record = self.clipper.last
            yield (
                last_record.thresholds.clone(),
                last_record.coefficients.clone(),
                torch.cat([p.detach().flatten() for p in (*self.model.parameters(), self.idle)]),
            )


@pytest.mark.parametrize("engine", ["reference", "operators"])
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("scope", list(SCOPES))
def test_every_pair_runs_and_clips_to_its_thresholds(scope, rule, engine):
    run = Run(SCOPES[scope], RULES[rule](), engine=engine)
    clipped = 0
    for thresholds, coefficients, parameters in run.steps(0, 30):
        norms = run.clipper.last.norms
        finite = norms.isfinite()
        assert thresholds.shape == norms.shape == (len(run.clipper.labels),)
        assert not thresholds.isnan().any()
        needed = torch.where(norms > thresholds, thresholds / norms, 1.0)
        torch.testing.assert_close(coefficients[finite], needed[finite], rtol=1e-12, atol=0)
        assert bool((coefficients[~finite] == 0).all())
        assert parameters.isfinite().all()
        clipped += int((coefficients < 1).sum())
    assert clipped > 0


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("scope", list(SCOPES))
def test_a_resumed_run_decides_as_one_that_never_stopped(scope, rule):
    stop = random.Random(f"{scope} {rule}").randrange(1, 24)
    whole = list(Run(SCOPES[scope], RULES[rule]()).steps(0, 25))
    stopped, resumed = (Run(SCOPES[scope], RULES[rule]()) for _ in range(2))
    for _ in stopped.steps(0, stop):
        pass
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
        for one, other in zip(found, needed, strict=True):
            assert torch.equal(one, other)
    assert resumed.clipper.state_dict()["counters"] == stopped_at_the_end(stopped, stop)


def stopped_at_the_end(run: Run, stop: int) -> dict[str, int]:
    for _ in run.steps(stop, 25):
        pass
    return run.clipper.state_dict()["counters"]


def test_a_state_of_other_labels_or_another_rule_is_refused_and_changes_nothing():
    state = Run("parameter", Percentile(window=20))
    for _ in state.steps(0, 5):
        pass
    saved = state.clipper.state_dict()
    others = {
        "labels": Run("unit", Percentile(window=20)),
        "Percentile": Run("parameter", ZScore()),
        "window": Run("parameter", Percentile(window=30)),
        "threshold": Run("parameter", Fixed(1.0)),
    }
    for run in others.values():
        for _ in run.steps(0, 3):
            pass
        before = copy.deepcopy(run.clipper.state_dict())
        with pytest.raises(StateError, match="Nothing was loaded"):
            run.clipper.load_state_dict(saved)
        after = run.clipper.state_dict()
        assert repr(before) == repr(after)
    with pytest.raises(
        StateError, match=r"has the labels \['0.weight', .*, the clipper has \['0.w"
    ):
        others["labels"].clipper.load_state_dict(saved)
    scheduled, fixed = (Run("global", RULES[name]()) for name in ("Schedule", "Fixed"))
    with pytest.raises(StateError, match="The threshold is Schedule and the state is of 'Fixed'"):
        scheduled.clipper.load_state_dict(fixed.clipper.state_dict())
    for wrong in (None, [], 7, {"a": 1}):
        with pytest.raises(StateError, match="Fixed keeps no state, found .* Nothing was loaded"):
            fixed.clipper.load_state_dict({**fixed.clipper.state_dict(), "threshold": wrong})
    del saved["labels"]
    with pytest.raises(StateError, match="needed are the keys"):
        state.clipper.load_state_dict(saved)


@pytest.mark.parametrize("rule", list(RULES))
def test_a_rule_that_learns_serves_one_clipper_at_a_time(rule):
    shared = RULES[rule]()
    weight = nn.Parameter(torch.ones(1))
    first = GradientClipper(torch.optim.SGD([weight], lr=0.1), shared)
    learns = type(shared).observe is not Threshold.observe
    if learns:
        with pytest.raises(ArgumentError, match="already learns from the norms of another clipper"):
            GradientClipper(torch.optim.SGD([weight], lr=0.1), shared)
        first.detach()
    GradientClipper(torch.optim.SGD([weight], lr=0.1), shared)


def test_a_rule_is_free_after_a_clipper_that_could_not_be_made():
    rule, weight = Percentile(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(ArgumentError) as kept:
        GradientClipper(optimizer, rule, log=5)
    GradientClipper(optimizer, rule)
    assert kept.value is not None


@pytest.mark.parametrize("rule", list(RULES))
def test_a_rule_with_nothing_to_rule_is_saved_and_loaded(rule):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "max_norm": key} for key in (1.0, None)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    clipper = GradientClipper(optimizer, RULES[rule]())
    clipper.step()
    clipper.load_state_dict(clipper.state_dict())
    late = nn.Parameter(torch.ones(1))
    late.grad = torch.tensor([9.0])
    optimizer.add_param_group({"params": [late]})
    clipper.step()
    assert clipper.last.norm[1].item() == 9.0


def test_what_looks_like_a_threshold_is_told_how_to_be_one():
    class Duck:
        def thresholds(self, norms, context):
            return norms

    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ArgumentError, match="max_norm is a Duck, .*: derive its class from gradc"):
        GradientClipper(torch.optim.SGD([weight], lr=0.1), Duck())


def test_a_rule_is_free_again_when_its_clipper_is_gone():
    rule = Percentile()
    weight = nn.Parameter(torch.ones(1))
    clipper = GradientClipper(torch.optim.SGD([weight], lr=0.1), rule)
    clipper.close()
    del clipper
    GradientClipper(torch.optim.SGD([weight], lr=0.1), rule)


KNOWN = {
    "Pascanu": {"max_norm": 1.0},
    "clipnorm": {"max_norm": Fixed(1.0), "scope": "parameter"},
    "warm-up": {"max_norm": Schedule(lambda step: 1.0 + 1.0 / (step + 1))},
    "AutoClip": {"max_norm": Percentile(10)},
    "bitsandbytes": {"max_norm": Percentile(5, window=100), "scope": "parameter"},
    "ZClip": {"max_norm": ZScore(2.5)},
    "AdaGC": {"max_norm": MovingAverage(1.05), "scope": "parameter"},
    "median": {"max_norm": MedianDeviation(10)},
    "OLMo": {"max_norm": MeanDeviation(6, window=128), "exceed": "skip"},
    "AGC": {"max_norm": RelativeToWeights(0.01), "scope": "unit"},
    "Fira": {"max_norm": GrowthLimit(1.01), "scope": "parameter"},
}
"""Algorithms as their authors have them, one line each."""


@pytest.mark.parametrize("name", list(KNOWN))
def test_known_algorithms_are_one_line(name):
    model, loss = regression()
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


# What the known pairs are for


def regression(seed: int = 0) -> tuple[nn.Module, Callable[[int], torch.Tensor]]:
    """Return a model and its loss for each step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(32, 5, generator=generator)
        noise = torch.randn(32, 1, generator=generator)
        return (model(inputs) - inputs.sum(1, keepdim=True).sin() - noise).square().mean()

    return model, loss


def path(factor: float, max_norm) -> torch.Tensor:
    """Return the parameters after 100 steps of Adam on a loss times a factor."""
    model, loss = regression()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    GradientClipper(optimizer, max_norm)
    for step in range(100):
        optimizer.zero_grad()
        (loss(step) * factor).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_autoclip_does_not_mind_the_scale_of_the_loss():
    torch.testing.assert_close(
        path(1000.0, Percentile(10)), path(1.0, Percentile(10)), rtol=1e-2, atol=1e-3
    )
    with pytest.raises(AssertionError):  # a fixed threshold does
        torch.testing.assert_close(path(1000.0, 1.0), path(1.0, 1.0), rtol=1e-2, atol=1e-3)


def test_autoclip_at_10_clips_about_90_percent_of_stationary_norms():
    weight = nn.Parameter(torch.zeros(50))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    clipper = GradientClipper(optimizer, Percentile(10))
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        weight.grad = torch.randn(50, generator=generator)
        optimizer.step()
    assert 0.87 < clipper.clip_rate() < 0.93


def test_agc_lets_weights_at_zero_learn():
    model, loss = regression()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    before = loss(0).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    GradientClipper(optimizer, RelativeToWeights(0.1), scope="unit")
    for step in range(200):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    assert model[2].weight.norm().item() > 1e-2
    assert loss(0).item() < before - 0.01


def feed(rule: Threshold, norms: list[float], **options) -> GradientClipper:
    """Take a step with each norm."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    clipper = GradientClipper(optimizer, rule, **options)
    for norm in norms:
        weight.grad = torch.tensor([norm])
        optimizer.step()
    return clipper


ORDINARY = [1.0 + 0.1 * math.sin(step) for step in range(200)]


def test_zclip_survives_one_nan():
    norms = [*ORDINARY, math.nan, *ORDINARY]
    clipper = feed(ZScore(), norms)
    calm = feed(ZScore(), [*ORDINARY, *ORDINARY])
    assert torch.equal(clipper.last.thresholds, calm.last.thresholds)
    assert feed(ZScore(), [*norms, 50.0]).last.coefficient.item() < 0.1


@pytest.mark.parametrize("exceed", ["scale", "skip"])
def test_one_spike_blinds_the_mean_and_not_the_median(exceed):
    norms = [*ORDINARY, 100.0, 50.0]
    assert (
        feed(MeanDeviation(), [*ORDINARY, 50.0]).last.norm
        > feed(MeanDeviation(), [*ORDINARY, 50.0]).last.threshold
    )
    blinded = feed(MeanDeviation(), norms, exceed=exceed)
    seeing = feed(MedianDeviation(), norms, exceed=exceed)
    assert blinded.last.norm <= blinded.last.threshold
    assert seeing.last.norm > seeing.last.threshold
    skipping = exceed == "skip"
    assert (blinded.skipped, seeing.skipped) == ((1, 2) if skipping else (0, 0))


@pytest.mark.parametrize("rule", [ZScore, MovingAverage, GrowthLimit])
def test_a_skipped_step_is_learned_from_as_if_it_had_been_scaled(rule):
    norms = [*(norm / 2 for norm in ORDINARY), 100.0, 0.4, 60.0, *ORDINARY]
    skipping = feed(rule(), norms, exceed="skip")
    scaling = feed(rule(), norms)
    assert skipping.skipped >= 1
    assert torch.equal(skipping.last.thresholds, scaling.last.thresholds)


def test_a_rule_of_ones_own_is_not_told_of_skipped_steps_unless_it_asks():
    class Told(Threshold):
        def __init__(self, observes_skipped: bool) -> None:
            self.observes_skipped, self.told = observes_skipped, []

        def thresholds(self, norms, context):
            return torch.full_like(norms, 2.0)

        def observe(self, norms, clipped_norms, context):
            self.told.append((norms.item(), clipped_norms.item()))

    for observes, told in ((False, [(1.0, 1.0)]), (True, [(1.0, 1.0), (5.0, 2.0)])):
        rule = Told(observes)
        feed(rule, [1.0, 5.0], exceed="skip")
        assert rule.told == told


RISING = [*ORDINARY, *(3 * norm for norm in ORDINARY), *(3 * norm for norm in ORDINARY)]


@pytest.mark.parametrize(
    "rule", [Percentile(90, window=50), MeanDeviation(), MedianDeviation(), GrowthLimit()], ids=repr
)
def test_norms_that_rise_for_good_are_followed_while_skipping(rule):
    clipper = feed(rule, RISING, exceed="skip")
    skipped = clipper.skipped
    for norm in RISING[-50:]:
        clipper._given[0].param_groups[0]["params"][0].grad = torch.tensor([norm])
        clipper.step()
    assert clipper.skipped - skipped < 40


@pytest.mark.parametrize("rule", [MedianDeviation, ZScore, MovingAverage, GrowthLimit])
def test_units_that_are_mostly_idle_still_learn(rule):
    table = nn.Parameter(torch.zeros(10, 2))
    optimizer = torch.optim.SGD([table], lr=0.0)
    GradientClipper(optimizer, rule(), scope="unit")
    generator = torch.Generator().manual_seed(0)
    erased = 0
    for step in range(300):
        table.grad = torch.zeros(10, 2)
        busy = torch.randperm(10, generator=generator)[:3]
        table.grad[busy] = torch.rand(3, 2, generator=generator) + 0.5
        optimizer.step()
        erased += int((table.grad[busy].norm(dim=1) == 0).sum()) if step > 100 else 0
    assert erased == 0


@pytest.mark.parametrize("rule", [name for name in RULES if name not in ("Fixed", "Schedule")])
def test_an_idle_parameter_keeps_its_state(rule):
    busy, idle = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([busy, idle], lr=0.0)
    clipper = GradientClipper(optimizer, RULES[rule](), scope="parameter")
    for step in range(12):
        busy.grad, idle.grad = torch.tensor([1.0]), torch.tensor([1.0 + step % 3])
        optimizer.step()

    def of_idle() -> list[torch.Tensor]:
        state = clipper.state_dict()["threshold"]
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        nested = [value for value in state.values() if isinstance(value, dict)]
        tensors += [tensor for part in nested for tensor in part.values()]
        return [tensor[1].clone() for tensor in tensors]

    before = of_idle()
    idle.grad = None
    for step in range(12):
        busy.grad = torch.tensor([5.0 + step])
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(of_idle(), before, strict=True))

"""The rule that skips steps by their norm or their loss, at the steps of an optimizer."""

import math
import statistics

import pytest
import torch

from gradclip import ArgumentError, GradientClipper, MemorySink
from gradclip.thresholds import MeanDeviation
from tests.support.clippers import Training, gradient, optimizer_of, sgd
from tests.support.graphs import GraphTraining, replay_batches

NAN, INF = math.nan, math.inf
GENERATOR = torch.Generator().manual_seed(0)
NORMS = (1 + 0.1 * torch.randn(300, generator=GENERATOR).double()).tolist()
LOSSES = (2 + 0.1 * torch.randn(300, generator=GENERATOR).double()).tolist()
SPIKES = {70: 9.0, 71: 5.0, 150: 30.0, 290: 4.0}
NORM_SPIKES = {100: 9.0, 150: 9.0, 250: 5.0}


def by_olmo(norms, losses):
    """Return which steps OLMo-core's SkipStepOptimizer skips, written from its source."""
    skipped = []
    for step in range(len(losses)):
        if step + 1 < 64:
            skipped.append(False)
            continue
        exceeds = []
        for values in (losses, norms):
            before = values[max(step - 128, 0) : step]
            deviation, mean = statistics.stdev(before), statistics.fmean(before)
            exceeds.append(not values[step] - mean <= 6.0 * deviation)
        skipped.append(any(exceeds))
    return skipped


def test_the_rule_skips_what_olmo_core_skips(route):
    """With the norms of its steps and with their losses."""
    norms = [NORM_SPIKES.get(step, norm) for step, norm in enumerate(NORMS)]
    losses = [SPIKES.get(step, loss) for step, loss in enumerate(LOSSES)]
    run, sink = Training(), MemorySink()
    rule = MeanDeviation(6, loss=True)
    with GradientClipper(run.optimizer, rule, exceed="skip", log=sink) as clipper:
        for norm, loss in zip(norms, losses, strict=True):
            clipper.loss = torch.tensor(loss, dtype=torch.float64)
            run.take(norm)
    skipped = by_olmo(norms, losses)
    assert [step.skipped for step in sink.steps] == skipped
    # One spike hides the next: neither the loss of step 71 nor the norm of step 250 is skipped.
    assert [step for step, skip in enumerate(skipped) if skip] == [70, 100, 150, 290]


@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("loss", [100.0, NAN, INF])
def test_a_spike_of_the_loss_skips_the_whole_step(loss, scope, route):
    """Parameters, gradients and the state stay as they are, and the next step is taken."""
    optimizer = sgd([3.0, 4.0], [1.0], momentum=0.9)
    rule = MeanDeviation(6, 8, loss=True)
    clipper = GradientClipper(optimizer, rule, scope=scope, exceed="skip")
    for step in range(8):
        clipper.loss = 2.0 + step / 10
        optimizer.step()
    first = optimizer.param_groups[0]["params"][0]
    before = first.detach().clone()
    clipper.loss = loss
    optimizer.step()
    assert torch.equal(first, before)
    assert gradient(optimizer) == [3.0, 4.0]
    assert bool(clipper.last.skipped)
    clipper.loss = 2.5
    optimizer.step()
    assert not torch.equal(first, before)
    assert clipper.skipped == 1


def test_scaling_by_a_loss_is_refused():
    """It would step with gradients of 0; observing writes nothing."""
    needed = r"loss=True\) answers a spike with a threshold of 0, and exceed='scale' would set the"
    with pytest.raises(ArgumentError, match=f"{needed} .*: give exceed='skip', which skips"):
        GradientClipper(optimizer_of(), MeanDeviation(6, loss=True))
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, MeanDeviation(6, loss=True), exceed="observe")
    clipper.loss = NAN
    optimizer.step()
    assert (clipper.last.threshold.item(), gradient(optimizer)) == (0.0, [3.0, 4.0])


def test_a_step_without_a_loss_is_refused():
    optimizer = optimizer_of()
    GradientClipper(optimizer, MeanDeviation(6, loss=True), exceed="skip")
    needed = r"loss=True\) decides by the loss of the step, and there is none: assign clipper.loss"
    with pytest.raises(ArgumentError, match=needed):
        optimizer.step()
    optimizer.step(lambda: 2.0)
    assert gradient(optimizer) == [3.0, 4.0]


def test_a_step_that_a_scaler_skips_teaches_no_loss(like_a_device):
    """Though the device alone knows of it, as under a fused optimizer."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    rule = MeanDeviation(6, 8, loss=True)
    clipper = GradientClipper(optimizer, rule, exceed="skip")
    for factor in (1.0, INF, 1.0):
        optimizer.zero_grad()
        loss = weight.square().sum()
        scaler.scale(loss * factor).backward()
        clipper.loss = loss
        scaler.step(optimizer)
        scaler.update()
    state = clipper.state_dict()["threshold"]
    assert (int(state["counts"]), int(state["loss_counts"])) == (2, 2)


def test_a_resumed_run_skips_the_same_steps():
    """The losses before are part of the state."""
    losses = [SPIKES.get(step, loss) for step, loss in enumerate(LOSSES[:160])]

    def skips_from(first, state=None):
        run, sink = Training(), MemorySink()
        rule = MeanDeviation(6, loss=True)
        with GradientClipper(run.optimizer, rule, exceed="skip", log=sink) as clipper:
            if state is not None:
                clipper.load_state_dict(state)
            for step in range(first, 160):
                if step == 140 and state is None:
                    state = clipper.state_dict()
                clipper.loss = losses[step]
                run.take(NORMS[step])
        return [step.step for step in sink.steps if step.skipped], state

    whole, state = skips_from(0)
    resumed, _ = skips_from(140, state)
    assert whole == [70, 150]
    assert resumed == [150]


def test_replays_of_a_graph_skip_by_their_losses(tape, captured):
    """As eager steps do; the window is written in place."""
    given = replay_batches(12)
    given[7] *= 30

    def training():
        rule = MeanDeviation(3, 4, loss=True)
        made = GraphTraining(rule, exceed="skip")
        made.gives_loss = True
        return made

    eager = training().eager(given)
    replayed = training().replayed(given, tape, captured)
    assert replayed.field("skipped") == eager.field("skipped")
    assert True in replayed.field("skipped")[3:]
    states = [made.clipper.state_dict()["threshold"] for made in (eager, replayed)]
    for one, other in zip(*(state.values() for state in states), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other)

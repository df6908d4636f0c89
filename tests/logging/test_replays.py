"""Steps that a CUDA graph replays, with a tape in the place of the graph."""

import math

import pytest
import torch

import gradclip
from gradclip import AttachError
from tests.support.graphs import WARM_UP, GraphTraining, replay_batches
from tests.support.reference import bits_in
from tests.support.rules import RULES

CAPTURABLE = [name for name in RULES if name != "Schedule"]  # which asks at each step


@pytest.fixture
def six(tape, captured):
    """Return a training after six steps, of which the last two are replays."""

    def train(max_norm=0.5, **options):
        return GraphTraining(max_norm, **options).replayed(replay_batches(6), tape, captured)

    return train


@pytest.mark.parametrize("scope", ["global", "parameter", "unit"])
@pytest.mark.parametrize("rule", CAPTURABLE, indirect=True)
def test_replayed_step_clips_learns_and_logs_as_a_step_does(rule, scope, tape, captured):
    one = GraphTraining(rule(), scope=scope).eager(replay_batches(12))
    other = GraphTraining(rule(), scope=scope).replayed(replay_batches(12), tape, captured)
    assert other.clipper.steps == 12
    rows = []
    for training in (one, other):
        training.clipper.flush()  # of a graph nothing is known of parameters
        steps = training.sink.steps
        rows.append([step._replace(wall_time=0, incident=None) for step in steps])
    assert rows[0] == rows[1]
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert bits_in(other.clipper.state_dict()) == bits_in(one.clipper.state_dict())


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_norms_that_are_not_finite(policy, tape, captured):
    given, skips = replay_batches(8), policy == "skip"
    given[5][0, 0] = math.nan
    training = GraphTraining(0.5, nonfinite=policy).replayed(given, tape, captured)
    assert training.clipper.skipped == skips
    assert training.field("nonfinite") == [n == 5 for n in range(8)]
    assert training.field("skipped") == [skips and n == 5 for n in range(8)]
    assert not any(parameter.isnan().any() for parameter in training.parameters())


def test_step_that_exceeds_is_skipped_and_too_many_raise_at_the_next_flush(six, tape):
    training = six(1e6, exceed="skip", skip_limit=2)
    before = training.parameters()
    training.batch.copy_(replay_batches(1)[0] * 1e6)
    tape.replay()
    assert all(map(torch.equal, before, training.parameters()))
    assert (training.clipper.skipped, training.clipper.steps) == (1, 7)
    training.clipper.flush()
    tape.replay()
    match = "2 steps in a row were skipped, up to step 7"
    with pytest.raises(gradclip.SkipLimitError, match=match):
        training.clipper.flush()


def test_steps_before_between_and_after_replays(six, tape):
    """They are numbered in their order, the newest is the last, and closing writes the rest."""
    training = six()
    assert training.clipper.last.norm.item() == training.field("norm")[-1]
    training.step()
    tape.replay()
    training.clipper.flush()
    tape.replay()
    training.step()
    tape.replay()
    training.clipper.close()
    assert [step.step for step in training.sink.steps] == [*range(11)]
    times = [step.wall_time for step in training.sink.steps]
    assert times == sorted(times)


def test_state_that_is_loaded_goes_on_from_its_own_step(six, tape):
    training = six()
    state = training.clipper.state_dict()
    assert state["steps"] == 6
    tape.replay()
    training.clipper.load_state_dict({**state, "steps": 100})
    assert training.clipper.steps == 100
    tape.replay()
    assert training.clipper.steps == 101


def test_overwritten_records_are_counted(monkeypatch, tape, captured):
    monkeypatch.setattr("gradclip.records.replays.CAPACITY", 4)
    training = GraphTraining(0.5).replayed(replay_batches(WARM_UP + 10), tape, captured)
    with pytest.warns(RuntimeWarning, match="6 records .* flush\\(\\) at least every 4 replays"):
        assert training.field("step") == [0, 1, 2, 9, 10, 11, 12]
    assert training.clipper.steps == 13


class Halved(gradclip.Threshold):
    def thresholds(self, norms, context):
        return norms * 0.5


class CapturableHalved(Halved):
    capturable = True


@pytest.mark.parametrize(
    ("max_norm", "options", "steps", "reason"),
    [
        (0.5, {"nonfinite": "raise"}, 2, "nonfinite='raise'"),
        (lambda step: 0.5, {}, 2, "at every step"),
        (0.5, {"exceed": "skip", "fused": False}, 2, "AdamW cannot"),
        (Halved(), {}, 2, "'capturable = True'"),
        (0.5, {}, 0, "take a few steps on a side stream first"),
    ],
)
def test_steps_that_are_not_captured(max_norm, options, steps, reason, tape, captured):
    """Nothing changes."""
    training = GraphTraining(max_norm, **options).eager(replay_batches(steps))
    before = training.parameters()
    with captured(), tape, pytest.raises(AttachError) as error:
        training.step()
    assert reason in str(error.value)
    assert all(map(torch.equal, before, training.parameters()))


def test_step_of_other_parameters_than_before_is_not_captured(captured):
    training = GraphTraining(0.5, scope="parameter").eager(replay_batches(3))
    training.model[0].weight.requires_grad_(False)
    with captured(), pytest.raises(AttachError, match="Other parameters had gradients"):
        training.step()


def test_own_threshold_is_captured_if_it_says_it_can_be(six):
    assert six(CapturableHalved()).field("coefficient") == [0.5] * 6

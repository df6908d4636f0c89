"""Steps that a CUDA graph replays, with a tape in the place of the graph."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

import gradclip
from gradclip import AttachError, GradientClipper, thresholds
from gradclip.records import replays
from gradclip.records.record import ClipRecord
from tests.support.rules import RULES

WARM_UP = 3
CAPTURABLE = [name for name, make in RULES.items() if make().capturable]


class Training:
    """A small network, whose batches are copied into one tensor, as a graph needs it."""

    def __init__(self, max_norm, *, optimizer=torch.optim.AdamW, fused=True, **options) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.optimizer = optimizer(self.model.parameters(), lr=0.1, fused=fused)
        self.batch = torch.zeros(5, 4)
        self.sink = gradclip.MemorySink()
        self.clipper = GradientClipper(self.optimizer, max_norm, log=self.sink, **options)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()

    def load(self, batch: torch.Tensor) -> None:
        self.batch.copy_(batch)

    def parameters(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=generator) * (1 + index % 4) for index in range(count)]


def replayed(training: Training, given: list[torch.Tensor], tape, captured) -> None:
    """Take some steps, capture one, which the tape runs at once, and replay it."""
    for batch in given[:WARM_UP]:
        training.load(batch)
        training.step()
    training.load(given[WARM_UP])
    with captured(), tape:
        training.step()
    for batch in given[WARM_UP + 1 :]:
        training.load(batch)
        tape.replay()


def eager(training: Training, given: list[torch.Tensor]) -> None:
    for batch in given:
        training.load(batch)
        training.step()


@pytest.mark.parametrize("scope", ["global", "parameter", "unit"])
@pytest.mark.parametrize("rule", CAPTURABLE, indirect=True)
def test_a_replayed_step_clips_learns_and_logs_as_a_step_does(rule, scope, tape, captured):
    given = batches(12)
    one, other = (Training(rule(), scope=scope) for _ in range(2))
    eager(one, given)
    replayed(other, given, tape, captured)
    assert other.clipper.steps == 12
    for training in (one, other):
        training.clipper.flush()
    told = [  # of a graph nothing is known of parameters
        [step._replace(wall_time=0, incident=None) for step in training.sink.steps]
        for training in (one, other)
    ]
    assert told[0] == told[1]
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    assert one.clipper.clip_rate() == other.clipper.clip_rate()
    state, needed = other.clipper.state_dict(), one.clipper.state_dict()
    learned, needed_learned = state.pop("threshold"), needed.pop("threshold")
    assert state == needed
    assert learned.keys() == needed_learned.keys()
    for name, value in needed_learned.items():
        assert torch.equal(learned[name], value) if name != "rule" else learned[name] == value


@pytest.mark.parametrize("options", [{"nonfinite": "skip"}, {"nonfinite": "zero"}, {}])
def test_a_replayed_step_meets_the_policy_of_norms_that_are_not_finite(options, tape, captured):
    training = Training(0.5, **options)
    given = batches(8)
    given[5][0, 0] = math.nan
    replayed(training, given, tape, captured)
    skipped = options.get("nonfinite") == "skip"
    assert training.clipper.skipped == skipped
    assert [step.nonfinite for step in training.sink.steps] == [n == 5 for n in range(8)]
    assert [step.skipped for step in training.sink.steps] == [skipped and n == 5 for n in range(8)]
    assert not any(parameter.isnan().any() for parameter in training.parameters())


def test_a_replayed_step_that_exceeds_is_skipped_and_changes_nothing(tape, captured):
    training = Training(1e6, exceed="skip")
    replayed(training, batches(6), tape, captured)
    before = training.parameters()
    training.load(batches(1)[0] * 1e6)
    tape.replay()
    assert all(map(torch.equal, before, training.parameters()))
    assert (training.clipper.skipped, training.clipper.steps) == (1, 7)


def test_too_many_skips_in_replays_raise_at_the_next_flush(tape, captured):
    training = Training(1e6, exceed="skip", skip_limit=2)
    replayed(training, batches(6), tape, captured)
    training.load(batches(1)[0] * 1e6)
    tape.replay()
    training.clipper.flush()
    tape.replay()
    with pytest.raises(
        gradclip.SkipLimitError, match="2 steps in a row were skipped, up to step 7"
    ):
        training.clipper.flush()


def test_steps_before_between_and_after_replays_are_numbered_in_their_order(tape, captured):
    training = Training(0.5)
    replayed(training, batches(6), tape, captured)
    training.step()
    tape.replay()
    training.clipper.flush()
    tape.replay()
    training.step()
    training.clipper.close()
    assert [step.step for step in training.sink.steps] == [*range(10)]
    times = [step.wall_time for step in training.sink.steps]
    assert times == sorted(times)


def test_closing_writes_what_was_replayed(tape, captured):
    training = Training(0.5)
    replayed(training, batches(6), tape, captured)
    training.clipper.close()
    assert [step.step for step in training.sink.steps] == [*range(6)]


def test_the_newest_replay_is_the_last_record(tape, captured):
    training = Training(0.5)
    replayed(training, batches(6), tape, captured)
    norm = training.clipper.last.norm.item()
    training.clipper.flush()
    assert norm == training.sink.steps[-1].norm


def test_a_state_that_is_loaded_goes_on_from_its_own_step(tape, captured):
    training = Training(0.5)
    replayed(training, batches(6), tape, captured)
    state = training.clipper.state_dict()
    assert state["steps"] == 6
    tape.replay()
    training.clipper.load_state_dict({**state, "steps": 100})
    assert training.clipper.steps == 100
    tape.replay()
    assert training.clipper.steps == 101


def test_records_that_were_overwritten_are_counted(monkeypatch, tape, captured):
    monkeypatch.setattr(replays, "CAPACITY", 4)
    training = Training(0.5)
    replayed(training, batches(WARM_UP + 10), tape, captured)
    with pytest.warns(RuntimeWarning, match="6 records .* flush\\(\\) at least every 4 replays"):
        training.clipper.flush()
    assert training.clipper.steps == 13
    assert [step.step for step in training.sink.steps] == [0, 1, 2, 9, 10, 11, 12]


def test_no_more_memory_is_taken_for_many_norms():
    norms = torch.zeros(50_000)
    ring = replays.ReplayedRecords(norms)
    assert ring.capacity == replays.MOST_NUMBERS // 250_000
    assert ring._rows.numel() <= replays.MOST_NUMBERS


def test_the_time_since_the_last_flush_is_shared_by_the_steps(monkeypatch):
    monkeypatch.setattr(time, "time", iter([100.0, 200.0, 240.0]).__next__)
    norms = torch.ones(1, dtype=torch.float64)
    record = ClipRecord(0, 0.0, norms, norms, norms)
    ring = replays.ReplayedRecords(norms)
    for _ in range(4):
        ring.write(record)
    assert [taken.wall_time for taken in ring.take(0)[1]] == [210.0, 220.0, 230.0, 240.0]


# What a graph reads and writes stays


def test_what_a_graph_uses_outlives_the_clipper_and_later_labels(tape, captured, kept):
    training = Training(thresholds.Percentile(50, window=5), scope="parameter")
    replayed(training, batches(5), tape, captured)
    ring = training.clipper._recorder._replayed
    used = [ring._rows, ring._written, *training.clipper._threshold.state.values()]
    addresses = [tensor.data_ptr() for tensor in used]
    new = nn.Parameter(torch.zeros(3))
    training.optimizer.add_param_group({"params": [new], "max_norm": 1.0})
    training.step()
    training.clipper.close()
    del training, ring, used
    alive = [leaf.data_ptr() for leaf in leaves(kept.values()) if isinstance(leaf, torch.Tensor)]
    assert set(addresses) <= set(alive)
    tape.replay()


def leaves(things):
    """Yield what is held, and what these hold in turn."""
    for thing in things:
        yield thing
        if isinstance(thing, dict):
            yield from leaves(thing.values())
        elif isinstance(thing, replays.ReplayedRecords):
            yield from leaves(vars(thing).values())


@pytest.mark.parametrize("scope", ["parameter", "unit", lambda name, parameter: parameter.dim()])
def test_where_norms_are_is_kept_for_a_graph(scope, tape, captured, kept):
    training = Training(0.5, scope=scope)
    eager(training, batches(3))
    with captured(), tape:
        training.step()
    tables = [thing.dtype for thing in kept.values() if isinstance(thing, torch.Tensor)]
    assert torch.bool in tables  # which norms have a gradient behind them
    assert (torch.int64 in tables) == (scope != "parameter")  # which sums are whose


def test_other_parameters_than_before_cannot_be_captured(tape, captured):
    training = Training(0.5, scope="parameter")
    eager(training, batches(3))
    training.model[0].weight.requires_grad_(False)
    with captured(), pytest.raises(AttachError, match="Other parameters had gradients"):
        training.step()


def test_a_step_outside_the_graph_reads_no_more_than_how_many_were_replayed(tape, captured):
    training = Training(0.5)
    replayed(training, batches(5), tape, captured)
    training.step()
    ring = training.clipper._recorder._replayed
    rows, ring._rows = ring._rows, None
    assert training.clipper._recorder.steps == 6
    ring._rows = rows
    tape.replay()
    assert training.clipper._recorder.steps == 7


# What cannot be captured


def refusal(training: Training, tape, captured) -> str:
    before = training.parameters()
    with captured(), tape, pytest.raises(AttachError) as error:
        training.step()
    assert all(map(torch.equal, before, training.parameters()))
    return str(error.value)


@pytest.mark.parametrize(
    ("max_norm", "options", "reason"),
    [
        (0.5, {"nonfinite": "raise"}, "nonfinite='raise' reads every norm"),
        (lambda step: 0.5, {}, "is called at every step"),
        (0.5, {"exceed": "skip", "fused": False}, "AdamW cannot skip a step on the device"),
    ],
)
def test_what_needs_the_host_at_every_step_is_not_captured(
    max_norm, options, reason, tape, captured
):
    training = Training(max_norm, **options)
    eager(training, batches(2))
    assert reason in refusal(training, tape, captured)


def test_a_threshold_of_ones_own_is_captured_only_if_it_says_it_can_be(tape, captured):
    class Own(gradclip.Threshold):
        def thresholds(self, norms, context):
            return norms * 0.5

    training = Training(Own())
    eager(training, batches(2))
    assert "'capturable = True'" in refusal(training, tape, captured)
    Own.capturable = True
    replayed(training, batches(5), tape, captured)
    training.clipper.flush()
    assert [step.coefficient for step in training.sink.steps] == [0.5] * 7


def test_a_step_is_not_captured_before_any_was_taken(tape, captured):
    assert "take a few steps on a side stream first" in refusal(Training(0.5), tape, captured)

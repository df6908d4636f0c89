"""The memory of replayed records: its size, its clock, and how long it lives."""

import math
import time

import pytest
import torch
from torch import nn

from gradclip import AttachError, GradientClipper, MemorySink, thresholds
from gradclip.records import replays
from gradclip.records.record import ClipRecord
from tests.support.device import take_the_device_route
from tests.support.graphs import WARM_UP, GraphTraining, replay_batches
from tests.support.reference import parameter_with


@pytest.mark.parametrize("count", [1, 10, 11, 300, 9_999, 50_000])
def test_as_many_records_are_kept_as_the_readme_says(count):
    ring = replays.ReplayedRecords(torch.zeros(count))
    assert ring.capacity >= min(10_000, 100_000 // count)
    assert ring._rows.numel() <= replays.MOST_NUMBERS


def test_time_since_the_last_flush_is_shared_by_the_steps(monkeypatch):
    monkeypatch.setattr(time, "time", iter([100.0, 200.0, 240.0]).__next__)
    norms = torch.ones(1, dtype=torch.float64)
    ring = replays.ReplayedRecords(norms)
    for _ in range(4):
        ring.write(ClipRecord(0, 0.0, norms, norms, norms))
    assert [record.wall_time for record in ring.take(0)[1]] == [210.0, 220.0, 230.0, 240.0]


def leaves(things):
    """Yield these things and everything that they hold."""
    for thing in things:
        yield thing
        if isinstance(thing, dict):
            yield from leaves(thing.values())
        elif isinstance(thing, replays.ReplayedRecords):
            yield from leaves(vars(thing).values())


def test_memory_of_a_graph_outlives_the_clipper_and_later_labels(tape, captured, kept):
    rule = thresholds.Percentile(50, window=5)
    training = GraphTraining(rule, scope="parameter").replayed(replay_batches(5), tape, captured)
    ring = training.clipper._recorder._replayed
    used = [ring._rows, ring._written, *training.clipper._threshold.state.values()]
    addresses = {tensor.data_ptr() for tensor in used}
    new = nn.Parameter(torch.zeros(3))
    training.optimizer.add_param_group({"params": [new], "max_norm": 1.0})
    training.step()
    training.clipper.close()
    del training, ring, used
    tensors = [leaf for leaf in leaves(kept.values()) if isinstance(leaf, torch.Tensor)]
    assert addresses <= {tensor.data_ptr() for tensor in tensors}
    tape.replay()


@pytest.mark.parametrize("scope", ["parameter", "unit", lambda name, parameter: parameter.dim()])
def test_norm_indices_are_kept_for_a_graph(scope, tape, captured, kept):
    training = GraphTraining(0.5, scope=scope).eager(replay_batches(WARM_UP))
    with captured(), tape:
        training.step()
    tables = [thing.dtype for thing in kept.values() if isinstance(thing, torch.Tensor)]
    assert torch.bool in tables  # which norms have a gradient behind them
    assert (torch.int64 in tables) == (scope != "parameter")  # which sums belong to which norm


def test_weights_that_no_replay_could_measure_are_refused(captured, monkeypatch):
    take_the_device_route(monkeypatch)
    parameter = parameter_with(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with GradientClipper(optimizer, 1.0, log=MemorySink(weights_every=9)):
        optimizer.step()
        with captured(), pytest.raises(AttachError, match="have weights_every=0"):
            optimizer.step()


def test_an_incident_of_a_graph_names_no_parameter(tape, captured):
    given = replay_batches(5)
    for batch in given[2::2]:
        batch.fill_(math.nan)
    training = GraphTraining(1.0).replayed(given, tape, captured)
    eager, replayed = filter(None, training.field("incident"))
    assert "parameter 0" in eager
    assert "nan at step 4" in replayed
    assert "parameter" not in replayed


def test_step_outside_the_graph_reads_only_the_number_of_replays(tape, captured):
    training = GraphTraining(0.5).replayed(replay_batches(5), tape, captured)
    training.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.clipper._recorder._replayed, "_rows", None)
        assert training.clipper.steps == 6
    tape.replay()
    assert training.clipper.steps == 7

"""The loss in logs: every sink, the sentences about losses that stand out, and late copies."""

import math
import statistics

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from gradclip import (
    CallableSink,
    GradientClipper,
    JsonlSink,
    MemorySink,
    NonFiniteGradientError,
)
from tests.support.clippers import Training
from tests.support.curves import TAGS, lines_in, log_losses, values_in

LOSS = "grad_norm/loss"


def test_every_sink_has_the_losses(tmp_path):
    """Where there is none, there is no number; JSON has null for one that is not finite."""
    memory, logged = MemorySink(), {}
    sink = CallableSink(lambda numbers, step: logged.update({step: numbers.get(LOSS)}))
    path = tmp_path / "run.jsonl"
    log_losses([tmp_path / "board", JsonlSink(path), memory, sink], 2.5, None, math.nan, 1.5)
    needed = pytest.approx([2.5, None, math.nan, 1.5], nan_ok=True)
    assert [step.loss for step in memory.steps] == needed
    assert [*logged.values()] == needed
    assert memory.to_pandas()["loss"].tolist()[0] == 2.5
    assert [line.get("loss", "absent") for line in lines_in(path)] == [2.5, "absent", None, 1.5]
    curves = values_in(tmp_path / "board")
    assert curves.keys() == {*TAGS, LOSS}
    assert curves[LOSS] == pytest.approx([2.5, math.nan, 1.5], nan_ok=True)


def charted(directory):
    """Return the curves of each chart that the last layout in a directory has."""
    reader = EventAccumulator(str(directory)).Reload()
    [content] = reader.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    categories = layout_pb2.Layout.FromString(content).category
    return [tag for each in categories for chart in each.chart for tag in chart.multiline.tag]


@pytest.mark.parametrize("losses", [(2.5, 2.0), (None, None)])
def test_a_chart_shows_the_loss_where_there_is_one(tmp_path, losses):
    log_losses(tmp_path, *losses)
    assert ("^grad_norm/(loss)$" in charted(tmp_path)) == (losses[0] is not None)


def incidents(*losses, **options):
    """Return the sentences by the index of their step."""
    log_losses(sink := MemorySink(every=1000), *losses, **options)
    return {step.step: step.incident for step in sink.steps if step.incident}


CALM = [2.0 + step % 5 / 10 for step in range(128)]


@pytest.mark.parametrize("before", [63, 64, 128, 200])
def test_a_loss_that_spikes(before):
    """From loss number 64 on, above the mean of the last 128 losses and six deviations."""
    losses = [9.0, *CALM, *CALM][-before:]
    window = losses[-128:]
    mean, deviation = statistics.fmean(window), statistics.stdev(window)
    line = mean + 6 * deviation
    assert incidents(*losses, line - 1e-9, line + 1.0) == {
        before + 1: (
            f"The loss went from {line:.4g} to {line + 1:.4g} at step {before + 1}, above "
            f"{statistics.fmean(w := [*losses, line - 1e-9][-128:]) + 6 * statistics.stdev(w):.4g}"
            f": the mean of the last {len(w)} losses, {statistics.fmean(w):.4g}, plus 6 standard "
            "deviations."
        )
    }


def test_too_few_losses_have_no_spike():
    assert incidents(*CALM[:62], 100.0) == {}
    assert [*incidents(*CALM[:63], 100.0)] == [63]


def test_losses_that_hardly_differ_have_no_spike():
    """Their deviation is a rounding error."""
    assert incidents(*[2.0] * 100, 2.0 + 1e-9, -3.0) == {}
    assert [*incidents(*[-2.0] * 100, -1.0)] == [100]


def test_a_loss_that_is_not_finite():
    """It is named, with the last that was finite, and is not in the window."""
    said = "The loss was {} at step {}. The last finite loss before: {}."
    found = incidents(math.nan, 2.5, math.inf, None, math.nan, *CALM[:61], 100.0)
    assert found == {
        0: said.format("nan", 0, "not known"),
        2: said.format("inf", 2, 2.5),
        4: said.format("nan", 4, 2.5),
    }


def test_norm_and_loss_of_one_step():
    """A sentence about each; the step of a norm alone says nothing of its loss."""
    norms = [1.0 + step % 7 / 10 for step in range(100)]
    found = incidents(*CALM[:99], 100.0, norms=[*norms[:98], 500.0, 900.0])
    assert [*found] == [98, 99]
    assert "The loss" not in found[98]
    assert found[99].startswith("The norm was 900 at step 99, above ")
    assert ". The loss went from 2.3 to 100 at step 99, above " in found[99]


def test_another_part_of_the_training_has_no_spike():
    """After the index was set, losses are not compared with those before."""
    run, sink = Training(), MemorySink()
    with GradientClipper(run.optimizer, None, log=sink) as clipper:
        for loss in [*CALM, 100.0]:
            if loss == 100.0:
                clipper.steps = 1000
            clipper.loss = loss
            run.take(1.0)
    assert [step.incident for step in sink.steps] == [None] * 129


def test_the_error_for_a_norm_names_the_loss():
    with pytest.raises(NonFiniteGradientError, match=r"parameter 0 .*\. The loss was 2\.5\. The n"):
        log_losses(None, 2.5, norms=[math.nan], nonfinite="raise")


def test_losses_on_a_device_are_read_with_the_batch(tape):
    """Steps with and without a loss, and a number of the host, share a batch."""
    run, sink = Training(), MemorySink()
    with GradientClipper(run.optimizer, None, log=sink) as clipper:
        with tape:
            for loss in (torch.tensor(2.5), None, 1.5, torch.tensor(3.5)):
                clipper.loss = loss
                run.take(1.0)
        clipper.flush()
    assert [step.loss for step in sink.steps] == [2.5, None, 1.5, 3.5]


def test_the_chart_of_a_second_clipper(tmp_path):
    """The last layout of a directory has the charts of both."""
    with GradientClipper((run := Training()).optimizer, 1.0, log=tmp_path):
        run.take(1.0)
        with GradientClipper((other := Training()).optimizer, 1.0, log=tmp_path) as clipper:
            clipper.loss = 2.5
            other.take(1.0)
            run.take(1.0)
    assert "^grad_norm_2/(loss)$" in charted(tmp_path)

"""A resumed run continues its curves, and those of others stay as they are."""

import gc
import math
import time

import pytest
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper, TensorBoardSink
from tests.support.curves import NAMES, curves_in, log_run, steps_in, values_in

PRE = "grad_norm/pre"
LOADED_AT = "gradclip.records.sinks.tensorboard._LOADED_AT"


@pytest.fixture(autouse=True)
def numbers_of_three_digits(monkeypatch):
    """Number the writers from 100: files of one second sort by this number, as a string."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))


@pytest.mark.parametrize(
    "kind", ["directory", "same clipper", "not closed", "same writer", "other writer"]
)
def test_run_continues_in_the_same_process(tmp_path, training, kind):
    count = {"same writer": 1, "other writer": 2}.get(kind, 0)
    writers = [SummaryWriter(str(tmp_path)) for _ in range(count)]
    run = training()
    clipper = GradientClipper(run.optimizer, 2.0, log=writers[0] if writers else tmp_path)
    run.take(*[1.0] * 50)
    state = clipper.state_dict()
    run.take(*[1.0] * 20)
    if kind != "same clipper":
        if kind != "not closed":
            clipper.close()
        del clipper
        run = training()  # the old optimizer goes, and its clipper with it
        gc.collect()
        clipper = GradientClipper(run.optimizer, 2.0, log=writers[-1] if writers else tmp_path)
    clipper.load_state_dict(state)
    run.take(*[1.0] * 40)
    for closing in (clipper, *writers):
        closing.close()
    curves = curves_in(tmp_path)
    for name in NAMES:
        assert [point.step for point in curves[f"grad_norm/{name}"]] == [*range(90)], name


@pytest.mark.parametrize("kind", ["writer", "directory"])
def test_users_points_after_a_restart(tmp_path, training, monkeypatch, kind):
    """They stay as they are, where they go back in a file with our marks or in one before it.

    They count otherwise: TensorBoard's mark for a restart would drop them.
    """
    for life, first in enumerate((0, 5)):
        monkeypatch.setattr(LOADED_AT, int(time.time()) + 10 * life)
        run = training()
        with (
            SummaryWriter(str(tmp_path)) as writer,
            GradientClipper(
                run.optimizer, 2.0, log=writer if kind == "writer" else tmp_path
            ) as clipper,
        ):
            writer.add_scalar("before", first, 100)
            clipper.steps = first
            run.take(*[1.0] * 10)
            clipper.flush()
            for step in (20, 10):
                writer.add_scalar("after", first, step)
    steps = steps_in(tmp_path)
    assert steps[PRE] == [*range(15)]
    assert (steps["before"], steps["after"]) == ([100, 100], [20, 10, 20, 10])


def test_two_clippers_resume_at_their_own_steps(tmp_path, training):
    """As the two of a GAN, of which one steps more often."""
    for first, last in ((0, 7), (5, 9)):
        runs = training(), training()
        clippers = [GradientClipper(run.optimizer, 2.0, log=tmp_path) for run in runs]
        for run, clipper, factor in zip(runs, clippers, (1, 5), strict=True):
            clipper.steps = first * factor
            run.take(*[1.0] * (last - first) * factor)
            clipper.flush()
        for clipper in clippers:
            clipper.close()
    steps = steps_in(tmp_path)
    assert (steps[PRE], steps["grad_norm_2/pre"]) == ([*range(9)], [*range(45)])


def test_steps_that_are_set(tmp_path, training):
    """Set back, be it by one, they replace what follows; set forward they leave a gap."""
    log_run(tmp_path, *[7.0] * 30)  # a run that begins again replaces all of these
    run = training()
    with GradientClipper(run.optimizer, 2.0, log=tmp_path) as clipper:
        run.take(1.0, 1.0, 1.0, 1.0)
        clipper.steps = 3
        run.take(3.0)
        clipper.steps = 10
        run.take(5.0)
    assert steps_in(tmp_path)[PRE] == [0, 1, 2, 3, 10]
    assert values_in(tmp_path)[PRE] == [1.0, 1.0, 1.0, 3.0, 5.0]


def test_first_run_writes_no_marks_of_a_restart(tmp_path, training, caplog):
    """TensorBoard says something in its log about each of them."""
    runs, writer = (training(), training()), SummaryWriter(str(tmp_path))
    clippers = [GradientClipper(run.optimizer, 2.0, log=tmp_path) for run in runs]
    for run in runs:
        run.take(1.0, 1.0)
    for closing in (*clippers, writer):
        closing.close()
    curves_in(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("every", [1, 5])
def test_files_of_a_machine_whose_clock_is_ahead(tmp_path, monkeypatch, every):
    """A run that continues on another machine writes a file that still sorts last."""
    for first, last, ahead in ((0, 38, 10_000), (23, 45, 0)):
        monkeypatch.setattr(LOADED_AT, 1_700_000_000 + ahead)
        sink = TensorBoardSink(tmp_path, every=every, flush_every=3)
        log_run(sink, *[1.0] * (last - first), first=first)
    assert steps_in(tmp_path)[PRE] == [*range(0, 45, every)]


def test_parameter_norms_of_a_run_that_begins_again(tmp_path):
    """They replace those of the earlier run from the first step on that has some again."""
    log_run(TensorBoardSink(tmp_path, per_parameter="all"), *[1.0] * 20, math.nan)
    sink = TensorBoardSink(tmp_path, per_parameter="all", per_parameter_every=3)
    log_run(sink, *[2.0] * 5, first=2)
    curves = curves_in(tmp_path)
    points = curves["parameter_norm/group 0, parameter 0"]
    assert [(p.step, p.value) for p in points] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (6, 2.0)]
    assert [point.step for point in curves[PRE]] == [*range(7)]

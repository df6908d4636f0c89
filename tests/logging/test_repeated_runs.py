"""A cell or a script that is run again: its curves replace those of the time before."""

import gc

import pytest
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper, JsonlSink, TensorBoardSink
from tests.support.curves import SECOND_TAGS, TAGS, runs_in, values_in

PRE = "grad_norm/pre"


class Place:
    """A log that several clippers are given: a directory, a writer, or a file."""

    def __init__(self, kind: str, path) -> None:
        self.kind, self.path = kind, path
        self.writer = SummaryWriter(str(path)) if kind == "writer" else None

    def log(self):
        if self.kind == "file":
            return JsonlSink(self.path / "a.jsonl")
        if self.kind == "new writers":
            return SummaryWriter(str(self.path))
        return self.writer or self.path

    def norms(self) -> list[float]:
        """Return the norms of the only run that is there."""
        if self.kind != "file":
            assert values_in(self.path).keys() == TAGS
        [run] = runs_in(self.path)
        return run.norms.tolist()


@pytest.fixture(params=["directory", "writer", "new writers", "file"])
def place(request, tmp_path, monkeypatch) -> Place:
    # Readers sort writers of one second by a number in their names, of which 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10))
    return Place(request.param, tmp_path)


@pytest.mark.parametrize("held", [True, False], ids=["held", "dropped"])
@pytest.mark.parametrize("closed", ["at the end", "last", "each"])
def test_one_set_of_curves_that_is_replaced(place, training, held, closed):
    """Whether earlier clippers still exist, are collected in between, or are closed later."""
    kept = []
    for number in range(4):
        run = training()
        clipper = GradientClipper(run.optimizer, 1.0, log=place.log())
        run.take(*[number + 2.0] * (6 - number))
        kept = [*kept, clipper] if held else [clipper]
        if closed == "each":
            clipper.close()
        if number == 2:
            gc.collect()
    clipper.close()
    if closed == "at the end":
        for earlier in kept:
            earlier.close()
    del run, clipper, kept
    gc.collect()
    assert place.norms() == [5.0] * 3


@pytest.mark.parametrize("flush_every", [1, 100])
@pytest.mark.parametrize("first", [0, 1])
def test_two_trainings_that_go_on_together(tmp_path, training, first, flush_every):
    """The clipper that was attached second has the second prefix, whichever steps first."""
    runs = [training(), training()]
    logs = [TensorBoardSink(tmp_path, flush_every=flush_every) for _ in runs]
    clippers = [
        GradientClipper(run.optimizer, 1.0, log=log) for run, log in zip(runs, logs, strict=True)
    ]
    for _ in range(3):
        for index in (first, 1 - first):
            runs[index].take([2.0, 4.0][index])
    for clipper in clippers:
        clipper.close()
    values = values_in(tmp_path)
    assert values.keys() == TAGS | SECOND_TAGS
    assert (values[PRE], values["grad_norm_2/pre"]) == ([2.0] * 3, [4.0] * 3)


def test_a_training_that_goes_on_after_another_has_taken_its_prefix(tmp_path, training):
    """It writes under the next one, and both go on."""
    runs = [training(), training()]
    clippers = [GradientClipper(runs[0].optimizer, 1.0, log=tmp_path)]
    runs[0].take(2.0, 2.0)
    clippers.append(GradientClipper(runs[1].optimizer, 1.0, log=tmp_path))
    runs[1].take(4.0)
    clippers[1].flush()
    for _ in range(2):
        runs[0].take(2.0)
        runs[1].take(4.0)
    for clipper in clippers:
        clipper.close()
    values = values_in(tmp_path)
    assert (values[PRE], values["grad_norm_2/pre"]) == ([4.0] * 3, [2.0] * 2)


def test_a_clipper_that_never_stepped_and_is_gone(tmp_path, training):
    """An attempt that failed before its first step keeps no prefix."""
    attempt = training()
    clipper = GradientClipper(attempt.optimizer, 1.0, log=tmp_path)
    run = training()
    second = GradientClipper(run.optimizer, 1.0, log=tmp_path)
    del attempt, clipper
    run.take(3.0)
    second.close()
    assert values_in(tmp_path)[PRE] == [3.0]

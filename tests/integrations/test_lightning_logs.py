"""What the loggers of a Lightning Trainer get."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from gradclip import (
    MemorySink,
)
from gradclip.integrations.lightning import GradClipCallback
from tests.integrations.lightning_runs import (
    BATCHES,
    IGNORED,
    THRESHOLD,
    adversarial,
    data,
    regression,
    rows_in,
    scalars_in,
    trainer_of,
)

pytestmark = [*IGNORED, pytest.mark.usefixtures("nothing_stays_attached")]


# Logs


NAMES = {
    f"grad_norm/{name}"
    for name in ("pre", "post", "threshold", "clip_rate", "nonfinite_steps", "skipped_steps")
}


def test_the_loggers_of_the_trainer_get_the_numbers_of_the_steps(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")]
    callback = GradClipCallback(THRESHOLD, log=[True, sink := MemorySink()])
    trainer = trainer_of(callback, logger=loggers, log_every_n_steps=2, max_epochs=2)
    trainer.fit(regression(), data())
    curves = scalars_in(loggers[0].log_dir)
    assert {*curves} == NAMES
    steps = [*range(0, 2 * BATCHES, 2)]
    expected = {step.step: step for step in sink.steps}
    assert len(expected) == trainer.global_step
    assert [step for step, _ in curves["grad_norm/pre"]] == steps
    for step, norm in curves["grad_norm/pre"]:
        assert norm == pytest.approx(expected[step].norm, rel=1e-6)
    for step, norm in curves["grad_norm/post"]:
        assert norm == pytest.approx(expected[step].clipped_norm, rel=1e-6)
    rows = rows_in(loggers[1].log_dir)
    assert [int(row["step"]) for row in rows] == steps
    assert [float(row["grad_norm/pre"]) for row in rows] == [expected[s].norm for s in steps]
    assert {*rows[0]} >= NAMES


def test_every_says_which_steps_the_loggers_get(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer_of(GradClipCallback(THRESHOLD, every=3), logger=logger).fit(regression(), data())
    assert [int(row["step"]) for row in rows_in(logger.log_dir)] == [0, 3, 6]


def test_a_trainer_that_logs_no_steps_gets_none(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer_of(GradClipCallback(THRESHOLD), logger=logger, log_every_n_steps=0).fit(
        regression(), data()
    )
    assert scalars_in(logger.log_dir) == {}


def test_steps_of_an_epoch_are_written_at_its_end():
    class Looks(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            seen.append(len(sink.steps))

    seen: list[int] = []
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    trainer_of(callback, Looks(), max_epochs=3).fit(regression(), data())
    assert seen == [0, BATCHES, 2 * BATCHES]


def test_several_clippers_have_curves_of_their_own(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")]
    callback = GradClipCallback(THRESHOLD, every=1)
    trainer_of(callback, logger=loggers).fit(adversarial(), data())
    curves = scalars_in(loggers[0].log_dir)
    second = {name.replace("grad_norm", "grad_norm_2") for name in NAMES}
    assert {*curves} == NAMES | second
    assert curves["grad_norm/pre"] != curves["grad_norm_2/pre"]
    for prefix, clipper in zip(("grad_norm", "grad_norm_2"), callback.clippers, strict=True):
        assert curves[f"{prefix}/pre"][-1] == pytest.approx((7, clipper.last.norm.item()))
    rows = rows_in(loggers[1].log_dir)
    assert {*rows[0]} >= NAMES | second


def test_a_directory_and_none_are_logs_too(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for log in (str(tmp_path / "own"), None):
        trainer_of(GradClipCallback(THRESHOLD, log=log), logger=logger, log_every_n_steps=1).fit(
            regression(), data()
        )
    assert len(scalars_in(tmp_path / "own")["grad_norm/pre"]) == BATCHES
    assert scalars_in(logger.log_dir) == {}


def test_a_second_fit_and_a_resumed_one_continue_the_curves_of_a_logger(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = trainer_of(GradClipCallback(THRESHOLD), logger=logger, log_every_n_steps=1)
    module = regression()
    trainer.fit(module, data())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = trainer_of(
        GradClipCallback(THRESHOLD), logger=logger, log_every_n_steps=1, max_epochs=3
    )
    trainer.fit(module, data(), ckpt_path=str(tmp_path / "a.ckpt"))
    curve = scalars_in(logger.log_dir)["grad_norm/pre"]
    assert [step for step, _ in curve] == [*range(3 * BATCHES)]


def test_fast_dev_run_clips_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback, module = GradClipCallback(THRESHOLD), regression()
    trainer_of(callback, fast_dev_run=4, logger=True).fit(module, data())
    assert callback.clippers[0].steps == 4
    assert max(module.after) <= THRESHOLD * (1 + 1e-6)
    assert not [*tmp_path.rglob("events*")]

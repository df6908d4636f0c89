"""The callback in real Trainers of Transformers, against training by hand."""

import copy
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from gradclip import ArgumentError, AttachError, MemorySink, SkipLimitError
from gradclip.integrations.transformers import GradClipCallback
from gradclip.thresholds import Percentile
from tests.support import trainings
from tests.support.curves import curves_in, runs_in, steps_in
from tests.support.trainings import BATCHES, NUMBERS, THRESHOLD, assert_free, by_hand, values
from tests.support.transformers import (
    InOrder,
    NetOutputs,
    hf_trainer,
    log_entries,
    trained_trainer,
)

pytestmark = trainings.IGNORED

# Refusals


@pytest.mark.parametrize("own", [1.0, 0.5, None])
def test_the_trainer_clips_too(tmp_path, own):
    """It is refused before the first step."""
    trainer = hf_trainer(tmp_path, GradClipCallback(1.0))
    trainer.args.max_grad_norm = own
    before = values(trainer.model).clone()
    with pytest.raises(ArgumentError, match=f"max_grad_norm={own}, .* give max_grad_norm=0"):
        trainer.train()
    assert torch.equal(values(trainer.model), before)
    trainer.args.max_grad_norm = 0
    trainer.train()
    assert_free(trainer.optimizer)


def test_a_stand_in_for_optimizers(tmp_path):
    """It is refused, as it holds no parameter."""
    dummy = {"optimizer": lambda model: LayerWiseDummyOptimizer()}
    with pytest.raises(AttachError, match="LayerWiseDummyOptimizer holds no parameter"):
        trained_trainer(tmp_path, GradClipCallback(1.0), **dummy)


# The history


def test_the_history(tmp_path, monkeypatch):
    """It has the norms of the steps that are logged, and no others; reports get them, too."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    options = {"eval_strategy": "steps", "eval_steps": 3, "report_to": ["tensorboard"]}
    trainer = trained_trainer(tmp_path, GradClipCallback(THRESHOLD), **options)
    _, norms = by_hand()
    logged = log_entries(trainer)
    assert [entry["step"] for entry in logged] == [2, 4, 6, 8]
    for entry in logged:
        norm, so_far = norms[entry["step"] - 1], norms[: entry["step"]]
        assert entry["grad_norm/pre"] == pytest.approx(norm, rel=1e-6)
        assert entry["grad_norm/post"] == pytest.approx(min(norm, THRESHOLD), rel=1e-6)
        assert entry["grad_norm/threshold"] == THRESHOLD
        assert entry["grad_norm/clip_rate"] == sum(n > THRESHOLD for n in so_far) / len(so_far)
        # The Trainer itself logs the norm before clipping.
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for entry in trainer.state.log_history:
        assert NUMBERS.isdisjoint(entry) == ("loss" not in entry)
    curves = curves_in(tmp_path / "runs")
    points = {point.step: point.value for point in curves["train/grad_norm/pre"]}
    needed = {entry["step"]: entry["grad_norm/pre"] for entry in logged}
    assert points == pytest.approx(needed, rel=1e-6)
    assert {f"train/{name}" for name in NUMBERS} <= {*curves}


def test_reports_read_the_board_and_the_state(tmp_path, monkeypatch):
    """Both have the steps that the Trainer logs."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    options = {"report_to": ["tensorboard"], "save_strategy": "steps", "save_steps": BATCHES}
    trainer = trained_trainer(tmp_path / "out", GradClipCallback(THRESHOLD), **options)
    entries = log_entries(trainer)
    [board], [state] = runs_in(tmp_path / "runs"), runs_in(tmp_path / "out")
    for run in (board, state):
        assert run.steps.tolist() == [entry["step"] for entry in entries]
        columns = {"pre": run.norms, "post": run.clipped_norms, "loss": run.losses}
        for name, column in columns.items():
            needed = [entry[f"grad_norm/{name}"] for entry in entries]
            assert column.tolist() == pytest.approx(needed, rel=1e-6)


def test_reports_read_the_norms_of_a_trainer_that_clips_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    options = {"report_to": ["tensorboard"], "max_grad_norm": THRESHOLD}
    trainer = trained_trainer(tmp_path / "out", **options)
    [board] = runs_in(tmp_path / "runs")
    entries = log_entries(trainer)
    assert board.steps.tolist() == [entry["step"] for entry in entries]
    needed = [entry["grad_norm"] for entry in entries]
    assert board.norms.tolist() == pytest.approx(needed, rel=1e-6)
    assert board.name.endswith(" (train/grad_norm)")


@pytest.mark.parametrize("batches", [1, 3])
def test_the_loss_of_a_step(tmp_path, batches):
    """It is the mean over accumulated batches; a step that a scaler skips leaves none behind."""
    losses: list[float] = []

    class Hearing(InOrder):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    options = {"gradient_accumulation_steps": batches, "max_steps": 2}
    trainer = hf_trainer(tmp_path, callback, kind=Hearing, **options)
    trainer.accelerator.scaler = trainings.overflowing_scaler()
    trainer.train()
    assert len(losses) == 2 * batches
    # The Trainer has divided them by the number of batches.
    needed = sum(losses[batches:])
    assert [step.loss for step in sink.steps] == pytest.approx([needed], rel=1e-6)


def test_a_trainer_without_a_history(tmp_path):
    """Callbacks that were given before hear the numbers."""
    heard = []

    class Quiet(InOrder):
        def log(self, logs, start_time=None):
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    class Hearing(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append({*logs} >= NUMBERS)

    trainer = hf_trainer(tmp_path, Hearing(), GradClipCallback(THRESHOLD), kind=Quiet)
    trainer.state.log_history.append({"step": 99})
    trainer.train()
    assert heard == [True] * (BATCHES // 2) + [False]
    assert not trainer.state.log_history


def test_log(tmp_path):
    """With the option all steps go there, and none to the history."""
    trainer = trained_trainer(tmp_path, GradClipCallback(THRESHOLD, log=str(tmp_path / "runs")))
    assert steps_in(tmp_path / "runs")["grad_norm/pre"] == [*range(BATCHES)]
    assert all(NUMBERS.isdisjoint(entry) for entry in trainer.state.log_history)


# The end, and the next training


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_second_training(tmp_path, copier):
    """It begins anew with the same optimizer, as a copy does, and its rule learns for itself."""
    callback = GradClipCallback(Percentile(50), scope="parameter")
    trainer = trained_trainer(tmp_path, callback)
    first, twin = callback.clipper, copier(callback)
    assert first.labels == tuple(name for name, _ in trainer.model.named_parameters())
    assert twin.clipper is None
    trained_trainer(tmp_path, twin)
    assert twin.clipper.labels == first.labels
    assert repr(twin.clipper.state_dict()) == repr(first.state_dict())

    trainer.train()
    assert callback.clipper is not first
    assert callback.clipper.steps == first.steps == BATCHES
    assert log_entries(trainer)[-1]["grad_norm/clip_rate"] == callback.clipper.clip_rate()
    assert int(callback.clipper.state_dict()["threshold"]["counts"].max()) == BATCHES
    assert_free(trainer.optimizer)


def test_after_an_error(tmp_path):
    """The next training attaches, or `close` frees the optimizer."""
    callback = GradClipCallback(1e-6, exceed="skip", skip_limit=2)
    callback.close()
    trainer = hf_trainer(tmp_path, callback)
    for _ in range(2):
        with pytest.raises(SkipLimitError):
            trainer.train()
        assert callback.clipper.steps == 2
    callback.close()
    assert_free(trainer.optimizer)


# Checkpoints

RESUMED = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
RESTORED = {**RESUMED, "restore_callback_states_from_checkpoint": True}


def learning(**options: Any) -> GradClipCallback:
    return GradClipCallback(Percentile(30, window=4), scope="parameter", **options)


@pytest.mark.parametrize("options", [RESUMED, RESTORED], ids=["default", "restoring callbacks"])
@pytest.mark.parametrize("same", [False, True], ids=["another trainer", "the same trainer"])
def test_a_resumed_training(tmp_path, same, options):
    """It continues exactly, whether the Trainer restores its callbacks or not."""
    sinks = [MemorySink(), MemorySink()]
    whole = resumed = learning(log=sinks[0])
    trainer = trained_trainer(tmp_path, whole, **options)
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert isinstance(saved["stateful_callbacks"]["GradClipCallback"]["clipper"], str)
    expected, state = values(trainer.model).clone(), str(whole.clipper.state_dict())
    steps = [step._replace(wall_time=0.0) for step in sinks[0].steps]
    if not same:
        resumed = learning(log=sinks[1])
        trainer = hf_trainer(tmp_path, resumed, model=NetOutputs(5), **options)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert torch.equal(values(trainer.model), expected)
    assert str(resumed.clipper.state_dict()) == state
    later = [step._replace(wall_time=0.0) for step in sinks[0 if same else 1].steps]
    assert later[-(BATCHES - 3) :] == steps[3:]
    ours = [each for each in trainer.callback_handler.callbacks if isinstance(each, type(whole))]
    assert len(ours) == 1
    assert_free(trainer.optimizer)


def test_restored_callbacks_of_several_trainers(tmp_path):
    """They are not mixed up."""
    first, second, other = learning(), learning(), GradClipCallback(7.0)
    trained_trainer(tmp_path, first, **RESTORED)
    trainer = hf_trainer(tmp_path, second, **RESTORED)
    hf_trainer(tmp_path, other, **RESTORED)
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert str(second.clipper.state_dict()) == str(first.clipper.state_dict())
    assert other.clipper is None


def test_checkpoints_that_do_not_fit(tmp_path):
    """A fixed threshold continues without a state; a rule, and another clipper, begin anew."""
    trained_trainer(tmp_path, **RESUMED)
    options = {**RESUMED, "resume": f"{tmp_path}/checkpoint-3"}
    fixed = GradClipCallback(THRESHOLD)
    trained_trainer(tmp_path, fixed, **{**options, "save_strategy": "no"})
    assert fixed.clipper.steps == BATCHES
    assert fixed.clipper.clip_rate() > 0
    with pytest.warns(UserWarning, match="no state of a clipper, so that its rule begins"):
        trained_trainer(tmp_path, learning(), **options)

    trained_trainer(tmp_path, learning(), **RESUMED)
    with pytest.warns(UserWarning, match="begins anew: The threshold is Fixed .* 'Percentile'"):
        trained_trainer(tmp_path, callback := GradClipCallback(THRESHOLD), **options)
    assert callback.clipper.steps == BATCHES


def test_other_callbacks(tmp_path):
    """They are restored beside it."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    options = {**RESTORED, **evaluation, "metric_for_best_model": "loss"}
    for resume in (None, f"{tmp_path}/checkpoint-3"):
        callbacks = learning(), EarlyStoppingCallback(9)
        trainer = trained_trainer(tmp_path, *callbacks, resume=resume, **options)
    assert len(log_entries(trainer)) == BATCHES // 2


# Steps that are skipped


def spoiling(number: float) -> Callable[..., Any]:
    class Spoiling(InOrder):
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 3:
                next(model.parameters()).grad[0, 0] = number
            return loss

    return Spoiling


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_step_that_is_not_finite(tmp_path, number):
    """It is skipped, and counted in the history."""
    callback = GradClipCallback(THRESHOLD, nonfinite="skip")
    trainer = trained_trainer(tmp_path, callback, kind=spoiling(number))
    trainings.assert_close(trainer.model.net, by_hand(skipped=3)[0])
    for name in ("nonfinite_steps", "skipped_steps"):
        assert log_entries(trainer)[-1][f"grad_norm/{name}"] == 1


def test_a_step_that_the_scaler_skips(tmp_path):
    """It adds nothing to the history."""
    callback = GradClipCallback(THRESHOLD)
    trainer = hf_trainer(tmp_path, callback, logging_steps=1, kind=spoiling(math.inf))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.train()
    logged = [NUMBERS.isdisjoint(entry) for entry in log_entries(trainer)]
    assert logged == [each == 3 for each in range(BATCHES)]

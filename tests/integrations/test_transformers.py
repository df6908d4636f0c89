"""The callback in real Trainers of Transformers, against training by hand."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="there is no transformers")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch.utils.data import SequentialSampler  # noqa: E402
from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer  # noqa: E402

from gradclip import ArgumentError, AttachError, MemorySink, SkipLimitError  # noqa: E402
from gradclip.integrations.transformers import GradClipCallback  # noqa: E402
from gradclip.thresholds import Percentile  # noqa: E402
from tests.support import trainings  # noqa: E402
from tests.support.trainings import THRESHOLD, assert_free, by_hand, values  # noqa: E402

pytestmark = [
    # The Trainer's data loader asks for pinned memory, also where there is no accelerator.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

STEPS = trainings.BATCHES
NUMBERS = {
    f"grad_norm/{name}"
    for name in ("pre", "post", "threshold", "clip_rate", "nonfinite_steps", "skipped_steps")
}


class NetOutputs(nn.Module):
    """The network of the trainings by hand, as a Trainer calls it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = trainings.net_of(seed)

    def forward(self, inputs: Tensor, targets: Tensor, scales: Tensor) -> dict[str, Tensor]:
        return {"loss": trainings.loss_of(self.net, (inputs, targets, scales))}


class InOrder(Trainer):  # type: ignore[misc]
    """Trains on the data in their order."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def rows() -> list[dict[str, Tensor]]:
    names = ("inputs", "targets", "scales")
    return [dict(zip(names, row, strict=True)) for row in trainings.loader().dataset]


def hf_trainer(folder: Any, *callbacks: TrainerCallback, **arguments: Any) -> Any:
    model = arguments.pop("model", None) or NetOutputs()
    kind = arguments.pop("kind", InOrder)
    optimizer = arguments.pop("optimizer", trainings.momentum)(model)
    given: dict[str, Any] = {
        "max_grad_norm": 0,
        "max_steps": STEPS,
        "per_device_train_batch_size": trainings.SIZE,
        "logging_steps": 2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["targets"],
        "prediction_loss_only": True,
    }
    return kind(
        model,
        TrainingArguments(str(folder), **{**given, **arguments}),
        train_dataset=rows(),
        eval_dataset=rows()[:4],
        optimizers=(optimizer, None),
        callbacks=[*callbacks],
    )


def trained_trainer(
    folder: Any, *callbacks: TrainerCallback, resume: Any = None, **arguments: Any
) -> Any:
    """Train with a trainer, which is returned, and leaves its optimizer free."""
    trainer = hf_trainer(folder, *callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    assert_free(trainer.optimizer)
    return trainer


def log_entries(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


WAYS = {
    "plain": ({}, {}),
    "two epochs": ({"max_steps": 2 * STEPS}, {"epochs": 2}),
    "accumulated": (
        {"gradient_accumulation_steps": 2, "max_steps": STEPS // 2},
        {"accumulate": 2},
    ),
    "bf16": ({"bf16": True}, {"bf16": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(tmp_path, way):
    """Weights and norms are those of training by hand."""
    options, same = WAYS[way]
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    trainer = trained_trainer(tmp_path, callback, **options)
    net, norms = by_hand(**same)
    assert trainings.norms_of(sink) == pytest.approx(norms, rel=1e-6)
    assert max(norms) > THRESHOLD
    trainings.assert_close(trainer.model.net, net)
    assert callback.clipper.steps == len(norms)
    trainings.assert_unlike(by_hand(**same, threshold=math.inf)[0], net)


def test_the_clipping_of_the_trainer(tmp_path):
    """It has the same effect."""
    trainer = trained_trainer(tmp_path, max_grad_norm=THRESHOLD)
    trainings.assert_close(trainer.model.net, by_hand()[0])


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exceed": "clip"}, ArgumentError, "exceed"),
        ({"scope": "layer"}, ArgumentError, "scope"),
        ({"norm_type": -1}, ArgumentError, "norm_type"),
        ({"max_norm": -1.0}, ArgumentError, "max_norm"),
        ({"model": nn.Linear(1, 1)}, ArgumentError, "model was given"),
        ({"scop": "unit"}, TypeError, "scop"),
    ],
)
def test_options(options, error, message):
    """They are checked when the callback is made."""
    with pytest.raises(error, match=message):
        GradClipCallback(**{"max_norm": 1.0, **options})


def test_a_stand_in_for_optimizers(tmp_path):
    """It is refused, as it holds no parameter."""
    dummy = {"optimizer": lambda model: LayerWiseDummyOptimizer()}
    with pytest.raises(AttachError, match="LayerWiseDummyOptimizer holds no parameter"):
        trained_trainer(tmp_path, GradClipCallback(1.0), **dummy)


# The history


def test_the_history(tmp_path):
    """It has the norms of the steps that are logged, and of no others."""
    options = {"eval_strategy": "steps", "eval_steps": 3}
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


def test_reports(tmp_path, monkeypatch):
    """What the Trainer reports to gets the numbers, too."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = trained_trainer(tmp_path, GradClipCallback(THRESHOLD), report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    points = {point.step: point.value for point in events.Scalars("train/grad_norm/pre")}
    logged = {entry["step"]: entry["grad_norm/pre"] for entry in log_entries(trainer)}
    assert points == pytest.approx(logged, rel=1e-6)
    assert {f"train/{name}" for name in NUMBERS} <= {*events.Tags()["scalars"]}


class Quiet(InOrder):
    """Reports, and keeps no history."""

    def log(self, logs, start_time=None):
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)


class Hearing(TrainerCallback):
    def __init__(self) -> None:
        self.heard: list[bool] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.heard.append({*logs} >= NUMBERS)


def test_a_trainer_without_a_history(tmp_path):
    """Callbacks that were given before hear the numbers."""
    hearing = Hearing()
    trainer = hf_trainer(tmp_path, hearing, GradClipCallback(THRESHOLD), kind=Quiet)
    trainer.state.log_history.append({"step": 99})
    trainer.train()
    assert hearing.heard == [True] * (STEPS // 2) + [False]
    assert not trainer.state.log_history


def test_log(tmp_path):
    """With the option all steps go there, and none to the history."""
    trainer = trained_trainer(tmp_path, GradClipCallback(THRESHOLD, log=str(tmp_path / "runs")))
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [point.step for point in events.Scalars("grad_norm/pre")] == [*range(STEPS)]
    assert all(NUMBERS.isdisjoint(entry) for entry in trainer.state.log_history)


# The end, and the next training


def test_a_second_training(tmp_path):
    """It begins anew with the same optimizer, and its rule learns for itself."""
    callback = GradClipCallback(Percentile(50), scope="parameter")
    trainer = trained_trainer(tmp_path, callback)
    first = callback.clipper
    assert first.labels == tuple(name for name, _ in trainer.model.named_parameters())
    trainer.train()
    assert callback.clipper is not first
    assert callback.clipper.steps == first.steps == STEPS
    assert log_entries(trainer)[-1]["grad_norm/clip_rate"] == callback.clipper.clip_rate()
    assert int(callback.clipper.state_dict()["threshold"]["counts"].max()) == STEPS
    assert_free(trainer.optimizer)


class FailsOnce(TrainerCallback):
    """Raises after the third step, once."""

    failed = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and not self.failed:
            self.failed = True
            raise KeyError("a failure")


def test_after_an_error(tmp_path):
    """The next training works."""
    callback = GradClipCallback(THRESHOLD)
    trainer = hf_trainer(tmp_path, callback, FailsOnce())
    with pytest.raises(KeyError):
        trainer.train()
    assert callback.clipper.steps == 3
    trainer.train()
    assert callback.clipper.steps == STEPS
    assert_free(trainer.optimizer)


def test_close(tmp_path):
    """It frees the optimizer after an error, and does nothing before a training."""
    callback = GradClipCallback(1e-6, exceed="skip", skip_limit=2)
    callback.close()
    trainer = hf_trainer(tmp_path, callback)
    with pytest.raises(SkipLimitError):
        trainer.train()
    callback.close()
    assert_free(trainer.optimizer)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies(tmp_path, copier):
    """They have the options and begin anew."""
    callback = GradClipCallback(Percentile(50), scope="parameter")
    trained_trainer(tmp_path, callback)
    copied = copier(callback)
    assert copied.clipper is None
    trained_trainer(tmp_path, copied)
    assert copied.clipper.labels == callback.clipper.labels
    assert repr(copied.clipper.state_dict()) == repr(callback.clipper.state_dict())


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
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(values(trainer.model), expected)
    assert str(resumed.clipper.state_dict()) == state
    later = [step._replace(wall_time=0.0) for step in sinks[0 if same else 1].steps]
    assert later[-(STEPS - 3) :] == steps[3:]
    ours = [each for each in trainer.callback_handler.callbacks if isinstance(each, type(whole))]
    assert len(ours) == 1
    assert_free(trainer.optimizer)


def test_restored_callbacks_of_several_trainers(tmp_path):
    """They are not mixed up."""
    first, second, other = learning(), learning(), GradClipCallback(7.0)
    trained_trainer(tmp_path, first, **RESTORED)
    trainer = hf_trainer(tmp_path, second, **RESTORED)
    hf_trainer(tmp_path, other, **RESTORED)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert str(second.clipper.state_dict()) == str(first.clipper.state_dict())
    assert other.clipper is None


def test_a_checkpoint_without_a_clipper(tmp_path):
    """A fixed threshold continues; a rule begins anew, with a warning."""
    trained_trainer(tmp_path, **RESUMED)
    resume = f"{tmp_path}/checkpoint-3"
    fixed = GradClipCallback(THRESHOLD)
    trained_trainer(tmp_path, fixed, resume=resume, **{**RESUMED, "save_strategy": "no"})
    assert fixed.clipper.steps == STEPS
    assert fixed.clipper.clip_rate() > 0
    with pytest.warns(UserWarning, match="no state of a clipper, so that its rule begins"):
        trained_trainer(tmp_path, learning(), resume=resume, **RESUMED)


def test_a_checkpoint_of_another_clipper(tmp_path):
    """The clipper begins anew, with a warning."""
    trained_trainer(tmp_path, learning(), **RESUMED)
    callback = GradClipCallback(THRESHOLD)
    with pytest.warns(UserWarning, match="begins anew: The threshold is Fixed .* 'Percentile'"):
        trained_trainer(tmp_path, callback, resume=f"{tmp_path}/checkpoint-3", **RESUMED)
    assert callback.clipper.steps == STEPS


def test_other_callbacks(tmp_path):
    """They are restored beside it."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    options = {**RESTORED, **evaluation, "metric_for_best_model": "loss"}
    for resume in (None, f"{tmp_path}/checkpoint-3"):
        trainer = trained_trainer(
            tmp_path, learning(), EarlyStoppingCallback(9), resume=resume, **options
        )
    assert len(log_entries(trainer)) == STEPS // 2


# Steps that are skipped


def test_skipped_steps(tmp_path):
    """They leave the model as it is."""
    trainer = trained_trainer(tmp_path, GradClipCallback(1e-6, exceed="skip"))
    assert torch.equal(values(trainer.model), values(NetOutputs()))
    assert log_entries(trainer)[-1]["grad_norm/skipped_steps"] == STEPS


def test_grad_scaler(tmp_path):
    """Norms are true, and overflows do not count."""
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    trainer = hf_trainer(tmp_path, callback)
    # A power of 2, so that scaling changes no bits. The first scale is too large.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert scaler.get_scale() == 2.0**7
    net, norms = by_hand(skipped=0)
    assert trainings.norms_of(sink) == pytest.approx(norms, rel=1e-6)
    assert callback.clipper.steps == STEPS - 1
    trainings.assert_close(trainer.model.net, net)


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
    logged = log_entries(trainer)
    assert [NUMBERS.isdisjoint(entry) for entry in logged] == [each == 3 for each in range(STEPS)]


# Imports


def run_python(code: str, *first: str) -> subprocess.CompletedProcess[str]:
    """Run code with the paths of this process, after others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*first, *sys.path])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


def test_without_transformers(tmp_path):
    """The import says what to install."""
    (tmp_path / "transformers.py").write_text("raise ImportError('No module named this')")
    done = run_python("import gradclip.integrations.transformers", str(tmp_path))
    assert done.returncode
    assert 'pip install "gradclip[transformers]"' in done.stderr.splitlines()[-1]


def test_gradclip_alone():
    """It imports no transformers."""
    done = run_python("import gradclip, sys; print('transformers' in sys.modules)")
    assert done.stdout.strip() == "False"

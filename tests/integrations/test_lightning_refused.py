"""The trainers, modules and options that the callback refuses or warns of, and imports."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning as older
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from gradclip import ArgumentError, AttachError, GradientClipper, JsonlSink, MemorySink, StateError
from gradclip.integrations.lightning import GradClipCallback
from tests.support import lightning, trainings
from tests.support.lightning import fit
from tests.support.trainings import THRESHOLD, loader

pytestmark = lightning.IGNORED


class ClipsLater(pl.Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.gradient_clip_val = 0.5


class ReplacesWithin(pl.Callback):
    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.strategy.setup_optimizers(trainer)


class Engine(SingleDeviceStrategy):
    handles_gradient_accumulation = True


def of_other_clippers(tmp_path: Any) -> dict[str, Any]:
    path = str(tmp_path / "a.ckpt")
    fit(lightning.adversarial(), GradClipCallback(THRESHOLD)).save_checkpoint(path)
    return {"resume": path, "max_epochs": 2}


REFUSED = {
    "a norm of the trainer": (
        lambda _: {"gradient_clip_val": 0.5},
        ArgumentError,
        "gradient_clip_val=0.5 and a GradClipCallback",
    ),
    "an algorithm of the trainer": (
        lambda _: {"gradient_clip_algorithm": "value"},
        ArgumentError,
        "gradient_clip_algorithm='value' and a GradClipCallback",
    ),
    "a norm that another callback sets": (
        lambda _: {"other": ClipsLater()},
        ArgumentError,
        "gradient_clip_val=0.5 and a GradClipCallback",
    ),
    "a strategy that steps by itself": (
        lambda _: {"strategy": Engine("cpu")},
        AttachError,
        "Engine takes the steps in an engine of its own",
    ),
    "joint optimizers under a GradScaler": (
        lambda _: {"module": lightning.halves(), "plugins": [MixedPrecision("16-mixed", "cpu")]},
        AttachError,
        "Lightning updates after the step of each optimizer",
    ),
    "a sink for several clippers": (
        lambda folder: {
            "module": lightning.adversarial(),
            "given": {"log": [JsonlSink(folder / "steps")], "joint": False},
        },
        ArgumentError,
        "2 optimizers with a clipper each",
    ),
    "a checkpoint of other clippers": (
        lambda folder: {"module": lightning.adversarial(), **of_other_clippers(folder)},
        StateError,
        "of 2 clippers, and there are 1",
    ),
    "an optimizer replaced within a batch": (
        lambda _: {"module": lightning.stepping(), "other": ReplacesWithin()},
        AttachError,
        "SGD was added within a batch",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tmp_path):
    """A fit ends with an error, before anything is clipped twice or wrongly."""
    made, error, message = REFUSED[case]
    options = made(tmp_path)
    module, other = (
        options.pop("module", None) or lightning.regression(),
        options.pop("other", None),
    )
    callback = GradClipCallback(THRESHOLD, **{"joint": True, **options.pop("given", {})})
    callbacks = [callback] if other is None else [other, callback]
    with pytest.raises(error, match=message):
        fit(module, *callbacks, **options)
    assert all(clipper.steps <= 3 for clipper in callback.clippers)


def test_a_trainer_that_clips_can_evaluate(package):
    """Only a fit is refused, in either package."""
    options = {"package": package, "gradient_clip_val": 0.5}
    trainer = lightning.trainer_of(GradClipCallback(THRESHOLD), **options)
    with pytest.raises(ArgumentError, match="gradient_clip_val"):
        trainer.fit(lightning.regression(package), loader())
    trainer.validate(lightning.evaluated(package), loader(), verbose=False)


def test_an_optimizer_that_is_refused():
    """It leaves the others free."""
    module = lightning.adversarial()
    optimizers = module.nets.optimizers_of()
    optimizers[1].param_groups[0]["differentiable"] = True
    module.configure_optimizers = lambda: optimizers
    callback = GradClipCallback(THRESHOLD)
    with pytest.raises(AttachError, match="differentiable"):
        fit(module, callback)
    assert callback.clippers == []
    GradientClipper(optimizers[0], 1.0).close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scoop": "global"}, TypeError, "scoop"),
        ({"optimizer": None}, TypeError, "optimizer"),
        ({"exceed": "clip"}, ArgumentError, "exceed is 'clip'"),
        ({"every": 0}, ArgumentError, "every is 0"),
        ({"max_norm": -1.0}, ArgumentError, "max_norm is -1.0"),
        ({"log": False}, ArgumentError, "log is False"),
        ({"log": [True, 5]}, ArgumentError, "log is 5"),
    ],
)
def test_options(options, error, message):
    """They are checked when the callback is made."""
    with pytest.raises(error, match=message):
        GradClipCallback(**{"max_norm": THRESHOLD, **options})


def test_invalid_states():
    with pytest.raises(StateError, match="needed is the key 'clippers'"):
        GradClipCallback(THRESHOLD).load_state_dict({"steps": 3})


def test_two_callbacks_in_one_trainer():
    """Lightning refuses them."""
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        lightning.trainer_of(GradClipCallback(THRESHOLD), GradClipCallback(THRESHOLD))


# Modules that clip by themselves


def clips(self: Any, optimizer: Any, **_: Any) -> None:
    self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


def test_a_module_that_overrides_the_clipping(package):
    """It gets a warning: the gradients were clipped before they were measured."""
    module = lightning.regression(package, configure_gradient_clipping=clips)
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    with pytest.warns(UserWarning, match="Regression overrides configure_gradient_clipping"):
        fit(module, callback, package=package)
    assert max(trainings.norms_of(sink)) == pytest.approx(0.1, rel=1e-3)


def test_a_module_that_clips_by_hand():
    """It gets one warning under manual optimization."""
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    with pytest.warns(UserWarning, match="Regression writes to its gradients between") as caught:
        fit(lightning.stepping(limit=0.1), callback)
    assert len([each for each in caught if "writes to its gradients" in str(each.message)]) == 1
    assert max(trainings.norms_of(sink)) == pytest.approx(0.1, rel=1e-3)


def test_a_module_that_steps_by_hand():
    """It gets no warning, also with a method that Lightning never calls then, and is clipped."""
    module = lightning.stepping(
        configure_gradient_clipping=lambda *_, **__: pytest.fail("it was called")
    )
    fit(module, GradClipCallback(THRESHOLD))
    trainings.assert_close(module.net, trainings.by_hand()[0])


# Configurations and installations

CONFIGURATION = """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: gradclip.integrations.lightning.GradClipCallback
      init_args:
        max_norm:
          class_path: gradclip.thresholds.Percentile
          init_args: {percentile: 50}
        nonfinite: skip
        skip_limit: 7
        scope: parameter
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # those of jsonargparse
def test_a_configuration(tmp_path, package, monkeypatch):
    """It takes all options of a clipper; labels have the names of the module."""
    cli = importlib.import_module(f"{package.__name__}.cli").LightningCLI
    (tmp_path / "config.yaml").write_text(CONFIGURATION)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    ran = cli(
        type(lightning.regression(package)),
        seed_everything_default=0,
        run=False,
        save_config_callback=None,
    )
    [callback] = [each for each in ran.trainer.callbacks if isinstance(each, GradClipCallback)]
    ran.trainer.fit(ran.model, loader())
    [clipper] = callback.clippers
    assert repr(callback._threshold) == "Percentile(50.0, window=1000)"
    assert callback._options["nonfinite"] == "skip"
    assert callback._options["skip_limit"] == 7
    assert clipper.labels == tuple(name for name, _ in ran.model.named_parameters())


def imported_without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> Any:
    """Import the module anew as if some packages were not installed."""
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    known = sys.modules["gradclip.integrations.lightning"]
    spec = importlib.util.spec_from_file_location(known.__name__, known.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_either_package(monkeypatch):
    """The import says what to install."""
    with pytest.raises(ImportError, match=r'neither .* pip install "gradclip\[lightning\]"'):
        imported_without(monkeypatch, "lightning.pytorch", "pytorch_lightning")


@pytest.mark.parametrize("missing", ["lightning.pytorch", "pytorch_lightning"])
def test_with_one_package(missing, monkeypatch):
    """One of them is enough."""
    callback = imported_without(monkeypatch, missing).GradClipCallback
    bases = {"lightning.pytorch": pl.Callback, "pytorch_lightning": older.Callback}
    for name, base in bases.items():
        assert issubclass(callback, base) is (name != missing)

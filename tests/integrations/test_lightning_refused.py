"""What Lightning's Trainer and module cannot do beside the callback, and what to install."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning as older
from lightning.pytorch.strategies import SingleDeviceStrategy

from gradclip import (
    ArgumentError,
    AttachError,
    MemorySink,
)
from gradclip.integrations.lightning import GradClipCallback
from tests.integrations.lightning_runs import (
    IGNORED,
    THRESHOLD,
    assert_close,
    by_hand,
    data,
    evaluated,
    halves,
    loss_of,
    norms_of,
    regression,
    trainer_of,
)

pytestmark = [*IGNORED, pytest.mark.usefixtures("nothing_stays_attached")]


# What is refused


@pytest.mark.parametrize(
    "option", [{"gradient_clip_val": 0.5}, {"gradient_clip_algorithm": "value"}], ids=str
)
def test_a_trainer_that_clips_as_well_is_refused(option, package):
    trainer = trainer_of(GradClipCallback(THRESHOLD), package=package, **option)
    [(name, value)] = option.items()
    with pytest.raises(ArgumentError, match=f"{name}={value!r} and a GradClipCallback"):
        trainer.fit(regression(package), data())
    trainer.validate(evaluated(package), data(), verbose=False)


def test_a_trainer_that_is_told_to_clip_by_another_callback_is_refused():
    class Tells(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.gradient_clip_val = 0.5

    with pytest.raises(ArgumentError, match="gradient_clip_val=0.5 and a GradClipCallback"):
        trainer_of(Tells(), GradClipCallback(THRESHOLD)).fit(regression(), data())


def test_a_trainer_that_clips_at_0_clips_nothing_and_is_taken():
    module = regression()
    trainer_of(GradClipCallback(THRESHOLD), gradient_clip_val=0).fit(module, data())
    assert_close(module.net, by_hand()[0])


def test_a_module_that_may_clip_by_itself_gets_a_warning(package):
    def configure(self: Any, optimizer: Any, **_: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    module = regression(package, configure_gradient_clipping=configure)
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    with pytest.warns(UserWarning, match="Regression overrides configure_gradient_clipping"):
        trainer_of(callback, package=package).fit(module, data())
    assert max(norms_of(sink)) == pytest.approx(0.1, rel=1e-3)  # it did


def test_under_manual_optimization_that_method_is_never_called():
    module = halves()
    type(module).configure_gradient_clipping = lambda self, *_, **__: pytest.fail("it was called")
    trainer_of(GradClipCallback(THRESHOLD, joint=True)).fit(module, data())


def manual(**overrides: Any) -> Any:
    """Return a module that is optimized by hand, and clips by hand where it is told a limit."""

    def step(self: Any, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss_of(self.net, batch, index))
        if self.limit:
            self.clip_gradients(optimizer, gradient_clip_val=self.limit)
        optimizer.step()

    kept = {"automatic_optimization": False, "training_step": step, "limit": None}
    return regression(**{**kept, **overrides})


def test_a_module_that_clips_by_hand_gets_one_warning():
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    with pytest.warns(UserWarning, match="Regression writes to its gradients between") as caught:
        trainer_of(callback).fit(manual(limit=0.1), data())
    assert len([each for each in caught if "writes to its gradients" in str(each.message)]) == 1
    assert max(norms_of(sink)) == pytest.approx(0.1, rel=1e-3)  # it did


def test_a_module_that_steps_by_hand_gets_none_and_is_clipped():
    trainer_of(GradClipCallback(THRESHOLD)).fit(module := manual(), data())
    assert_close(module.net, by_hand()[0])


def test_a_strategy_that_steps_by_itself_is_refused():
    class Engine(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    trainer = trainer_of(GradClipCallback(THRESHOLD), strategy=Engine("cpu"))
    with pytest.raises(AttachError, match="Engine takes the steps in an engine of its own"):
        trainer.fit(regression(), data())


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
def test_options_are_checked_when_the_callback_is_made(options, error, message):
    with pytest.raises(error, match=message):
        GradClipCallback(**{"max_norm": THRESHOLD, **options})


def test_two_callbacks_in_one_trainer_are_refused():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        trainer_of(GradClipCallback(THRESHOLD), GradClipCallback(THRESHOLD))


# Configurations

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
def test_a_configuration_takes_all_options_of_a_clipper(tmp_path, package, monkeypatch):
    cli = importlib.import_module(f"{package.__name__}.cli").LightningCLI
    (tmp_path / "config.yaml").write_text(CONFIGURATION)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    ran = cli(
        type(regression(package)), seed_everything_default=0, run=False, save_config_callback=None
    )
    [callback] = [each for each in ran.trainer.callbacks if isinstance(each, GradClipCallback)]
    ran.trainer.fit(ran.model, data())
    [clipper] = callback.clippers
    assert repr(callback._threshold) == "Percentile(50.0, window=1000)"
    assert callback._options["nonfinite"] == "skip"
    assert callback._options["skip_limit"] == 7
    assert clipper.labels == tuple(name for name, _ in ran.model.named_parameters())


# Installations


def imported_with(monkeypatch: pytest.MonkeyPatch, *missing: str) -> Any:
    """Import the module anew where some packages are not installed."""
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    known = sys.modules["gradclip.integrations.lightning"]
    spec = importlib.util.spec_from_file_location(known.__name__, known.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_either_package_the_import_says_what_to_install(monkeypatch):
    with pytest.raises(ImportError, match=r'neither .* pip install "gradclip\[lightning\]"'):
        imported_with(monkeypatch, "lightning.pytorch", "pytorch_lightning")


@pytest.mark.parametrize("missing", ["lightning.pytorch", "pytorch_lightning"])
def test_one_of_the_packages_is_enough(missing, monkeypatch):
    found = imported_with(monkeypatch, missing).GradClipCallback
    bases = {"lightning.pytorch": pl.Callback, "pytorch_lightning": older.Callback}
    for name, base in bases.items():
        assert issubclass(found, base) is (name != missing)

"""The callback in Trainers of both packages, against the same training by hand, and its logs."""

import importlib
import math
import sys
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

import gradclip
from gradclip import ArgumentError, AttachError, GradientClipper, MemorySink, StateError
from gradclip.integrations.lightning import GradClipCallback
from gradclip.thresholds import StepContext, Threshold
from tests.support import lightning, trainings
from tests.support.curves import runs_in
from tests.support.lightning import fit
from tests.support.trainings import BATCHES, NUMBERS, THRESHOLD, by_hand, loader

pytestmark = trainings.IGNORED

# Automatic optimization


def quasi_newton(net: nn.Module) -> Optimizer:
    return LBFGS(net.parameters(), lr=0.1, max_iter=3)


@pytest.mark.filterwarnings("ignore:The gradients of LBFGS were clipped")
def test_lbfgs():
    """Every evaluation is clipped. In float64, as the method makes much of a rounding."""
    module = lightning.regression(configure_optimizers=lambda self: quasi_newton(self.net))
    fit(module, GradClipCallback(THRESHOLD), precision="64-true")
    net, norms = trainings.net_of().double(), []
    optimizer = quasi_newton(net)
    for batch in loader():

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = trainings.loss_of(net, [part.double() for part in batch])
            loss.backward()
            norms.append(gradclip.clip_grad_norm_(net.parameters(), THRESHOLD).item())
            return loss

        optimizer.step(closure)
    trainings.assert_close(module.net, net)
    assert len(norms) > BATCHES
    assert max(norms) > THRESHOLD


# Several optimizers under manual optimization


class Largest(Threshold):
    """A rule of one's own, with a state that it has from its beginning."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        return torch.full_like(norms, max(self.norms, default=math.inf))

    def observe(self, norms: Tensor, clipped_norms: Tensor, context: StepContext) -> None:
        self.norms += norms.tolist()


@pytest.mark.parametrize("step_with_closure", [False, True])
@pytest.mark.parametrize("make", [trainings.rule_of, Largest])
def test_several_optimizers(make, step_with_closure):
    """Each has a clipper, with a copy of the rule that learns for itself."""
    rule, module = make(), lightning.adversarial(step_with_closure)
    before = repr(vars(rule))
    trainer = fit(module, callback := GradClipCallback(rule))
    nets = lightning.Adversaries()
    clippers = [GradientClipper(optimizer, make()) for optimizer in nets.optimizers_of()]
    for batch in loader():
        for clipper, loss in zip(clippers, nets.losses(batch), strict=True):
            clipper.zero_grad()
            loss.backward()
            clipper.step()
    trainings.assert_close(module.nets, nets)
    first, second = (clipper.state_dict() for clipper in callback.clippers)
    assert repr([first, second]) == repr([clipper.state_dict() for clipper in clippers])
    assert make is Largest or repr(first["threshold"]) != repr(second["threshold"])
    assert [clipper.steps for clipper in callback.clippers] == [BATCHES] * 2
    assert trainer.global_step == 2 * BATCHES
    assert repr(vars(rule)) == before


def test_joint_optimizers():
    """They share one norm, which makes a difference."""
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()), joint=True)
    fit(module := lightning.halves(), callback)
    expected, norms = by_hand()
    trainings.assert_close(module.net, expected)
    assert trainings.norms_of(sink) == pytest.approx(norms, rel=1e-4)
    assert [clipper.steps for clipper in callback.clippers] == [BATCHES]
    fit(apart := lightning.halves(), GradClipCallback(THRESHOLD))
    trainings.assert_unlike(apart.net, expected)


# Logs


def fit_with_loggers(folder: Any, *arguments: Any, **options: Any) -> Any:
    """Fit; return the curves of TensorBoard, and the rows of a table."""
    loggers = [TensorBoardLogger(folder, "board"), CSVLogger(folder, "table")]
    fit(*arguments, logger=loggers, **options)
    return lightning.scalars_in(loggers[0].log_dir), lightning.rows_in(loggers[1].log_dir)


def test_loggers(tmp_path):
    """The loggers of the trainer get the numbers of its steps, written at the end of each epoch."""
    counts: list[int] = []
    callback = GradClipCallback(THRESHOLD, log=[True, sink := MemorySink()])
    looks = {"on_train_epoch_start": lambda *_: counts.append(len(sink.steps))}
    options = {"log_every_n_steps": 2, "max_epochs": 2}
    module = lightning.regression(**looks)
    curves, rows = fit_with_loggers(tmp_path, module, callback, **options)
    assert counts == [0, BATCHES]
    assert len(sink.steps) == 2 * BATCHES
    assert {*curves} == {*NUMBERS, "grad_norm/loss"} <= {*rows[0]}
    expected = sink.steps[::2]
    pre = [(step.step, pytest.approx(step.norm, rel=1e-6)) for step in expected]
    post = [(step.step, pytest.approx(step.clipped_norm, rel=1e-6)) for step in expected]
    assert (curves["grad_norm/pre"], curves["grad_norm/post"]) == (pre, post)
    table = [(int(row["step"]), float(row["grad_norm/pre"])) for row in rows]
    assert table == [(step.step, step.norm) for step in expected]


def kept_run(sink: MemorySink, every: int = 1) -> Any:
    """Return the norms before and after, and the losses, of every so many steps."""
    steps = sink.steps[::every]
    names = ("step", "norm", "clipped_norm", "loss")
    return [pytest.approx([getattr(step, name) for step in steps], rel=1e-6) for name in names]


def read_run(run: Any) -> Any:
    columns = (run.steps, run.norms, run.clipped_norms, run.losses)
    return [column.tolist() for column in columns]


@pytest.mark.parametrize("prefix", ["", "train", "a/b"])
def test_reports_read_the_loggers(tmp_path, prefix):
    """The loggers of the trainer have the run that the clipper's own sink has."""
    callback = GradClipCallback(THRESHOLD, log=[True, sink := MemorySink()])
    loggers = [
        TensorBoardLogger(tmp_path / "board", prefix=prefix),
        CSVLogger(tmp_path / "table", prefix=prefix),
    ]
    fit(lightning.regression(), callback, logger=loggers, log_every_n_steps=2, max_epochs=2)
    [board], [table] = runs_in(tmp_path / "board"), runs_in(tmp_path / "table")
    assert read_run(board) == kept_run(sink, 2)
    assert read_run(table) == kept_run(sink, 2)
    assert table.name.endswith(f" ({prefix}-grad_norm)") == bool(prefix)
    assert len(runs_in(tmp_path)) == 2


@pytest.mark.parametrize("order", [2, "inf"])
def test_reports_read_the_norms_that_lightning_measures(tmp_path, order):
    """Those of `grad_norm`, which a module logs before Lightning clips."""
    norms: list[dict[str, float]] = []

    def log_norms(self: Any, *_: Any) -> None:
        norms.append({name: float(norm) for name, norm in grad_norm(self.net, order).items()})
        self.log_dict(norms[-1])

    module = lightning.regression(on_before_optimizer_step=log_norms)
    loggers = [
        TensorBoardLogger(tmp_path / "board", prefix="a"),
        CSVLogger(tmp_path / "table", prefix="a"),
    ]
    options = {"gradient_clip_val": THRESHOLD, "log_every_n_steps": 1}
    fit(module, logger=loggers, **options)
    start = f"grad_{float(order)}_norm"
    for run in (*runs_in(tmp_path / "board"), *runs_in(tmp_path / "table")):
        needed = [each[f"{start}_total"] for each in norms]
        assert run.norms.tolist() == pytest.approx(needed, rel=1e-6)
        logged = run.parameter_norms
        assert {f"{start}/{name}" for name in logged.names} == {*norms[0]} - {f"{start}_total"}
        found = [f"{start}/{logged.names[index]}" for index in logged.name_indices]
        values = [norms[step][name] for step, name in zip(logged.steps, found, strict=True)]
        assert logged.norms.tolist() == pytest.approx(values, rel=1e-6)
        assert len(values) == BATCHES * (len(norms[0]) - 1)


def heard(losses: list[float], overflows: int | None = None, **overrides: Any) -> Any:
    """Return a module that keeps the losses of its batches, one of which may be infinite."""

    def training_step(self: Any, batch: Any, index: int) -> Tensor:
        loss = trainings.loss_of(self.net, batch) * (math.inf if index == overflows else 1.0)
        losses.append(loss.item())
        return loss

    return lightning.regression(training_step=training_step, **overrides)


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_loss_of_a_step(batches, scaled):
    """It is the mean over accumulated batches, without the factor of a scaler."""
    losses: list[float] = []
    options = {"accumulate_grad_batches": batches}
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options["plugins"] = [lightning.precision_of(scaler)]
    module = heard(losses, overflows=0 if scaled else None)
    fit(module, GradClipCallback(THRESHOLD, log=(sink := MemorySink())), **options)
    groups = [losses[at : at + batches] for at in range(0, BATCHES, batches)]
    # The first step is one that the scaler skips: its loss is in no record, nor is it added to.
    needed = [sum(group) / batches for group in groups if math.inf not in group]
    assert [step.loss for step in sink.steps] == pytest.approx(needed, rel=1e-6)


def test_the_loss_of_several_evaluations():
    """It is that of the last, not their sum."""
    losses: list[float] = []
    module = heard(losses, configure_optimizers=lambda self: quasi_newton(self.net))
    fit(module, callback := GradClipCallback(None, log=MemorySink()))
    assert len(losses) > BATCHES
    assert callback.clippers[0].last.loss.item() == pytest.approx(losses[-1], rel=1e-6)


def test_the_loss_under_manual_optimization():
    """That of the last backward pass, and of several clippers none."""
    fit(lightning.stepping(), one := GradClipCallback(THRESHOLD))
    fit(lightning.adversarial(), several := GradClipCallback(THRESHOLD))
    needed = trainings.by_hand()[1]
    assert one.clippers[0].last.norm.item() == pytest.approx(needed[-1], rel=1e-4)
    assert one.clippers[0].last.loss.item() > 0
    assert [clipper.last.loss for clipper in several.clippers] == [None, None]


LOGGED = [
    ({"every": 3}, {"log_every_n_steps": 1}, [0, 3, 6]),
    ({}, {"log_every_n_steps": 0}, []),
    ({}, {"log_every_n_steps": 5}, [0, 5]),
    ({}, {"fast_dev_run": 4}, []),
    ({"log": None}, {"log_every_n_steps": 1}, []),
    ({"log": "own"}, {"log_every_n_steps": 1}, []),
    ({"log": ["own", True]}, {"log_every_n_steps": 5}, [0, 5]),
]


@pytest.mark.parametrize(("given", "options", "steps"), LOGGED)
def test_steps_in_logs(tmp_path, monkeypatch, given, options, steps):
    """The options say which steps the loggers get; a directory of one's own has all of them."""
    monkeypatch.chdir(tmp_path)
    callback, module = GradClipCallback(THRESHOLD, **given), lightning.regression()
    curves, rows = fit_with_loggers(tmp_path, module, callback, **options)
    assert [step for step, _ in curves.get("grad_norm/pre", [])] == steps
    assert len(rows) == len(steps)
    assert max(module.after) <= THRESHOLD * (1 + 1e-6)
    own = lightning.scalars_in(tmp_path / "own").get("grad_norm/pre", [])
    assert len(own) == (BATCHES if "own" in (given.get("log") or ()) else 0)


def test_logs_of_several_clippers(tmp_path):
    """They have curves of their own."""
    callback = GradClipCallback(THRESHOLD, every=1)
    curves, rows = fit_with_loggers(tmp_path, lightning.adversarial(), callback)
    second = {name.replace("grad_norm", "grad_norm_2") for name in NUMBERS}
    assert {*curves} == NUMBERS | second <= {*rows[0]}
    assert curves["grad_norm/pre"] != curves["grad_norm_2/pre"]
    for prefix, clipper in zip(("grad_norm", "grad_norm_2"), callback.clippers, strict=True):
        assert curves[f"{prefix}/pre"][-1] == pytest.approx((7, clipper.last.norm.item()))


def test_a_logger_of_several_fits(tmp_path):
    """A second fit and a resumed one continue its curves, without a step that overflowed."""
    options = {"logger": TensorBoardLogger(tmp_path), "log_every_n_steps": 1}
    options["plugins"] = [lightning.precision_of(trainings.overflowing_scaler())]
    callback = GradClipCallback(THRESHOLD)
    trainer = fit(module := lightning.regression(), callback, **options)
    assert callback.clippers[0].steps == BATCHES - 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    options |= {"max_epochs": 3, "resume": str(tmp_path / "a.ckpt")}
    fit(module, GradClipCallback(THRESHOLD), **options)
    curve = lightning.scalars_in(options["logger"].log_dir)["grad_norm/pre"]
    assert [step for step, _ in curve] == [*range(3 * BATCHES - 1)]


# Refusals and warnings


class Engine(SingleDeviceStrategy):
    handles_gradient_accumulation = True


def half_differentiable() -> Any:
    """Return a module with two optimizers, the second of which is refused."""
    module = lightning.adversarial()
    optimizers = module.nets.optimizers_of()
    optimizers[1].param_groups[0]["differentiable"] = True
    module.configure_optimizers = lambda: optimizers
    return module


LATER = pl.callbacks.LambdaCallback(
    on_fit_start=lambda trainer, module: setattr(trainer, "gradient_clip_val", 0.5)
)
WITHIN = lightning.replacing("on_before_backward", 3)
SCALED = MixedPrecision("16-mixed", "cpu")
APART = {"log": [MemorySink()], "joint": False}
CLIPS = "gradient_clip_val=0.5 and a GradClipCallback"
ENGINE = "Engine takes the steps in an engine of its own"
UPDATES = "Lightning updates after the step of each optimizer"
REFUSED = [
    ({"gradient_clip_val": 0.5}, ArgumentError, CLIPS),
    ({"gradient_clip_algorithm": "value"}, ArgumentError, "algorithm='value' and a GradClip"),
    ({"others": [LATER]}, ArgumentError, CLIPS),
    ({"strategy": Engine("cpu")}, AttachError, ENGINE),
    ({"made": lightning.halves, "plugins": [SCALED]}, AttachError, UPDATES),
    ({"made": lightning.adversarial, "given": APART}, ArgumentError, "2 optimizers with a clipper"),
    ({"made": lightning.stepping, "others": [WITHIN]}, AttachError, "added within a batch"),
    ({"made": half_differentiable, "given": {"joint": False}}, AttachError, "differentiable"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refusals(options, error, message):
    """A fit ends with an error before anything is clipped wrongly, and leaves optimizers free."""
    options = dict(options)
    module = options.pop("made", lightning.regression)()
    callback = GradClipCallback(THRESHOLD, **{"joint": True, **options.pop("given", {})})
    with pytest.raises(error, match=message):
        fit(module, *options.pop("others", ()), callback, **options)
    assert all(clipper.steps <= 3 for clipper in callback.clippers)
    for optimizer in module.trainer.optimizers[:1]:
        trainings.assert_free(optimizer)


def test_invalid_states():
    """Those of other clippers are refused when a fit starts, and others at once."""
    fit(lightning.adversarial(), callback := GradClipCallback(THRESHOLD))
    callback.load_state_dict(callback.state_dict())
    with pytest.raises(StateError, match="of 2 clippers, and there are 1"):
        fit(lightning.regression(), callback)
    with pytest.raises(StateError, match="needed is the key 'clippers'"):
        callback.load_state_dict({"steps": 3})


# Modules that clip by themselves


def clips(self: Any, optimizer: Any, **_: Any) -> None:
    self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


OVERRIDING = {"configure_gradient_clipping": clips}
CLIPPING = [
    (OVERRIDING, "Regression overrides configure_gradient_clipping"),
    (lightning.manual_steps(limit=0.1), "Regression writes to its gradients between"),
]


@pytest.mark.parametrize(("overrides", "message"), CLIPPING)
def test_a_module_that_clips(package, overrides, message):
    """It gets one warning: the gradients were clipped before they were measured."""
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    with pytest.warns(UserWarning, match=message) as caught:
        fit(lightning.regression(package, **overrides), callback, package=package)
    assert len([each for each in caught if message in str(each.message)]) == 1
    assert max(trainings.norms_of(sink)) == pytest.approx(0.1, rel=1e-3)


def test_a_module_that_steps_by_hand():
    """It gets no warning, also with a method that Lightning never calls then, and is clipped."""
    never = {"configure_gradient_clipping": lambda *_, **__: pytest.fail("it was called")}
    fit(module := lightning.stepping(**never), GradClipCallback(THRESHOLD))
    trainings.assert_close(module.net, by_hand()[0])


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
def test_a_configuration(tmp_path, package, monkeypatch):
    """It takes all options of a clipper; labels have the names of the module."""
    cli = importlib.import_module(f"{package.__name__}.cli").LightningCLI
    (tmp_path / "config.yaml").write_text(CONFIGURATION)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    options = {"seed_everything_default": 0, "run": False, "save_config_callback": None}
    ran = cli(type(lightning.regression(package)), **options)
    [callback] = [each for each in ran.trainer.callbacks if isinstance(each, GradClipCallback)]
    ran.trainer.fit(ran.model, loader())
    [clipper] = callback.clippers
    assert repr(callback._threshold) == "Percentile(50.0, window=1000)"
    assert callback._options["nonfinite"] == "skip"
    assert callback._options["skip_limit"] == 7
    assert clipper.labels == tuple(name for name, _ in ran.model.named_parameters())

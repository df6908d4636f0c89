"""The callback in Trainers of both packages, against the same training by hand, and its logs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.data import DistributedSampler

import gradclip
from gradclip import GradientClipper, MemorySink, Threshold
from gradclip.integrations.lightning import GradClipCallback
from gradclip.thresholds import Percentile, StepContext
from tests.support import lightning, trainings
from tests.support.lightning import fit
from tests.support.trainings import BATCHES, THRESHOLD, by_hand, loader

pytestmark = lightning.IGNORED

# Automatic optimization


def test_either_package(package):
    """A run equals one by hand, in a Trainer of either package."""
    callback, module = (
        GradClipCallback(THRESHOLD, log=(sink := MemorySink())),
        lightning.regression(package),
    )
    trainer = fit(module, callback, package=package, max_epochs=2)
    expected, norms = by_hand(epochs=2)
    trainings.assert_close(module.net, expected)
    trainings.assert_unlike(module.net, by_hand(epochs=2, threshold=math.inf)[0])
    assert trainings.norms_of(sink) == pytest.approx(norms, rel=1e-4)
    assert max(module.after) <= THRESHOLD * (1 + 1e-6) < max(norms)
    [clipper] = callback.clippers
    assert clipper.steps == trainer.global_step == 2 * BATCHES
    assert 0.2 < clipper.clip_rate() < 0.8


WAYS = {
    "two batches a step": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "three batches a step": ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "bfloat16": ({"precision": "bf16-mixed"}, {"bf16": True}),
    "validation within": ({"val_check_interval": 3}, {}),
    "gradient_clip_val=0": ({"gradient_clip_val": 0}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(way):
    """Each step is clipped once, and its norm is the true one."""
    options, same = WAYS[way]
    callback, module = (
        GradClipCallback(THRESHOLD, log=(sink := MemorySink())),
        lightning.evaluated(),
    )
    trainer = lightning.trainer_of(callback, **options)
    trainer.fit(module, loader(), loader())
    expected, norms = by_hand(**same)
    trainings.assert_close(module.net, expected)
    trainings.assert_unlike(module.net, by_hand(**same, threshold=math.inf)[0])
    assert trainings.norms_of(sink) == pytest.approx(norms, rel=1e-4)
    assert callback.clippers[0].steps == trainer.global_step == len(norms)


def quasi_newton(net: nn.Module) -> Optimizer:
    return LBFGS(net.parameters(), lr=0.1, max_iter=3)


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


def test_grad_scaler():
    """Norms are true, and overflows do not count."""
    made = {"init_scale": 2.0**127, "backoff_factor": 2.0**-60}
    scaler, scaler_by_hand = (torch.amp.GradScaler("cpu", **made) for _ in range(2))
    callback, module = (
        GradClipCallback(THRESHOLD, log=(sink := MemorySink())),
        lightning.regression(),
    )
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.forward_context = torch.enable_grad  # scaled as in float16, computed in float32
    trainer = fit(module, callback, plugins=[precision])
    net, norms = trainings.net_of(), []
    optimizer = trainings.momentum(net)
    for batch in loader():
        optimizer.zero_grad()
        scaler_by_hand.scale(trainings.loss_of(net, batch)).backward()
        scaler_by_hand.unscale_(optimizer)
        norm = float(nn.utils.clip_grad_norm_(net.parameters(), THRESHOLD))
        norms += [norm] if math.isfinite(norm) else []
        scaler_by_hand.step(optimizer)
        scaler_by_hand.update()
    trainings.assert_close(module.net, net)
    assert trainings.norms_of(sink) == pytest.approx(norms, rel=1e-4)
    assert callback.clippers[0].steps == len(norms) < trainer.global_step == BATCHES
    assert scaler.get_scale() == scaler_by_hand.get_scale() > 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert [step.step for step in sink.steps] == [*range(len(norms) + BATCHES)]


# Several optimizers under manual optimization


def adversaries_by_hand(*rules: Any) -> tuple[lightning.Adversaries, list[GradientClipper]]:
    nets = lightning.Adversaries()
    optimizers = nets.optimizers_of()
    clippers = [GradientClipper(*pair) for pair in zip(optimizers, rules, strict=True)]
    for batch in loader():
        for optimizer, loss in zip(optimizers, nets.losses(batch), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for clipper in clippers:
        clipper.close()
    return nets, clippers


@pytest.mark.parametrize("step_with_closure", [False, True])
def test_several_optimizers(step_with_closure):
    """Each has a clipper, with a copy of the rule that learns for itself."""
    rule = Percentile(50, window=5)
    callback, module = GradClipCallback(rule), lightning.adversarial(step_with_closure)
    trainer = fit(module, callback)
    nets, clippers = adversaries_by_hand(Percentile(50, window=5), Percentile(50, window=5))
    trainings.assert_close(module.nets, nets)
    states = [clipper.state_dict() for clipper in callback.clippers]
    assert repr(states) == repr([clipper.state_dict() for clipper in clippers])
    assert repr(states[0]["threshold"]) != repr(states[1]["threshold"])
    assert [clipper.steps for clipper in callback.clippers] == [BATCHES] * 2
    assert trainer.global_step == 2 * BATCHES
    assert not rule.state


class Largest(Threshold):
    """A rule with a state that it has from its beginning."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        return torch.full_like(norms, max(self.norms, default=math.inf))

    def observe(self, norms: Tensor, clipped_norms: Tensor, context: StepContext) -> None:
        self.norms += norms.tolist()


def test_a_rule_of_ones_own():
    """It is copied with its state."""
    rule, module = Largest(), lightning.adversarial()
    fit(module, GradClipCallback(rule))
    trainings.assert_close(module.nets, adversaries_by_hand(Largest(), Largest())[0])
    assert rule.norms == []


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

NAMES = {
    f"grad_norm/{name}"
    for name in ("pre", "post", "threshold", "clip_rate", "nonfinite_steps", "skipped_steps")
}


def test_loggers(tmp_path):
    """The loggers of the trainer get the numbers of its steps."""
    loggers = [TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")]
    callback = GradClipCallback(THRESHOLD, log=[True, sink := MemorySink()])
    fit(lightning.regression(), callback, logger=loggers, log_every_n_steps=2, max_epochs=2)
    curves, rows = lightning.scalars_in(loggers[0].log_dir), lightning.rows_in(loggers[1].log_dir)
    expected = sink.steps[::2]
    assert len(sink.steps) == 2 * BATCHES
    assert {*curves} == NAMES <= {*rows[0]}
    pre = [(step.step, pytest.approx(step.norm, rel=1e-6)) for step in expected]
    post = [(step.step, pytest.approx(step.clipped_norm, rel=1e-6)) for step in expected]
    assert (curves["grad_norm/pre"], curves["grad_norm/post"]) == (pre, post)
    table = [(int(row["step"]), float(row["grad_norm/pre"])) for row in rows]
    assert table == [(step.step, step.norm) for step in expected]


@pytest.mark.parametrize(
    ("every", "every_of_trainer", "steps"), [(3, 1, [0, 3, 6]), (None, 0, []), (None, 5, [0, 5])]
)
def test_every(tmp_path, every, every_of_trainer, steps):
    """The option, or the trainer, says which steps the loggers get."""
    logger = TensorBoardLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": every_of_trainer}
    fit(lightning.regression(), GradClipCallback(THRESHOLD, every=every), **options)
    curve = lightning.scalars_in(logger.log_dir).get("grad_norm/pre", [])
    assert [step for step, _ in curve] == steps


def test_the_end_of_an_epoch():
    """The steps so far are written then."""

    class Looks(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            counts.append(len(sink.steps))

    counts: list[int] = []
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    fit(lightning.regression(), callback, Looks(), max_epochs=3)
    assert counts == [0, BATCHES, 2 * BATCHES]


def test_logs_of_several_clippers(tmp_path):
    """They have curves of their own."""
    loggers = [TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")]
    callback = GradClipCallback(THRESHOLD, every=1)
    fit(lightning.adversarial(), callback, logger=loggers)
    curves, rows = lightning.scalars_in(loggers[0].log_dir), lightning.rows_in(loggers[1].log_dir)
    second = {name.replace("grad_norm", "grad_norm_2") for name in NAMES}
    assert {*curves} == NAMES | second <= {*rows[0]}
    assert curves["grad_norm/pre"] != curves["grad_norm_2/pre"]
    for prefix, clipper in zip(("grad_norm", "grad_norm_2"), callback.clippers, strict=True):
        assert curves[f"{prefix}/pre"][-1] == pytest.approx((7, clipper.last.norm.item()))


@pytest.mark.parametrize("log", ["own", None])
def test_logs_of_ones_own(tmp_path, log):
    """A directory gets all steps, None logs nothing, and the trainer's loggers get none."""
    logger, log = TensorBoardLogger(tmp_path), log and str(tmp_path / log)
    fit(
        lightning.regression(),
        GradClipCallback(THRESHOLD, log=log),
        logger=logger,
        log_every_n_steps=1,
    )
    assert lightning.scalars_in(logger.log_dir) == {}
    assert log is None or len(lightning.scalars_in(log)["grad_norm/pre"]) == BATCHES


def test_a_logger_of_several_fits(tmp_path):
    """A second fit and a resumed one continue its curves."""
    options = {"logger": TensorBoardLogger(tmp_path), "log_every_n_steps": 1}
    trainer = fit(module := lightning.regression(), GradClipCallback(THRESHOLD), **options)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    options |= {"max_epochs": 3, "resume": str(tmp_path / "a.ckpt")}
    fit(module, GradClipCallback(THRESHOLD), **options)
    curve = lightning.scalars_in(options["logger"].log_dir)["grad_norm/pre"]
    assert [step for step, _ in curve] == [*range(3 * BATCHES)]


def test_fast_dev_run(tmp_path, monkeypatch):
    """It clips, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    callback, module = GradClipCallback(THRESHOLD), lightning.regression()
    fit(module, callback, fast_dev_run=4, logger=True)
    assert callback.clippers[0].steps == 4
    assert max(module.after) <= THRESHOLD * (1 + 1e-6)
    assert not [*tmp_path.rglob("events*")]


# Processes

SCRIPT = """
import json, sys
import lightning.pytorch as pl, torch
from tests.support import lightning, trainings
from gradclip import JsonlSink
from gradclip.integrations.lightning import GradClipCallback

torch.set_num_threads(1)
class Loader(pl.LightningDataModule):
    def train_dataloader(self):
        return trainings.loader()

def shard(self):
    from torch.distributed.fsdp import fully_shard
    fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()

path, strategy, overrides = sys.argv[1], "ddp", {}
if sys.argv[2] == "fsdp2":
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    overrides = dict(configure_model=shard, on_train_batch_end=lambda *_: None)
module = lightning.regression(**overrides)
logger = pl.loggers.CSVLogger(path)
log = [True, JsonlSink(path + "/steps.jsonl"), path + "/board"]
callback = GradClipCallback(trainings.rule_of(), log=log, every=1)
options = dict(strategy=strategy, devices=2, logger=logger)
trainer = lightning.trainer_of(callback, **options)
trainer.fit(module, Loader())
kept = dict(
    weights=torch.cat([whole(p).flatten() for p in module.net.parameters()]).tolist(),
    state=repr(callback.state_dict()),
    steps=[callback.clippers[0].steps, trainer.global_step],
    folder=logger.log_dir,
)
open(f"{path}/rank{trainer.global_rank}.json", "w").write(json.dumps(kept))
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes(strategy, tmp_path):
    """They agree, and the first one logs."""
    script, root = tmp_path / "train.py", str(Path(gradclip.__file__).parents[1])
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(script), str(tmp_path), strategy]
    subprocess.run(command, env=environment, timeout=240, check=True, cwd=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    steps = BATCHES // 2
    for key in ("weights", "state", "steps"):
        assert first[key] == second[key]
    assert first["steps"] == [steps, steps]

    assert len(lightning.rows_in(first["folder"])) == steps
    assert len(lightning.scalars_in(tmp_path / "board")["grad_norm/pre"]) == steps
    assert len([*(tmp_path / "board").iterdir()]) == 1
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    norms = [json.loads(line)["norm"] for line in lines]

    # Gradients are means over both ranks, whose samples Lightning shuffles.
    net, samples = trainings.net_of(), loader().dataset
    dealt = [[*DistributedSampler(samples, 2, rank)] for rank in (0, 1)]
    optimizer = trainings.momentum(net)
    with GradientClipper(optimizer, trainings.rule_of()) as clipper:
        for index in range(steps):
            batch = slice(trainings.SIZE * index, trainings.SIZE * (index + 1))
            losses = [trainings.loss_of(net, samples[order[batch]]) for order in dealt]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
            assert norms[index] == pytest.approx(clipper.last.norm.item(), rel=1e-4)
        assert 0 < clipper.clip_rate() < 1
    weights = trainings.values(net).tolist()
    assert first["weights"] == pytest.approx(weights, rel=1e-4, abs=1e-6)

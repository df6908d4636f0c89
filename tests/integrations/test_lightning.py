"""The callback in Trainers of both packages, against the same training by hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.data import DistributedSampler

import gradclip
from gradclip import (
    ArgumentError,
    AttachError,
    GradientClipper,
    JsonlSink,
    MemorySink,
    Threshold,
)
from gradclip.integrations.lightning import GradClipCallback
from gradclip.thresholds import Percentile, StepContext
from tests.integrations.lightning_runs import (
    BATCHES,
    IGNORED,
    SIZE,
    THRESHOLD,
    Adversaries,
    adversarial,
    assert_close,
    assert_unlike,
    batches,
    by_hand,
    data,
    halves,
    loss_of,
    momentum,
    net_of,
    norm64,
    norms_of,
    regression,
    rows_in,
    rule_of,
    scalars_in,
    trainer_of,
    values,
)

pytestmark = [*IGNORED, pytest.mark.usefixtures("nothing_stays_attached")]


# Automatic optimization


def test_a_run_equals_one_by_hand(package):
    sink = MemorySink()
    callback, module = GradClipCallback(THRESHOLD, log=sink), regression(package)
    trainer = trainer_of(callback, package=package, max_epochs=2)
    trainer.fit(module, data())
    theirs, norms = by_hand(epochs=2)
    assert_close(module.net, theirs)
    assert_unlike(module.net, by_hand(epochs=2, clip=False)[0])
    assert norms_of(sink) == pytest.approx(norms, rel=1e-4)
    assert max(module.after) <= THRESHOLD * (1 + 1e-6) < max(norms)
    [clipper] = callback.clippers
    assert clipper.steps == trainer.global_step == 2 * BATCHES
    assert 0.2 < clipper.clip_rate() < 0.8


def test_one_callback_without_a_list_is_taken_by_either_trainer(package):
    callback = GradClipCallback(THRESHOLD)
    trainer = package.Trainer(
        accelerator="cpu", callbacks=callback, fast_dev_run=2, enable_model_summary=False
    )
    trainer.fit(regression(package), data())
    assert callback.clippers[0].steps == 2


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_are_clipped_once(accumulate):
    sink = MemorySink()
    callback, module = GradClipCallback(THRESHOLD, log=sink), regression()
    trainer = trainer_of(callback, accumulate_grad_batches=accumulate)
    trainer.fit(module, data())
    theirs, norms = by_hand(accumulate=accumulate)
    assert_close(module.net, theirs)
    assert norms_of(sink) == pytest.approx(norms, rel=1e-4)
    assert callback.clippers[0].steps == trainer.global_step == len(norms)
    assert min(norms) > THRESHOLD
    assert_unlike(module.net, by_hand(accumulate=accumulate, clip=False)[0])


def quasi_newton(net: nn.Module) -> Optimizer:
    return LBFGS(net.parameters(), lr=0.1, max_iter=3)


def test_every_evaluation_of_lbfgs_is_clipped():
    module = regression(configure_optimizers=lambda self: quasi_newton(self.net))
    # In float64, as the method makes much of a rounding.
    trainer_of(GradClipCallback(THRESHOLD), precision="64-true").fit(module, data())
    net = net_of().double()
    optimizer, norms = quasi_newton(net), []
    for index, (inputs, targets) in enumerate(batches()):
        batch = inputs.double(), targets.double()

        def closure(index: int = index, batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, batch, index)
            loss.backward()
            norms.append(gradclip.clip_grad_norm_(net.parameters(), THRESHOLD).item())
            return loss

        optimizer.step(closure)
    assert_close(module.net, net)
    assert len(norms) > BATCHES
    assert max(norms) > THRESHOLD


def test_bfloat16_autocast_equals_one_by_hand():
    sink = MemorySink()
    module = regression()
    trainer_of(GradClipCallback(THRESHOLD, log=sink), precision="bf16-mixed").fit(module, data())
    net, norms = net_of(), []
    optimizer = momentum(net)
    for index, batch in enumerate(batches()):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(net, batch, index)
        loss.backward()
        norms.append(norm64(net))
        nn.utils.clip_grad_norm_(net.parameters(), THRESHOLD)
        optimizer.step()
    assert_close(module.net, net)
    assert norms_of(sink) == pytest.approx(norms, rel=1e-4)
    assert norms != pytest.approx(by_hand()[1], rel=1e-4)


def scaler_of() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)


def test_under_a_grad_scaler_norms_are_true_and_overflows_are_not_counted():
    scaler, sink = scaler_of(), MemorySink()
    callback, module = GradClipCallback(THRESHOLD, log=sink), regression()
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.forward_context = torch.enable_grad  # scaled as in float16, computed in float32
    trainer = trainer_of(callback, plugins=[precision])
    trainer.fit(module, data())
    net, norms, theirs = net_of(), [], scaler_of()
    optimizer = momentum(net)
    for index, batch in enumerate(batches()):
        optimizer.zero_grad()
        theirs.scale(loss_of(net, batch, index)).backward()
        theirs.unscale_(optimizer)
        norm = float(nn.utils.clip_grad_norm_(net.parameters(), THRESHOLD))
        norms += [norm] if math.isfinite(norm) else []
        theirs.step(optimizer)
        theirs.update()
    assert_close(module.net, net)
    assert norms_of(sink) == pytest.approx(norms, rel=1e-4)
    assert callback.clippers[0].steps == len(norms) < trainer.global_step == BATCHES
    assert scaler.get_scale() == theirs.get_scale() > 1
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    assert [step.step for step in sink.steps] == [*range(len(norms) + BATCHES)]


# Several optimizers under manual optimization


def adversaries_by_hand(rules: list[Any]) -> tuple[Adversaries, list[GradientClipper]]:
    nets = Adversaries()
    optimizers = nets.optimizers_of()
    clippers = [GradientClipper(*each) for each in zip(optimizers, rules, strict=True)]
    for index, batch in enumerate(batches()):
        for optimizer, loss in zip(optimizers, nets.losses(batch, index), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for clipper in clippers:
        clipper.close()
    return nets, clippers


@pytest.mark.parametrize("step_with_closure", [False, True])
def test_several_optimizers_have_a_clipper_each_with_a_rule_of_its_own(step_with_closure):
    rule = Percentile(50, window=5)
    callback, module = GradClipCallback(rule), adversarial(step_with_closure)
    trainer = trainer_of(callback)
    trainer.fit(module, data())
    nets, clippers = adversaries_by_hand([Percentile(50, window=5) for _ in range(2)])
    assert_close(module.nets, nets)
    found = [clipper.state_dict() for clipper in callback.clippers]
    assert repr(found) == repr([clipper.state_dict() for clipper in clippers])
    assert repr(found[0]["threshold"]) != repr(found[1]["threshold"])
    assert [clipper.steps for clipper in callback.clippers] == [BATCHES] * 2
    assert trainer.global_step == 2 * BATCHES
    assert not rule.state


class Largest(Threshold):
    """A rule with a state that it has from its beginning."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        return torch.full_like(norms, max(self.seen, default=math.inf))

    def observe(self, norms: Tensor, clipped_norms: Tensor, context: StepContext) -> None:
        self.seen += norms.tolist()


def test_a_rule_of_ones_own_is_copied_with_what_it_has_learned():
    rule, module = Largest(), adversarial()
    trainer_of(GradClipCallback(rule)).fit(module, data())
    assert_close(module.nets, adversaries_by_hand([Largest(), Largest()])[0])
    assert rule.seen == []


def test_joint_optimizers_share_one_norm():
    sink = MemorySink()
    callback, module = GradClipCallback(THRESHOLD, log=sink, joint=True), halves()
    trainer_of(callback).fit(module, data())
    theirs, norms = by_hand()
    assert_close(module.net, theirs)
    assert norms_of(sink) == pytest.approx(norms, rel=1e-4)
    assert [clipper.steps for clipper in callback.clippers] == [BATCHES]
    apart = halves()
    trainer_of(GradClipCallback(THRESHOLD)).fit(apart, data())
    assert_unlike(apart.net, theirs)


def test_joint_optimizers_under_a_grad_scaler_are_refused():
    trainer = trainer_of(
        GradClipCallback(THRESHOLD, joint=True), plugins=[MixedPrecision("16-mixed", "cpu")]
    )
    with pytest.raises(AttachError, match="Lightning updates after the step of each optimizer"):
        trainer.fit(halves(), data())


def test_a_sink_for_several_clippers_is_refused(tmp_path):
    trainer = trainer_of(GradClipCallback(THRESHOLD, log=[JsonlSink(tmp_path / "steps")]))
    with pytest.raises(ArgumentError, match="2 optimizers with a clipper each"):
        trainer.fit(adversarial(), data())


def test_an_optimizer_that_is_refused_leaves_the_others_free():
    module = adversarial()
    optimizers = module.nets.optimizers_of()
    optimizers[1].param_groups[0]["differentiable"] = True
    module.configure_optimizers = lambda: optimizers
    callback = GradClipCallback(THRESHOLD)
    with pytest.raises(AttachError, match="differentiable"):
        trainer_of(callback).fit(module, data())
    assert callback.clippers == []
    GradientClipper(optimizers[0], 1.0).close()


def test_parameters_have_the_names_of_the_module():
    callback = GradClipCallback(THRESHOLD, scope="parameter")
    module = regression()
    trainer_of(callback).fit(module, data())
    assert callback.clippers[0].labels == tuple(name for name, _ in module.named_parameters())


# Processes

SCRIPT = """
import json, sys
import lightning.pytorch as pl, torch
sys.path.insert(0, {folder!r})
import lightning_runs as here
from gradclip import JsonlSink
from gradclip.integrations.lightning import GradClipCallback

torch.set_num_threads(1)
class Loader(pl.LightningDataModule):
    def train_dataloader(self):
        return here.data()

def shard(self):
    from torch.distributed.fsdp import fully_shard
    fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

def whole(parameter):
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()

path, strategy, overrides = {path!r}, "ddp", {{}}
if {sharded}:
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    overrides = dict(configure_model=shard)
module = here.regression(**overrides)
logger = pl.loggers.CSVLogger(path)
log = [True, JsonlSink(path + "/steps.jsonl"), path + "/board"]
callback = GradClipCallback(here.rule_of(), log=log, every=1)
trainer = here.trainer_of(callback, strategy=strategy, devices=2, logger=logger)
trainer.fit(module, Loader())
kept = dict(
    weights=torch.cat([whole(p).flatten() for p in module.net.parameters()]).tolist(),
    state=repr(callback.state_dict()),
    steps=[callback.clippers[0].steps, trainer.global_step],
    folder=logger.log_dir,
)
open(f"{{path}}/rank{{trainer.global_rank}}.json", "w").write(json.dumps(kept))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_agree_and_the_first_one_logs(sharded, tmp_path):
    script, folder = tmp_path / "train.py", str(Path(__file__).parent)
    script.write_text(SCRIPT.format(folder=folder, path=str(tmp_path), sharded=sharded))
    root = str(Path(gradclip.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(
        [sys.executable, str(script)], env=environment, timeout=240, check=True, cwd=tmp_path
    )
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    steps = BATCHES // 2
    assert first["weights"] == second["weights"]
    assert first["state"] == second["state"]
    assert first["steps"] == second["steps"] == [steps, steps]

    # Gradients are means over both ranks, whose samples Lightning shuffles.
    net, samples = net_of(), data().dataset
    dealt = [[*DistributedSampler(samples, 2, rank)] for rank in (0, 1)]
    optimizer, norms = momentum(net), []
    with GradientClipper(optimizer, rule_of()) as clipper:
        for index in range(steps):
            optimizer.zero_grad()
            for order in dealt:
                batch = samples[order[SIZE * index : SIZE * (index + 1)]]
                (loss_of(net, batch, index) / 2).backward()
            optimizer.step()
            norms.append(clipper.last.norm.item())
        assert 0 < clipper.clip_rate() < 1
    assert first["weights"] == pytest.approx(values(net).tolist(), rel=1e-4, abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    assert len(rows_in(first["folder"])) == steps
    assert len(scalars_in(tmp_path / "board")["grad_norm/pre"]) == steps
    assert len([*(tmp_path / "board").iterdir()]) == 1

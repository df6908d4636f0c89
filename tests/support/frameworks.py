"""The same training in each framework, as it is configured there."""

import importlib
import math
import os
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from gradclip import GradientClipper
from tests.support import trainings


class Way(NamedTuple):
    """How to train; see `tests.support.trainings.by_hand`."""

    epochs: int = 1
    accumulate: int = 1
    bf16: bool = False
    scaler: Any = None
    processes: int = 1


def by_lightning(
    folder: Any, clipping: Any, way: Way, package: str = "lightning.pytorch", **overrides: Any
) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    from gradclip.integrations.lightning import GradClipCallback
    from tests.support import lightning

    options = {"max_epochs": way.epochs, "accumulate_grad_batches": way.accumulate}
    options |= {"precision": "bf16-mixed" if way.bf16 else None, "gradient_clip_val": 0}
    batches = trainings.loader()
    if way.scaler is not None:
        options["plugins"] = [lightning.precision_of(way.scaler)]
    if way.processes > 1:
        samples, rank = batches.dataset, int(os.environ["RANK"])
        dealt = DistributedSampler(samples, way.processes, rank, shuffle=False)
        batches = DataLoader(samples, trainings.SIZE // way.processes, sampler=dealt)
        options |= {"use_distributed_sampler": False, "devices": way.processes}
        options |= {"strategy": overrides.pop("strategy", "ddp"), "log_every_n_steps": 1}
        options["logger"] = CSVLogger(folder, "table", "")
        clipping = clipping | {"log": [True, clipping["log"], f"{folder}/board"]}
    callback, library = GradClipCallback(**clipping), importlib.import_module(package)
    module = lightning.evaluated(library, **overrides)
    trainer = lightning.trainer_of(callback, package=library, val_check_interval=3, **options)
    trainer.fit(module, batches, trainings.loader())
    [clipper] = callback.clippers
    assert trainer.global_step == clipper.steps + (way.scaler is not None)
    return module.net, clipper


def by_fsdp2(folder: Any, clipping: Any, way: Way) -> Any:
    """Train in Lightning with FSDP2; return the whole weights."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    def shard(module: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module.net, mesh=module.device_mesh["data_parallel"])

    strategy = ModelParallelStrategy(data_parallel_size=way.processes, tensor_parallel_size=1)
    overrides = {"configure_model": shard, "on_train_batch_end": lambda *_: None}
    net, clipper = by_lightning(folder, clipping, way, strategy=strategy, **overrides)
    return nn.ParameterList([p.full_tensor() for p in net.parameters()]), clipper


def by_transformers(folder: Any, clipping: Any, way: Way) -> Any:
    from gradclip.integrations.transformers import GradClipCallback
    from tests.support import transformers

    trainer = transformers.hf_trainer(
        folder,
        callback := GradClipCallback(**clipping),
        max_steps=math.ceil(trainings.BATCHES * way.epochs / way.accumulate),
        gradient_accumulation_steps=way.accumulate,
        bf16=way.bf16,
        per_device_train_batch_size=trainings.SIZE // way.processes,
        ddp_backend="gloo" if way.processes > 1 else None,
    )
    if way.scaler is not None:
        trainer.accelerator.scaler = way.scaler
    trainer.train()
    trainings.assert_free(trainer.optimizer)
    return trainer.model.net, callback.clipper


def by_accelerate(folder: Any, clipping: Any, way: Way, kind: str = "") -> Any:
    """Train in Accelerate, where the clipper has the wrapper, or the optimizer inside."""
    from accelerate import Accelerator

    precision = "bf16" if way.bf16 else "no"
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=way.accumulate, mixed_precision=precision
    )
    accelerator.scaler = way.scaler
    net, batches = trainings.net_of(), trainings.loader(trainings.SIZE // way.processes)
    inner = trainings.momentum(net)
    early = kind == "before prepare" and GradientClipper(inner, **clipping)
    net, optimizer, batches = accelerator.prepare(net, inner, batches)
    clipper = early or GradientClipper(inner if kind == "inner" else optimizer, **clipping)
    for batch in [*batches] * way.epochs:
        with accelerator.accumulate(net), accelerator.autocast():
            accelerator.backward(trainings.loss_of(net, batch))
            if kind == "unscaling":
                way.scaler.unscale_(optimizer.optimizer)
            optimizer.step()
            optimizer.zero_grad()
    clipper.close()
    return net, clipper


KINDS = ("unscaling", "inner", "before prepare")
TRAININGS = {
    "lightning": by_lightning,
    "pytorch_lightning": partial(by_lightning, package="pytorch_lightning"),
    "transformers": by_transformers,
    "accelerate": by_accelerate,
    **{f"accelerate {kind}": partial(by_accelerate, kind=kind) for kind in KINDS},
    "lightning fsdp2": by_fsdp2,
}
"""By the package that they need, and how it is used. Each returns the network and the clipper."""

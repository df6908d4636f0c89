"""Other packages for clipping, each used if it is installed.

pip install --no-deps autoclip zclip smartclip timm
pip install lightning accelerate
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

import gradclip
from benchmarks.common.gradients import Gradients, Still
from benchmarks.common.shapes import SETS
from benchmarks.common.timing import interleaved_medians
from gradclip.thresholds import (
    Percentile,
    Quantile,
    RelativeToWeights,
    StepContext,
    Threshold,
    ZScore,
)

Step = Callable[[], object]
Optimizers = list[Any]


class Model(nn.Module):
    """A module around parameters: some packages take no parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameters)


@dataclass
class Clipping:
    """A package's clipping of some parameters; a call clips.

    Args:
        clip: Clips the current gradients, and may return the norm.
        clip_and_norm: Clips and returns the norm, for a package that keeps it elsewhere. None if
            `clip` returns the norm or the package has none.
        state: The object with the state dict; None without one.
        attach: Returns optimizers whose steps clip, given optimizers; None if the package has no
            such thing.
        steps: True if `clip` is a whole step of the optimizer.
    """

    clip: Step
    clip_and_norm: Step | None = None
    state: Any = None
    attach: Callable[[Optimizers], Optimizers | None] = lambda optimizers: None
    steps: bool = False

    def __call__(self) -> object:
        """Clip."""
        return self.clip()

    def with_step_of(self, optimizer: Optimizer) -> Step:
        """Return a call that clips and takes a step, of this optimizer if `clip` takes none."""
        return self.clip if self.steps else lambda: (self.clip(), optimizer.step())

    def norm(self) -> float | None:
        """Clip and return the norm that the package reports; None without one."""
        norm: Any = (self.clip_and_norm or self.clip)()
        return None if norm is None else float(norm)


MakeFixed = Callable[[list[Optimizer], float, GradScaler | None], Clipping]


def autoclip_quantile(parameters: list[nn.Parameter]) -> Clipping:
    """Return autoclip's percentile 10 of the last 1000 norms, over all parameters."""
    package = importlib.import_module("autoclip.torch")
    clipper = package.QuantileClip(
        parameters, quantile=0.1, history_length=1000, global_threshold=True
    )
    wrapper = importlib.import_module("autoclip.torch.clipper").OptimizerWithClipping

    def clip_and_norm() -> object:
        clipper.step()
        return clipper.state["global_history"][-1]

    def attach(optimizers: Optimizers) -> Optimizers | None:
        return [wrapper(optimizers[0], clipper)] if len(optimizers) == 1 else None

    return Clipping(clipper.step, clip_and_norm, clipper, attach)


def zclip(parameters: list[nn.Parameter]) -> Clipping:
    """Return the z-score rule of ZClip's authors."""
    clipper, model = importlib.import_module("zclip").ZClip(), Model(parameters)
    return Clipping(lambda: clipper.step(model), state=_stateful(clipper))


def smartclip_autoclip(parameters: list[nn.Parameter]) -> Clipping:
    """Return smartclip's percentile 10, tracked with one number, over all parameters."""
    return _smartclip(
        parameters,
        lambda core: core.AutoClip(mode="percentile", percentile=10.0, scope="global"),
    )


def smartclip_zscore(parameters: list[nn.Parameter]) -> Clipping:
    """Return smartclip's z-score rule, over all parameters."""
    return _smartclip(parameters, lambda core: core.ZScoreClip(scope="global"))


def timm_agc(parameters: list[nn.Parameter]) -> Clipping:
    """Return timm's AGC. Its file is loaded alone: timm itself needs torchvision."""
    file = Path(str(distribution("timm").locate_file("timm/utils/agc.py")))
    spec = importlib.util.spec_from_file_location("timm_agc", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Clipping(lambda: module.adaptive_clip_grad(parameters))


PEERS: dict[str, Callable[[list[nn.Parameter]], Clipping]] = {
    "autoclip QuantileClip": autoclip_quantile,
    "zclip ZClip": zclip,
    "smartclip AutoClip": smartclip_autoclip,
    "smartclip ZScoreClip": smartclip_zscore,
    "timm adaptive_clip_grad": timm_agc,
}
"""Packages with rules for their thresholds."""


def torch_plain(
    optimizers: list[Optimizer], max_norm: float, scaler: GradScaler | None
) -> Clipping:
    """Return torch's clipping."""
    parameters = parameters_of(optimizers)
    return Clipping(lambda: nn.utils.clip_grad_norm_(parameters, max_norm))


def torch_compiled(
    optimizers: list[Optimizer],
    max_norm: float,
    scaler: GradScaler | None,
    backend: str = "inductor",
) -> Clipping:
    """Return torch's clipping compiled. Earlier compiled code is discarded."""
    parameters = parameters_of(optimizers)
    torch.compiler.reset()
    # Objects freed while a graph is traced may run torch operators, which would be traced too.
    gc.collect()
    return Clipping(
        torch.compile(lambda: nn.utils.clip_grad_norm_(parameters, max_norm), backend=backend)
    )


def lightning(optimizers: list[Optimizer], max_norm: float, scaler: GradScaler | None) -> Clipping:
    """Return the clipping of Lightning's Fabric, one optimizer at a time."""
    plugins = importlib.import_module("lightning.fabric.plugins")
    precision = scaler and plugins.MixedPrecision("16-mixed", "cpu", scaler)
    fabric = importlib.import_module("lightning.fabric").Fabric(
        accelerator="cpu", devices=1, plugins=precision
    )
    model = Model(parameters_of(optimizers))

    def clip() -> object:
        for optimizer in optimizers:
            norm = fabric.clip_gradients(model, optimizer, max_norm=max_norm)
        return norm

    return Clipping(clip)


def accelerate(optimizers: list[Optimizer], max_norm: float, scaler: GradScaler | None) -> Clipping:
    """Return Accelerate's clipping, with a scaler as its Accelerator has one on a GPU."""
    importlib.import_module("accelerate.state").AcceleratorState._reset_state()
    accelerator: Any = importlib.import_module("accelerate").Accelerator(
        cpu=True, mixed_precision="fp16" if scaler else "no"
    )
    parameters = parameters_of(optimizers)
    if scaler:
        accelerator.native_amp, accelerator.scaler, accelerator._optimizers = (
            True,
            scaler,
            optimizers,
        )
    return Clipping(lambda: accelerator.clip_grad_norm_(parameters, max_norm))


FIXED: dict[str, MakeFixed] = {
    "torch": torch_plain,
    "torch compiled": torch_compiled,
    "Lightning Fabric": lightning,
    "Accelerate": accelerate,
}
"""Packages with a given threshold."""


def peer(name: str, parameters: list[nn.Parameter]) -> Clipping | None:
    """Return a peer's clipping; None if its package is not installed."""
    try:
        return PEERS[name](parameters)
    except (ImportError, PackageNotFoundError):
        return None


def parameters_of(optimizers: list[Optimizer]) -> list[nn.Parameter]:
    """Return the parameters of optimizers, repeated ones included."""
    return [p for each in optimizers for group in each.param_groups for p in group["params"]]


def _smartclip(parameters: list[nn.Parameter], make: Callable[[Any], Any]) -> Clipping:
    package = importlib.import_module("smartclip")
    backend = importlib.import_module("smartclip.backends.torch")
    clipper, model = make(package), Model(parameters)
    # The context must stay open: it stops clipping at its end.
    contexts = ExitStack()

    def clip_and_norm() -> object:
        records: list[Any] = []
        backend.apply(model, clipper, records.append)
        return records[-1]["grad_norm"]

    def attach(optimizers: Optimizers) -> Optimizers | None:
        for optimizer in optimizers if len(optimizers) == 1 else []:
            contexts.enter_context(package.clip_context(model, optimizer, clipper))
        return optimizers if len(optimizers) == 1 else None

    return Clipping(
        lambda: backend.apply(model, clipper), clip_and_norm, _stateful(clipper), attach
    )


def _stateful(clipper: Any) -> Any:
    return clipper if hasattr(clipper, "state_dict") else None


RULES: dict[str, tuple[str, Callable[[], Threshold]]] = {
    "Percentile": ("global", Percentile),
    "Quantile(10)": ("global", lambda: Quantile(10)),
    "ZScore": ("global", ZScore),
    "RelativeToWeights": ("unit", RelativeToWeights),
}
"""The scope and the maker of each rule of gradclip that is like one of a package."""
LIKE_PEERS = {
    "autoclip QuantileClip": "Percentile",
    "smartclip AutoClip": "Quantile(10)",
    "zclip ZClip": "ZScore",
    "smartclip ZScoreClip": "ZScore",
    "timm adaptive_clip_grad": "RelativeToWeights",
}
"""The rule that is nearest to each package's."""


class Halving(Threshold):
    """Clips every second norm, to half of it."""

    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        """See `Threshold.thresholds`."""
        thresholds = norms.clone()
        thresholds[::2] *= 0.5
        return thresholds


def measure_peers(name: str, seconds: float) -> dict[str, dict[str, float]]:
    """Return the times of steps with each peer and with the nearest rule, after some of both.

    For AGC the gradients are so small that about half of the units are clipped.
    """
    times = {}
    for other in PEERS:
        gradients = Gradients(SETS[name](), torch.float32)
        theirs = peer(other, gradients.parameters)
        if theirs is None:
            continue
        scope, rule = RULES[LIKE_PEERS[other]]
        optimizer, bare = Still(gradients.parameters), Still(gradients.parameters)
        rivals = {"theirs": theirs.with_step_of(bare), "hook": optimizer.step}
        if scope == "unit":
            units = Clipping(functools.partial(gradclip.clip_grad_units_, gradients.parameters))
            rivals["clip_grad_units_"] = units.with_step_of(bare)
        factor = 5e-4 if scope == "unit" else 1.0

        def prepare(gradients: Gradients = gradients, factor: float = factor) -> None:
            gradients.rewrite()
            torch._foreach_mul_([p.grad for p in gradients.parameters], factor)

        with gradclip.GradientClipper(optimizer, rule(), scope=scope):
            for _ in range(200 if name == "small" else 20):
                prepare()
                for step in rivals.values():
                    step()
            times[other] = interleaved_medians(rivals, prepare, seconds)
    return times


def print_peers(name: str, seconds: float) -> None:
    """Print the times of gradclip as ratios to those of other packages."""
    print(f"\n| {name}, beside | theirs, us | hook | clip_grad_units_ |\n|---|---|---|---|")
    times = measure_peers(name, seconds)
    for other in PEERS:
        if other not in times:
            print(f"| {other} | not installed | | |")
            continue
        medians = times[other]
        theirs = medians["theirs"]
        units = medians.get("clip_grad_units_")
        last = f"{units / theirs:.2f}" if units is not None else ""
        print(f"| {other} | {theirs * 1e6:.0f} | {medians['hook'] / theirs:.2f} | {last} |")

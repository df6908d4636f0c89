"""Other packages for adaptive clipping, each taken where it is installed.

pip install --no-deps autoclip zclip smartclip timm
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from torch import nn

Step = Callable[[], object]


class Model(nn.Module):
    """What some packages want instead of parameters."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameters)


def autoclip_quantile(parameters: list[nn.Parameter]) -> Step:
    """Percentile 10 of the last 1000 norms, over all parameters."""
    clipper = importlib.import_module("autoclip.torch").QuantileClip
    return clipper(parameters, quantile=0.1, history_length=1000, global_threshold=True).step


def zclip(parameters: list[nn.Parameter]) -> Step:
    """The z-score rule of its authors."""
    clipper, model = importlib.import_module("zclip").ZClip(), Model(parameters)
    return lambda: clipper.step(model)


def smartclip_autoclip(parameters: list[nn.Parameter]) -> Step:
    """Percentile 10, over all parameters."""
    return _smartclip(parameters, lambda core: core.AutoClip(percentile=10.0, scope="global"))


def smartclip_zscore(parameters: list[nn.Parameter]) -> Step:
    """The z-score rule, over all parameters."""
    return _smartclip(parameters, lambda core: core.ZScoreClip(scope="global"))


def timm_agc(parameters: list[nn.Parameter]) -> Step:
    """AGC, unit by unit. Its one file is loaded by itself: timm wants torchvision."""
    file = Path(str(distribution("timm").locate_file("timm/utils/agc.py")))
    spec = importlib.util.spec_from_file_location("timm_agc", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda: module.adaptive_clip_grad(parameters)


PEERS: dict[str, Callable[[list[nn.Parameter]], Step]] = {
    "autoclip QuantileClip": autoclip_quantile,
    "zclip ZClip": zclip,
    "smartclip AutoClip": smartclip_autoclip,
    "smartclip ZScoreClip": smartclip_zscore,
    "timm adaptive_clip_grad": timm_agc,
}


def peer(name: str, parameters: list[nn.Parameter]) -> Step | None:
    """Return a step of a peer's clipping, or None where its package is not installed."""
    try:
        return PEERS[name](parameters)
    except (ImportError, PackageNotFoundError):
        return None


def _smartclip(parameters: list[nn.Parameter], make: Callable[[Any], Any]) -> Step:
    package = importlib.import_module("smartclip")
    apply = importlib.import_module("smartclip.backends.torch").apply
    clipper, model = make(package), Model(parameters)
    return lambda: apply(model, clipper)

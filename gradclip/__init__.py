"""Gradient clipping for PyTorch: right, nearly free, and seen.

Every clipping algorithm answers two questions, and any pair of answers works:

- scope: which gradients share one norm?
- threshold: how large may that norm be now?

Every step is the same: measure the norms, compute their thresholds, scale the gradients in place by
``min(1, threshold / norm)``, record. Known algorithms are pairs:

====================================================  ===========  ========================
known as                                              scope        threshold
====================================================  ===========  ========================
``torch.nn.utils.clip_grad_norm_``, Pascanu 2013      "global"     ``Fixed(c)``
Keras ``clipnorm``, detectron2                        "parameter"  ``Fixed(c)``
warm-up of the threshold                              "global"     ``Schedule(function)``
AutoClip, Seetharaman 2020                            "global"     ``Percentile(10)``
adaptive clipping, Andrew 2021                        "global"     ``Quantile(50)``
ZClip, Kumar 2025                                     "global"     ``ZScore(2.5)``
AdaGC, Wang 2025                                      "parameter"  ``MovingAverage(1.05)``
robust spike detection                                "global"     ``MedianDeviation(10)``
no threshold to choose                                "global"     ``"auto"``
OLMo's skipped steps, with ``exceed="skip"``          "global"     ``MeanDeviation(6)``
AGC of NFNets, Brock 2021                             "unit"       ``RelativeToWeights()``
====================================================  ===========  ========================

Read the code in this order:

1. ``examples/minimal.py``, then ``clipper.py``: one step from gradients to record;
2. ``scopes/`` and ``thresholds/``: the two answers, one rule per module;
3. ``gradients/``: the arithmetic of one step, with the formula in ``coefficients.py``;
4. ``engines/``: the arithmetic, first in plain torch (``reference.py``), then in C and Triton;
5. ``optimizers/`` and ``ranks/``: the hooks of an optimizer, and distributed training;
6. ``records/`` and ``report/``: the record of a step, and reading it back.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import thresholds
    from .clipper import GradientClipper
    from .errors import (
        ArgumentError,
        AttachError,
        EngineUnavailableError,
        GradClipError,
        GradientError,
        NonFiniteGradientError,
        SkipLimitError,
        StateError,
    )
    from .functional.backward import TimeNorms, clip_backward, through_time
    from .functional.differentiable import clip_gradients
    from .functional.torch_names import (
        clip_grad_norm_,
        clip_grad_value_,
        clip_gradients_,
        clip_grads_with_norm_,
        get_total_norm,
    )
    from .functional.units import clip_grad_units_
    from .ranks.ranks import Ranks
    from .records.logged_step import LoggedStep
    from .records.record import ClipRecord
    from .records.sinks.base import Sink
    from .records.sinks.callable import CallableSink
    from .records.sinks.jsonl import JsonlSink
    from .records.sinks.memory import MemorySink
    from .records.sinks.tensorboard import TensorBoardSink
    from .scopes.scope import Scope
    from .thresholds import Threshold
    from .view.show import show

__version__ = "0.2.0"

__all__ = [
    "ArgumentError",
    "AttachError",
    "CallableSink",
    "ClipRecord",
    "EngineUnavailableError",
    "GradClipError",
    "GradientClipper",
    "GradientError",
    "JsonlSink",
    "LoggedStep",
    "MemorySink",
    "NonFiniteGradientError",
    "Ranks",
    "Scope",
    "Sink",
    "SkipLimitError",
    "StateError",
    "TensorBoardSink",
    "Threshold",
    "TimeNorms",
    "__version__",
    "clip_backward",
    "clip_grad_norm_",
    "clip_grad_units_",
    "clip_grad_value_",
    "clip_gradients",
    "clip_gradients_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "show",
    "thresholds",
    "through_time",
]

_MODULES = {
    "clipper": ["GradientClipper"],
    "errors": [name for name in __all__ if name.endswith("Error")],
    "functional.backward": ["TimeNorms", "clip_backward", "through_time"],
    "functional.differentiable": ["clip_gradients"],
    "functional.torch_names": [
        "clip_grad_norm_",
        "clip_grad_value_",
        "clip_gradients_",
        "clip_grads_with_norm_",
        "get_total_norm",
    ],
    "functional.units": ["clip_grad_units_"],
    "ranks.ranks": ["Ranks"],
    "records.logged_step": ["LoggedStep"],
    "records.record": ["ClipRecord"],
    "records.sinks.base": ["Sink"],
    "records.sinks.callable": ["CallableSink"],
    "records.sinks.jsonl": ["JsonlSink"],
    "records.sinks.memory": ["MemorySink"],
    "records.sinks.tensorboard": ["TensorBoardSink"],
    "scopes.scope": ["Scope"],
    "thresholds": ["Threshold"],
    "view.show": ["show"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name or a module at its first use.

    Importing torch takes a second, which the command line's ``--help`` should not wait for.
    """
    if name in _MODULE_OF:
        value = getattr(_imported(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return _imported(name)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _imported(module: str) -> Any:
    """Import a module outside of dispatch modes: a constant tensor is not to be a fake one."""
    if "torch" not in sys.modules:
        return import_module(f".{module}", __name__)
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return import_module(f".{module}", __name__)


def __dir__() -> list[str]:
    return __all__

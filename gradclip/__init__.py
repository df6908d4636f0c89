"""gradclip: gradient clipping that is right, nearly free, and seen.

To read the code, take this order: README, ``examples/minimal.py``, ``clipper.py``,
``attachment.py``, ``joint.py``, ``scopes.py``, ``labels.py``, ``gradients.py``, ``places.py``,
``step_gradients.py``, ``norms.py``, ``coefficients.py``, ``limits.py``, ``thresholds/base.py``,
``thresholds/fixed.py``, ``thresholds/adaptive.py``, ``engines/base.py``, ``engines/reference.py``,
``engines/operators.py``, ``engines/native.py``, ``engines/_native.c``, ``engines/plan.py``,
``engines/kernels.py``, ``engines/launching.py``, ``engines/requests.py``, ``engines/triton.py``,
``ranks.py``, ``shards.py``, ``told.py``, ``agreement.py``, ``disagreement.py``, ``peers.py``,
``overflow.py``, ``parts.py``, ``records.py``, ``buffer.py``, ``incidents.py``, ``recorder.py``,
``capture.py``, ``replays.py``, ``sinks/tensorboard.py``, ``sinks/event_files.py``,
``sinks/record_format.py``, ``report/reading.py``, ``report/run.py``, ``report/summary.py``,
``report/advice.py``.
"""

from __future__ import annotations

from . import thresholds
from ._version import __version__
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
from .records.sinks import CallableSink, JsonlSink, MemorySink, Sink, TensorBoardSink
from .scopes.scope import Scope
from .thresholds import Threshold

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
    "clip_gradients_",
    "clip_grads_with_norm_",
    "get_total_norm",
    "thresholds",
    "through_time",
]

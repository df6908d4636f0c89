"""GradientClipper: attached to an optimizer, it clips and records at every step."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .attachment import Attachment, check_groups, check_optimizer
from .checks import checked_count
from .coefficients import clip_coefficients
from .engines import engine_for, norm_dtype
from .errors import ArgumentError, AttachError, NonFiniteGradientError
from .gradients import (
    Bucket,
    bounded_copies,
    buckets_of,
    coalesce_,
    gradients_of,
    parameters_of,
    refuse_unordered,
)
from .naming import describe_nonfinite, parameter_names
from .norms import norms_of
from .recorder import Recorder
from .records import ClipRecord, clipped
from .settings import Settings, check_later_parts
from .sinks import Sink, sinks_from
from .state import parsed_state
from .thresholds import StepContext, Threshold, threshold_from

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from typing_extensions import Self

    Log = str | os.PathLike[str] | SummaryWriter | Sink


class GradientClipper:
    """Clip the gradients at every step of an optimizer, and record their norms.

    The clipper attaches itself: from then on ``optimizer.step()`` clips first. One norm is taken
    over all gradients that the optimizer holds, with float64 accumulation, and where it exceeds
    the threshold all of them are scaled in place by ``threshold / norm`` (Pascanu, Mikolov and
    Bengio, "On the difficulty of training recurrent neural networks", 2013). Below the threshold
    nothing is written.

    No host sync on a CUDA device in a step, unless ``nonfinite`` is "raise" or "skip", or the
    parameters lie on several devices. Not collective.

    >>> import torch, gradclip
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> clipper = gradclip.GradientClipper(optimizer, 1.0)
    >>> model(torch.tensor([[30.0, 40.0]])).sum().backward()
    >>> optimizer.step()
    >>> round(clipper.last.norm.item(), 3), round(clipper.last.clipped_norm.item(), 3)
    (50.01, 1.0)

    Args:
        optimizer: The optimizer whose steps are clipped.
        max_norm: Largest norm allowed, 0 or more; a function of the step's index that returns
            it; a `Threshold`; or None to measure without clipping.
        norm_type: p of the p-norm, positive, or inf for the largest element.
        max_value: Bound for every element, applied before the norm is limited. It changes the
            direction of the gradient; the record's ``norm`` is the one before it.
        scope: Which gradients share a norm. This version has "global": all of them.
        exceed: What a norm above its threshold causes. "scale": the formula. "observe": nothing
            is ever written; the record shows what would have been done.
        nonfinite: What a norm that is NaN or infinite causes. "zero": the gradients become 0 and
            the step is taken. "skip": the step is left out. "raise": left out, with a
            `NonFiniteGradientError`. "propagate": nothing.
        skip_limit: Not available in this version.
        model: Gives parameters their names in errors; without it they are numbered.
        log: A directory for TensorBoard, a ``SummaryWriter``, a `Sink`, or a list of these.
        ranks: Not available in this version.
        grad_scaler: Not available in this version.
        engine: Which engine measures and scales; "auto" chooses by device.

    Raises:
        ArgumentError: An option that cannot be meant.
        AttachError: An optimizer that cannot be clipped through its hooks.
        NotAvailableError: An option that this version lacks.
        EngineUnavailableError: An engine that this installation lacks.
    """

    labels: tuple[str, ...] = ("global",)
    """Names of the norms, in the order of the vectors in a record."""

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        max_norm: float | Threshold | Callable[[int], float | None] | None,
        *,
        norm_type: float = 2.0,
        max_value: float | None = None,
        scope: str = "global",
        exceed: str = "scale",
        nonfinite: str = "zero",
        skip_limit: int | None = None,
        model: nn.Module | None = None,
        log: Log | Sequence[Log] | None = None,
        ranks: object = None,
        grad_scaler: object = None,
        engine: str = "auto",
    ) -> None:
        check_later_parts(scope=scope, skip_limit=skip_limit, ranks=ranks, grad_scaler=grad_scaler)
        self._settings = Settings(norm_type, max_value, exceed, nonfinite, engine)
        self._threshold = threshold_from(max_norm)
        self._observes = type(self._threshold).observe is not Threshold.observe
        if model is not None and not isinstance(model, nn.Module):
            raise ArgumentError(f"model is a {type(model).__name__}: give a torch.nn.Module.")
        self._model = model
        self._optimizer = check_optimizer(optimizer, skips=nonfinite == "skip")
        device = self._device
        self._threshold.start(self.labels, device, norm_dtype(device))
        self._recorder = Recorder(sinks_from(log), self._settings.norm_type)
        self._close = weakref.finalize(self, self._recorder.close)
        self._steps = 0
        self._last: ClipRecord | None = None
        self._attachment = Attachment(self._optimizer, self._clip, self._finish)

    # The pipeline

    @torch.no_grad()
    def _clip(self) -> ClipRecord:
        """Clip the gradients that are there now."""
        buckets = self._gradients()
        norms = self._norms(buckets)
        self._context = StepContext(self._steps, _flags(bool(buckets), norms.device))
        thresholds = self._thresholds(norms, self._context)
        skip = self._verdict(norms)
        buckets, bounded = (buckets, norms) if skip else self._bound(buckets, norms)
        coefficients = clip_coefficients(bounded, thresholds, self._settings.erases)
        if not skip:
            self._scale(buckets, coefficients)
        factors = coefficients if bounded is norms else coefficients * _ratio(bounded, norms)
        return ClipRecord(self._steps, time.time(), norms, thresholds, factors, skip)

    def _finish(self, record: ClipRecord) -> None:
        """Count and record the step that was taken or skipped."""
        if self._observes and not record.skipped:
            self._threshold.observe(
                record.norms, clipped(record.norms, record.coefficients), self._context
            )
        self._last = record
        self._steps += 1
        self._recorder.add(record)

    # Its parts

    @property
    def _device(self) -> torch.device:
        return next(parameters_of(self._optimizer.param_groups)).device

    def _gradients(self) -> list[Bucket]:
        check_groups(self._optimizer)
        gradients = self._held()
        if self._settings.max_value is not None:
            refuse_unordered(gradients)
        return buckets_of(gradients, self._settings.norm_type)

    def _held(self) -> list[Tensor]:
        return gradients_of(parameters_of(self._optimizer.param_groups))

    def _norms(self, buckets: list[Bucket]) -> Tensor:
        settings = self._settings
        return norms_of(
            buckets,
            settings.norm_type,
            count=len(self.labels),
            device=self._device,
            engine=settings.engine,
        )

    def _thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        thresholds = self._threshold.thresholds(norms, context)
        if thresholds.shape != norms.shape or thresholds.device != norms.device:
            raise ArgumentError(
                f"{type(self._threshold).__name__}.thresholds() returned the shape "
                f"{tuple(thresholds.shape)} on {thresholds.device}: return one threshold for "
                f"each norm, shape {tuple(norms.shape)} on {norms.device}."
            )
        return thresholds

    def _verdict(self, norms: Tensor) -> bool:
        """Return whether to skip the step, or raise. Host sync where the policy needs one."""
        settings = self._settings
        if not settings.judges or bool(norms.isfinite().all()):
            return False
        if settings.nonfinite == "skip":
            return True
        named = parameter_names(self._optimizer.param_groups, self._model)
        raise NonFiniteGradientError(
            f"The norm of the gradients is {norms.tolist()[0]} at step {self._steps}, from these "
            f"parameters: {describe_nonfinite(named)}. The step was not taken and the gradients "
            "are as they were. Lower the learning rate or look at that step's batch; "
            "nonfinite='zero' or 'skip' would go on."
        )

    def _bound(self, buckets: list[Bucket], norms: Tensor) -> tuple[list[Bucket], Tensor]:
        """Apply ``max_value`` where the norm is finite, and measure again."""
        settings = self._settings
        if settings.max_value is None:
            return buckets, norms
        if not settings.writes:
            return buckets, self._norms(bounded_copies(buckets, settings.max_value))
        if coalesce_(self._held()):
            buckets = self._gradients()
        bounds = torch.where(norms < math.inf, settings.max_value, math.inf)
        for bucket in buckets:
            engine_for(settings.engine, bucket.device).clamp_(bucket.written, bucket.spread(bounds))
        return buckets, self._norms(buckets)

    def _scale(self, buckets: list[Bucket], coefficients: Tensor) -> None:
        settings = self._settings
        if settings.writes:
            for bucket in buckets:
                engine_for(settings.engine, bucket.device).scale_(
                    bucket.written, bucket.spread(coefficients)
                )

    # What a training loop calls

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of the optimizer, clipped; returns what it returns.

        Args:
            closure: Reevaluates the model and returns the loss. The gradients of every
                evaluation are clipped.
        """
        return self._optimizer.step() if closure is None else self._optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the optimizer, as its own ``zero_grad`` does."""
        self._optimizer.zero_grad(set_to_none=set_to_none)

    @property
    def last(self) -> ClipRecord | None:
        """The record of the newest step, in tensors on the device; None before the first."""
        return self._last

    @property
    def steps(self) -> int:
        """How many steps were seen; the next record has this index. It can be set."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = checked_count("steps", steps)

    @property
    def skipped(self) -> int:
        """How many of the steps were skipped. Host sync."""
        return self._recorder.counters.skipped_steps

    @property
    def engine(self) -> str:
        """Names of the engines that serve the parameters' devices."""
        devices = {p.device: None for p in parameters_of(self._optimizer.param_groups)}
        names = {engine_for(self._settings.engine, device).name: None for device in devices}
        return ", ".join(names)

    def clip_rate(self) -> float:
        """Return the share of the finite norms so far that exceeded their threshold. Host sync."""
        return self._recorder.counters.clip_rate

    def state_dict(self) -> dict[str, Any]:
        """Return step, counters and the threshold's state, loadable with ``weights_only=True``.

        Host sync.
        """
        return {
            "steps": self._steps,
            "counters": asdict(self._recorder.counters),
            "threshold": self._threshold.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned, to continue a run exactly.

        Raises:
            StateError: It is no such state, or of another threshold; nothing was changed.
        """
        steps, counters = parsed_state(state)
        self._threshold.load_state_dict(state["threshold"])
        self._steps, self._recorder.counters = steps, counters

    # Its end

    def detach(self) -> None:
        """Stop clipping: take the hooks off the optimizer. The second call does nothing."""
        self._attachment.detach()

    def flush(self) -> None:
        """Write all records so far to the logs. Host sync."""
        self._recorder.flush()

    def close(self) -> None:
        """Detach, write what is left, and close the logs. The second call does nothing."""
        self.detach()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"GradientClipper({type(self._optimizer).__name__}, {self._threshold!r}, "
            f"steps={self._steps}, engine={self.engine!r})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AttachError(
            "A GradientClipper cannot be copied or pickled: the copy would look attached and never "
            "clip. Attach a new one to the copied optimizer, and give it this one's state_dict()."
        )


@lru_cache(maxsize=8)
def _flags(value: bool, device: torch.device) -> Tensor:
    return torch.full((1,), value, device=device)


def _ratio(after: Tensor, before: Tensor) -> Tensor:
    """Return by how much norms shrank; 1 for a norm of 0 or none that is finite."""
    return torch.where((before > 0) & (before < math.inf), after / before, 1.0)

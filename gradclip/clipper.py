"""GradientClipper: attached to an optimizer, it clips and records at every step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from .checks import checked_count
from .engines import engine_for
from .engines.cuda_graphs import capturing
from .engines.no_grad import untracked
from .errors import ArgumentError, AttachError
from .gradients.coefficients import are_finite, clip_coefficients, ones_if_skipped, reduction_of
from .gradients.norm_thresholds import NormThresholds
from .gradients.policies import Settings, check_capture, described, options_of
from .gradients.step import StepGradients
from .optimizers.attachment import Attachment
from .optimizers.joint import JointGradients
from .optimizers.step_changes import StepChanges
from .optimizers.supported import clippable, listed
from .ranks.agreement import RankLayout, announces_failure, comparable_options
from .ranks.ranks import Ranks
from .records.incidents import nonfinite_error, skip_limit_error
from .records.record import ClipRecord
from .records.recorder import Recorder
from .records.sinks.base import Sink
from .records.sinks.log_option import sinks_from
from .records.state import parsed_state
from .scopes.labels import NormLabels
from .scopes.scope import Labelling, Scope, scope_from
from .thresholds import Threshold, threshold_from

if TYPE_CHECKING:
    from torch.amp import GradScaler
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

    A skipped step leaves parameters, the optimizer's state and the gradients as they are. A step
    that a ``GradScaler`` leaves out for its overflow is not seen at all.

    No host sync on a CUDA device in a step, unless ``nonfinite`` is "raise", or a policy is "skip"
    and the optimizer is none of torch's fused ones, or the parameters lie on several devices, or
    several optimizers share a ``GradScaler``. Collective, as attaching is, across ranks.

    Steps can be captured in a CUDA graph, after a few that were not. The training loop then calls
    `flush` now and then, and steps outside the graph wait for the device.

    >>> import torch, gradclip
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> clipper = gradclip.GradientClipper(optimizer, 1.0)
    >>> model(torch.tensor([[30.0, 40.0]])).sum().backward()
    >>> optimizer.step()
    >>> round(clipper.last.norm.item(), 3), round(clipper.last.clipped_norm.item(), 3)
    (50.01, 1.0)

    Args:
        optimizer: The optimizer whose steps are clipped, or several in a list: the gradients of
            one backward pass then share one norm. Of a wrapper, the optimizer inside. A parameter
            group with a ``max_norm``, read once, has a norm of its own; with None it is never
            clipped and in no norm.
        max_norm: Largest norm allowed, 0 or more; a function of the step's index that returns
            it; a `Threshold`; or None to measure without clipping.
        norm_type: p of the p-norm, positive, or inf for the largest element.
        max_value: Bound for every element, applied before the norm is limited. It changes the
            direction of the gradient; the record's ``norm`` is the one before it.
        scope: Which gradients share a norm: "global" (all), "group", "parameter", "unit" (each
            row or filter), a `Scope`, or a function of a parameter's name and the parameter that
            returns its label.
        exceed: What a norm above its threshold causes. "scale": the formula. "skip": the whole
            step is left out. "observe": nothing is ever written; the record shows what would
            have been done.
        nonfinite: What a norm that is NaN or infinite causes. "zero": the gradients become 0 and
            the step is taken. "skip": the step is left out. "raise": left out, with a
            `NonFiniteGradientError`. "propagate": nothing.
        skip_limit: So many skipped steps in a row raise a `SkipLimitError`; None for no limit.
        model: Gives parameters their names in labels and errors; without it they are numbered.
        log: A directory for TensorBoard, into which the first of several processes writes; a
            ``SummaryWriter``, a `Sink`, or a list of these.
        ranks: Where the parameters are that live on other ranks without being DTensors.
        grad_scaler: The ``GradScaler``, for several optimizers, whose gradients are all unscaled
            at the first step, or with ``ranks``, which then agree on its overflows.
        engine: Which engine measures and scales; "auto" chooses by device.

    Raises:
        ArgumentError: An option that cannot be meant.
        AttachError: An optimizer that cannot be clipped through its hooks, or ranks that differ.
        EngineUnavailableError: An engine that this installation lacks.

    Warns:
        UserWarning: An optimizer that clips by itself, too.
    """

    @announces_failure
    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        max_norm: float | Threshold | Callable[[int], float | None] | None,
        *,
        norm_type: float = 2.0,
        max_value: float | None = None,
        scope: str | Scope | Labelling = "global",
        exceed: str = "scale",
        nonfinite: str = "zero",
        skip_limit: int | None = None,
        model: nn.Module | None = None,
        log: Log | Sequence[Log] | None = None,
        ranks: Ranks | None = None,
        grad_scaler: GradScaler | None = None,
        engine: str = "auto",
    ) -> None:
        self._settings = Settings(norm_type, max_value, exceed, nonfinite, skip_limit, engine)
        self._threshold = threshold_from(max_norm)
        options = options_of(self._settings, self._threshold, scope)
        optimizers = clippable(optimizer, skips=self._settings.skips, ranks=ranks)
        self._given = listed(optimizer)
        self._labels = NormLabels(
            optimizers, scope_from(scope), model, None if ranks is None else ranks.original_of
        )
        order = self._settings.norm_type
        self._recorder = Recorder(sinks_from(log), order, skip_limit)
        same = comparable_options(options, self._threshold, grad_scaler, optimizers)
        rank_layout = RankLayout(
            ranks, self._labels, same, self._recorder.has_sinks or self._settings.raises
        )
        self._joint = JointGradients(
            optimizers, grad_scaler, self._settings, self._labels, rank_layout, self._threshold
        )
        self._norm_thresholds = NormThresholds(
            self._threshold, self._labels, self._joint.device, order
        )
        self._recorder.close_after(self)
        self._last: ClipRecord | None = None
        self._pending: ClipRecord | None = None
        self._attachments = [
            Attachment(each, self._clip, self._finish, self._labels.warn_of_lost_keys)
            for each in optimizers
        ]
        self._joint.attach()
        self._norm_thresholds.claim()
        self._recorder.begin(described(options, self.labels, optimizers, self.engine))

    # The pipeline

    @untracked
    def _clip(self, optimizer: Optimizer, step_changes: StepChanges) -> ClipRecord | None:
        """Clip what an optimizer is about to step with."""
        if capturing():
            check_capture(self._settings, self._threshold)
        gradients = self._joint.at_step(optimizer, step_changes)
        if not isinstance(gradients, StepGradients):
            return gradients
        norms = gradients.norms()
        step = self._recorder.next_step(norms)
        thresholds = self._norm_thresholds.at_step(gradients, norms, step)
        skip = gradients.skip_decision(norms, thresholds)
        untouched = skip if gradients.overflow is None else gradients.overflow | skip
        bounded = gradients.bound_(norms, untouched)
        coefficients = clip_coefficients(bounded, thresholds, self._settings.erases)
        coefficients = ones_if_skipped(untouched, coefficients)
        if self._settings.writes and skip is not True:
            gradients.scale_(coefficients)
        reduction = reduction_of(coefficients, bounded, norms)
        now, overflow, sums = time.time(), gradients.overflow, gradients.parameter_sums
        record = ClipRecord(step, now, norms, thresholds, reduction, skip, overflow, sums)
        self._joint.mark_clipped(gradients.tensors, record)
        self._pending = record
        if skip is True:
            self._refuse_nonfinite(optimizer, record)
        return record

    def _refuse_nonfinite(self, optimizer: Optimizer, record: ClipRecord) -> None:
        """Raise for a skipped step where the policy is to; it counts all the same."""
        if self._settings.raises and not are_finite(record.norms):
            error = nonfinite_error(record, self._recorder.history())
            self._joint.mark_stepped(optimizer)
            self._count(record)
            raise error

    def _finish(self, optimizer: Optimizer, record: ClipRecord) -> None:
        """Count and record the step that was taken or skipped, once for all optimizers."""
        self._joint.mark_stepped(optimizer)
        if record is not self._pending:
            return
        limit, known = self._settings.skip_limit, record.skipped is True
        skipped = self._recorder.counters.skipped_in_a_row + 1 if limit and known else 0
        self._count(record)
        if limit and skipped >= limit:
            raise skip_limit_error(limit, record.step)

    def _count(self, record: ClipRecord) -> None:
        self._last, self._pending = record, None
        self._recorder.add(record)
        self._norm_thresholds.observe(record)
        self._recorder.check_skips()

    # What a training loop calls

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of the optimizer, clipped; returns what it returns.

        Several optimizers step one after the other, and nothing is returned.

        Args:
            closure: Reevaluates the model and returns the loss. The gradients of every
                evaluation are clipped.

        Raises:
            ArgumentError: A closure and several optimizers: each would evaluate it anew.
        """
        if len(self._given) > 1:
            if closure is not None:
                raise ArgumentError(
                    f"step() was given a closure, and the clipper has {len(self._given)} "
                    "optimizers, each of which would evaluate it anew: call backward() yourself "
                    "and step() without a closure, or give it to one optimizer's own step()."
                )
            for optimizer in self._given:
                optimizer.step()
            return None
        [optimizer] = self._given
        return optimizer.step() if closure is None else optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the optimizers, as their own ``zero_grad`` does."""
        for optimizer in self._given:
            if set_to_none:
                optimizer.zero_grad()  # of wrappers, some take no argument
            else:
                optimizer.zero_grad(set_to_none=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the norms, in the order of the vectors in a record."""
        return self._labels.names

    @property
    def last(self) -> ClipRecord | None:
        """The record of the newest step, in tensors on the device; None before the first.

        In a CUDA graph the tensors hold the newest replay, the index is that of the capture.
        """
        return self._last

    @property
    def steps(self) -> int:
        """How many steps were seen; the next record has this index. It can be set.

        Steps that GradScaler leaves out do not count. With a fused optimizer, or in a CUDA graph,
        only the device knows them: `ClipRecord.step` counts them, and this waits for the device.
        """
        return self._recorder.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._recorder.steps = checked_count("steps", steps)

    @property
    def skipped(self) -> int:
        """How many of the steps were skipped. Host sync."""
        return self._recorder.counters.skipped_steps

    @property
    def engine(self) -> str:
        """Names of the engines that serve the parameters' devices."""
        chosen = (engine_for(self._settings.engine, device) for device in self._joint.devices)
        return ", ".join({engine.name: None for engine in chosen})

    def clip_rate(self) -> float:
        """Return the share of the finite norms so far that were (to be) reduced. Host sync."""
        return self._recorder.counters.clip_rate

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run goes on from; loads with ``weights_only=True``. Host sync."""
        self._norm_thresholds.follow_labels()
        return {
            "steps": self.steps,
            "counters": asdict(self._recorder.counters),
            "labels": list(self.labels),
            "rule": type(self._threshold).__name__,
            "threshold": self._threshold.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned, to continue a run exactly.

        Raises:
            StateError: It is no such state, or of another threshold or other labels; nothing was
                changed.
        """
        steps, counters = parsed_state(state, self._labels, type(self._threshold).__name__)
        self._norm_thresholds.follow_labels()
        self._threshold.load_state_dict(state["threshold"])
        self.steps, self._recorder.counters = steps, counters

    # Its end

    def detach(self) -> None:
        """Stop clipping: take the hooks off the optimizers. The second call does nothing."""
        for attachment in self._attachments:
            attachment.detach()
        self._joint.detach()
        self._norm_thresholds.release()

    def flush(self) -> None:
        """Write all records so far to the logs. Host sync.

        Raises:
            SkipLimitError: More steps in a row were skipped than ``skip_limit``, of which only
                the device knew.
        """
        self._recorder.flush()
        self._recorder.check_skips()

    def close(self) -> None:
        """Detach, write what is left, and close the logs. The second call does nothing."""
        self.detach()
        self._recorder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        names = ", ".join(type(optimizer).__name__ for optimizer in self._joint.optimizers)
        return (
            f"GradientClipper({names}, {self._threshold!r}, steps={self._recorder.seen}, "
            f"engine={self.engine!r})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AttachError(
            "A GradientClipper cannot be copied or pickled: the copy would look attached and never "
            "clip. Attach a new one to the copied optimizer, and give it this one's state_dict()."
        )

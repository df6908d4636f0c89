"""GradientClipper: attaches to an optimizer, clips its gradients and records their norms."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .checks import checked_count
from .engines import engine_for
from .engines.cuda_graphs import capturing
from .engines.no_grad import no_grad
from .errors import AttachError
from .gradients.coefficients import are_finite
from .gradients.norm_thresholds import NormThresholds
from .gradients.policies import Settings, check_capture, check_rule, described, options_of
from .optimizers.advice import EmptySteps, advising, normalised, warn_of_shared_norms
from .optimizers.attachment import Attachment
from .optimizers.in_backward import StepsInBackward, running_pass
from .optimizers.joint import AnyGradients, JointGradients
from .optimizers.micro_batches import MicroBatches
from .optimizers.replaced import close_replaced
from .optimizers.several import step_each
from .optimizers.step_changes import StepChanges
from .optimizers.supported import clippable, listed
from .optimizers.weight_changes import WeightChanges
from .ranks.layout import RankLayout, announces_failure
from .ranks.messages import comparable_options
from .ranks.ranks import Ranks
from .records.counting import MicroBatchCounts
from .records.incidents import nonfinite_error, skip_limit_error
from .records.losses import checked_loss, loss_or_none
from .records.record import ClipRecord, before_own_clipping
from .records.recorder import Recorder
from .records.sinks.base import Sink
from .records.sinks.log_option import sinks_from
from .records.state import counters_in_state, parsed_state
from .scopes.labels import NormLabels
from .scopes.scope import Labelling, Scope, scope_from
from .thresholds import MaxNorm, measures_only, threshold_from

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.utils.tensorboard import SummaryWriter
    from typing_extensions import Self

    Log = str | os.PathLike[str] | SummaryWriter | Sink


class GradientClipper:
    """Clip the gradients at every step of an optimizer and record their norms.

    The constructor attaches the clipper: from then on ``optimizer.step()`` clips first. By default
    all gradients of the optimizer share one norm, accumulated in float64. If the norm exceeds its
    threshold, all gradients are multiplied in place by ``threshold / norm`` (Pascanu, Mikolov and
    Bengio, "On the difficulty of training recurrent neural networks", 2013). At or below the
    threshold no gradient is written.
    <!-- test: tests/behaviour/clipper/test_step.py; tests/behaviour/numerics/test_numerics.py
    -k keep_their_bits -->

    A skipped step leaves the parameters, the optimizer's state and the gradients unchanged. A step
    that a ``GradScaler`` skips for its overflow is neither counted nor recorded.
    <!-- test: tests/behaviour/attachment/test_torch_optimizers.py -k skipped;
    tests/behaviour/grad_scaler/test_trainings.py -k overflowed -->

    A step causes no host sync on a CUDA device, unless ``nonfinite`` is "raise", or a policy is
    "skip" and the optimizer is not one of torch's fused ones, or the parameters lie on several
    devices, or several optimizers share a ``GradScaler``. Across ranks, attaching and every step
    are collective.
    <!-- test: tests/behaviour/devices/test_waiting.py; tests/ranks/test_ranks.py -->

    Optimizers may also step inside ``backward()``, with the scopes "parameter" and "unit", or
    "group" if each optimizer holds whole groups. One record covers the whole backward pass.
    <!-- test: tests/behaviour/training_loops/test_steps_in_backward.py -->

    A CUDA graph can capture steps, after a few eager ones. The training loop then calls `flush`
    from time to time, and eager steps wait for the device.
    <!-- test: tests/logging/test_replays.py -->

    Examples:
        >>> import torch, gradclip
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> clipper = gradclip.GradientClipper(optimizer, 1.0)
        >>> model(torch.tensor([[30.0, 40.0]])).sum().backward()
        >>> optimizer.step()
        >>> round(clipper.last.norm.item(), 3), round(clipper.last.clipped_norm.item(), 3)
        (50.01, 1.0)

    Args:
        optimizer: The optimizer whose steps are clipped. Several optimizers in a list share the
            norms of one backward pass. Of a wrapper the optimizer inside is clipped. A parameter
            group with the key ``max_norm``, read once, has a norm and a threshold of its own; with
            ``max_norm=None`` the group is never clipped and belongs to no norm.
        max_norm: The threshold, a finite number >= 0; a function that takes the index of the step
            and returns the threshold; a `Threshold`; "auto" for `thresholds.Auto`, which needs no
            number; or None to measure without clipping.
        norm_type: p of the p-norm, a number > 0, or inf for the largest element.
        max_value: Bound of every element's magnitude, a finite number >= 0, applied before the
            norm is clipped; None for no bound. A bound changes the direction of the gradient. The
            record's ``norm`` is the norm before the bound.
        scope: Which gradients share a norm: "global" (all), "group" (those of a parameter group),
            "parameter", "unit" (each row or filter), a `Scope`, or a function that takes a
            parameter's name and the parameter and returns a label.
        exceed: What happens if a norm exceeds its threshold. "scale": the gradients are scaled to
            the threshold. "skip": the whole step is skipped. "observe": nothing is ever written;
            the record shows what clipping would have done.
        nonfinite: What happens if a norm is NaN or infinite. "zero": its gradients become 0 and
            the step is taken. "skip": the step is skipped. "raise": the step is skipped and
            raises a `NonFiniteGradientError`. "propagate": the step is taken with the gradients
            as they are.
        skip_limit: Number of consecutive skipped steps that raises a `SkipLimitError`, a whole
            number >= 1; None for no limit.
        model: The module whose parameter names appear in labels and errors. Without it parameters
            are numbered.
        log: Where records are written: a directory for TensorBoard, written by the first of
            several processes; a ``SummaryWriter``; a `Sink`; or a list of these.
        ranks: A `Ranks`, if parameters that are not DTensors are spread over processes.
        grad_scaler: The ``GradScaler``. Several optimizers need it, so that all gradients are
            unscaled at the first step; so does ``ranks``, so that all ranks skip the same steps.
        engine: The engine that measures and scales: "native" (C, for the CPU), "triton" (CUDA),
            "operators" (torch, any device) or "reference" (float64, slow); "auto" chooses one for
            each device.

    Raises:
        ArgumentError: An invalid option.
        AttachError: The optimizer cannot be clipped through its hooks, or ranks do not match.
        EngineUnavailableError: The engine is not available in this installation.

    Warns:
        UserWarning: The optimizer also clips by itself; or an optimizer whose update does not
            depend on the scale of its gradients, such as Muon, shares a norm with another.

    <!-- test: tests/behaviour/clipper/test_options.py;
    tests/behaviour/attachment/test_attach.py -->
    """

    @announces_failure
    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        max_norm: MaxNorm,
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
        check_rule(self._settings, self._threshold)
        options = options_of(self._settings, self._threshold, scope)
        optimizers = clippable(optimizer, skips=self._settings.skips, ranks=ranks)
        self._given = listed(optimizer)
        self._labels = NormLabels(
            optimizers, scope_from(scope), model, None if ranks is None else ranks.original_of
        )
        order = self._settings.norm_type
        observed = not self._settings.writes
        self._recorder = Recorder(sinks_from(log), order, skip_limit, observed=observed)
        same = comparable_options(options, self._threshold, grad_scaler, optimizers)
        rank_layout = RankLayout(
            ranks,
            self._labels,
            same,
            bool(self._recorder.sinks) or self._settings.raises,
            self._recorder.weights_every,
        )
        self._joint = JointGradients(
            optimizers, grad_scaler, self._settings, self._labels, rank_layout, self._threshold
        )
        self._norm_thresholds = NormThresholds(
            self._threshold, self._labels, rank_layout, self._joint.device, order
        )
        self._recorder.close_after(self)
        self._loss: float | Tensor | None = None
        self._loss_is_captured = False
        self._last: ClipRecord | None = None
        self._pending: ClipRecord | None = None
        self._empty_steps = EmptySteps(type(optimizers[0]).__name__)
        self._micro_batches: MicroBatches | None = None
        self._weight_changes: WeightChanges | None = None
        if rank_layout.weights_every:
            self._weight_changes = WeightChanges(self._joint, self._recorder, self._settings)
        # All that can refuse comes before: a refused clipper leaves no hook behind.
        close_replaced(optimizers)
        clip = self._clip
        self._attachments = [
            Attachment(
                each,
                advising(clip, each) if self._settings.writes else clip,
                self._finish,
                self._labels.warn_of_lost_keys,
                optimizers,
            )
            for each in optimizers
        ]
        if self._weight_changes is not None:
            self._weight_changes.attach(self._attachments)
        self._in_backward = StepsInBackward(
            self._joint, self._norm_thresholds, self._recorder, self._settings, self._count
        )
        self._joint.attach()
        self._norm_thresholds.claim()
        self._recorder.watch(normalised(optimizers, self._labels))
        if self._settings.writes and not measures_only(self._threshold):
            warn_of_shared_norms(optimizers, self._labels)
        self._recorder.begin(described(options, self.labels, optimizers, self.engine))

    # The pipeline

    @no_grad
    def _clip(
        self, optimizer: Optimizer, changes: StepChanges, returned: object
    ) -> ClipRecord | None:
        """Clip the gradients that an optimizer is about to step with.

        Args:
            optimizer: The optimizer.
            changes: The changes that last until its step ends.
            returned: What the closure of the step returned, after it computed the gradients.
        """
        captured = capturing()
        gradients = self._gradients(optimizer, changes, returned, captured)
        if gradients is None or isinstance(gradients, ClipRecord):
            return gradients  # an earlier step of this backward pass has clipped these, or nothing
        norms = gradients.norms()
        step = self._recorder.next_step(norms, captured=captured)
        own_factor = changes.own_factor  # of an optimizer that clips in its own step as well
        before = norms if own_factor is None else norms / own_factor
        thresholds = self._norm_thresholds.at_step(gradients, before, step)
        decision = gradients.decide_(norms, thresholds)
        gradients.scale_(decision)
        skip, overflow, sums = decision.skip, gradients.overflow, gradients.parameter_sums
        reduction, now, loss = decision.reduction, time.time(), gradients.loss
        record = ClipRecord(step, now, norms, thresholds, reduction, skip, overflow, sums, loss)
        if own_factor is not None:
            record = before_own_clipping(record, own_factor, self._settings.norm_type)
        if self._joint.several is not None:
            self._joint.several.mark_clipped(gradients.tensors, record)
        if not gradients.tensors and not self._joint.spans_ranks:
            self._empty_steps.add(record, self._last)
        # Only a step that is taken counts, and a closure may be evaluated again before.
        self._pending = record
        if skip is True:
            self._refuse_nonfinite(optimizer, record)
        return record

    def _gradients(
        self, optimizer: Optimizer, changes: StepChanges, returned: object, captured: bool
    ) -> AnyGradients | ClipRecord | None:
        """Return the gradients to clip and their loss, or a record or None as `_clip` does.

        Gradients of a step inside ``backward()`` are clipped here, as a part of all of them.
        """
        loss = self._loss
        if captured:
            is_stale = loss is not None and not self._loss_is_captured
            check_capture(self._settings, self._threshold, stale_loss=is_stale)
        if loss is None and returned is not None:
            loss = loss_or_none(returned)
        if self._micro_batches is not None:
            self._micro_batches.check_step()
        if running_pass() != -1 and self._in_backward.awaits_gradients(optimizer):
            self._in_backward.clip(optimizer, loss)
            return None
        gradients = self._joint.at_step(optimizer, changes)
        if gradients is not None and not isinstance(gradients, ClipRecord):
            gradients.loss = loss
        return gradients

    def _refuse_nonfinite(self, optimizer: Optimizer, record: ClipRecord) -> None:
        """Raise for a skipped step if the policy is "raise"; the step counts all the same."""
        if self._settings.raises and not are_finite(record.values[0]):
            # The error tells the norms before this step: build it before this step is recorded.
            error = nonfinite_error(record, self._recorder.history())
            if self._joint.several is not None:
                self._joint.several.mark_stepped(optimizer)
            self._count(record)
            raise error

    def _finish(self, optimizer: Optimizer, record: ClipRecord) -> None:
        """Count and record a step that was taken or skipped, once for all optimizers."""
        if self._joint.several is not None:
            self._joint.several.mark_stepped(optimizer)
        if record is not self._pending:
            return
        # Reading the counters waits for the device: only for a skip that the host knows of, which
        # has waited already. Skips that only the device knows are counted at the next flush.
        limit, known = self._settings.skip_limit, record.skipped is True
        skipped = self._recorder.counters.skipped_in_a_row + 1 if limit and known else 0
        self._count(record)
        if limit and skipped >= limit:
            raise skip_limit_error(limit, record.step)

    def _count(self, record: ClipRecord) -> None:
        self._last, self._pending, self._loss = record, None, None
        if self._micro_batches is not None:
            self._micro_batches.move_counts_to(record)
        if self._weight_changes is not None:
            self._weight_changes.move_to(record)
        self._recorder.add(record)
        self._norm_thresholds.observe(record)
        self._recorder.check_skips()

    # What a training loop calls

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a clipped step of the optimizer and return its result.

        Several optimizers step one after the other, and the result is None.
        <!-- test: tests/behaviour/several_optimizers/test_joint_norm.py -k 'reach_all or
        closure' -->

        Args:
            closure: Evaluates the model again, calls ``backward()`` and returns the loss. The
                gradients of every evaluation are clipped.

        Raises:
            ArgumentError: A closure was given for several optimizers, each of which would
                evaluate it again.
        """
        return step_each(self._given, closure)

    def micro_batch(self, of: int) -> AbstractContextManager[None]:
        """Return a context in which the gradients of one micro-batch are clipped by themselves.

        Gradients that are computed within the context are clipped before they are added to those
        accumulated so far: with the scope of the clipper, and its threshold of the moment and its
        ``max_value`` divided by ``of``. So the sum of ``of`` micro-batches is within a threshold
        that does not change, up to rounding, and one bad micro-batch cannot outweigh the others
        (https://arxiv.org/abs/2605.02701). The step clips the sum as always.
        <!-- test: tests/behaviour/training_loops/test_micro_batches.py -k 'sums_are or
        writes_no_sum' -->

        Examples:
            ```python
            for batch in micro_batches:
                with clipper.micro_batch(of=len(micro_batches)):
                    (loss(model, batch) / len(micro_batches)).backward()
            optimizer.step()
            ```

        A rule does not learn from a micro-batch. It gives the threshold for a step whose
        micro-batches are all like this one. For a rule that reads the loss, assign `loss` within
        the context, not divided by ``of``. The policies apply to the micro-batch alone: "zero" sets
        the gradients of a non-finite norm to 0 before they are added, "skip" leaves the micro-batch
        out, "raise" leaves it out and raises, "observe" and "propagate" add it unchanged. Under a
        ``GradScaler``, given as ``grad_scaler=``, the threshold is scaled like the gradients, and
        the scaler finds overflows itself.
        <!-- test: tests/behaviour/training_loops/test_micro_batches.py -k 'rules_learn or
        loss_of_a_micro or policies or scale' -->

        It needs memory for one more gradient of each parameter. No host sync on a CUDA device,
        unless ``nonfinite`` is "raise". Where norms span several ranks it is collective.
        <!-- test: tests/behaviour/training_loops/test_micro_batches.py;
        tests/ranks/test_micro_batches.py -k collective -->

        Args:
            of: Number of the micro-batches that are accumulated for a step, a whole number >= 1.

        Raises:
            ArgumentError: ``of`` is not a whole number >= 1.
            AttachError: In the context: gradients that cannot be clipped by themselves, as those of
                FSDP1; a micro-batch inside another one; a captured CUDA graph.
            NonFiniteGradientError: In the context: a norm is not finite and ``nonfinite`` is
                "raise". After every error the gradients are those from before the context.

        Warns:
            UserWarning: No gradient was computed in the context.
        """
        count = checked_count("of", of, 1)
        if not self._attachments:
            raise AttachError("The clipper is detached: attach a new one to clip micro-batches.")
        if self._micro_batches is None:
            self._micro_batches = MicroBatches(
                self._joint, self._norm_thresholds, self._recorder, self._settings
            )
        return self._micro_batches.one_of(count, lambda: self._loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the optimizers, as their own ``zero_grad`` does."""
        for optimizer in self._given:
            if set_to_none:
                optimizer.zero_grad()  # the method of some wrappers takes no argument
            else:
                optimizer.zero_grad(set_to_none=False)

    @property
    def loss(self) -> float | Tensor | None:
        """The loss of the next step; None if none was assigned, and again after the step.

        Assign it before ``optimizer.step()``, a number or a tensor of one element on any device:
        the record of the step has it as `ClipRecord.loss`, the logs as ``grad_norm/loss``, and a
        rule as `StepContext.loss`. It is detached and copied; no host sync on CUDA. If batches are
        accumulated, the last value before the step counts; of a closure, the value of its last
        evaluation. The loss that a closure returns counts if none is assigned. A step that
        GradScaler skips has no record: the loss stays for the next step.
        <!-- test: tests/behaviour/clipper/test_loss.py; tests/logging/test_losses.py
        -k every_sink -->

        In a captured CUDA graph, assign the loss within the capture.
        <!-- test: tests/behaviour/clipper/test_loss.py -k 'replays or capture' -->

        Raises:
            ArgumentError: It is neither a number nor a tensor of one real element.
            AttachError: A number on the host was assigned within the capture of a CUDA graph.
        """
        return self._loss

    @loss.setter
    def loss(self, loss: float | Tensor | None) -> None:
        self._loss = None if loss is None else checked_loss(loss)
        self._loss_is_captured = isinstance(self._loss, Tensor) and capturing()

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the norms, in the order of the vectors of a record."""
        return self._labels.names

    @property
    def last(self) -> ClipRecord | None:
        """The record of the newest step, tensors on the device; None before the first step.

        After replays of a CUDA graph the tensors hold the newest replay, and the index of the step
        is that of the capture.
        <!-- test: tests/logging/test_replays.py -k clips_learns -->
        """
        return self._last

    @property
    def steps(self) -> int:
        """Number of steps so far, the index of the next record. It can be set.

        Steps that GradScaler skips for an overflow do not count. With a fused optimizer or in a
        CUDA graph only the device knows of them: then `ClipRecord.step` includes them, and this
        property causes a host sync.
        <!-- test: tests/behaviour/grad_scaler/test_marks_and_skips.py -k only_the_device_knows -->
        """
        return self._recorder.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._recorder.steps = checked_count("steps", steps)

    @property
    def skipped(self) -> int:
        """Number of skipped steps. Host sync."""
        return self._recorder.counters.skipped_steps

    @property
    def micro_batches(self) -> MicroBatchCounts:
        """Numbers of micro-batches so far: all, clipped, and with a norm not finite. Host sync."""
        recorded = self._recorder.counters.micro_batches
        running = self._micro_batches
        return recorded if running is None else recorded.with_those(running.counts)

    @property
    def sinks(self) -> tuple[Sink, ...]:
        """The sinks of the ``log=`` option, also after `close`; none on ranks that do not write."""
        return self._recorder.sinks

    @property
    def engine(self) -> str:
        """Names of the engines that serve the devices of the parameters."""
        chosen = (engine_for(self._settings.engine, device) for device in self._joint.devices)
        return ", ".join({engine.name: None for engine in chosen})

    def clip_rate(self) -> float:
        """Return the fraction of the finite norms so far that were clipped. Host sync.

        With ``exceed="observe"``, the fraction that clipping would have reduced.
        <!-- test: tests/models/test_life.py -k every_rule -->
        """
        return self._recorder.counters.clip_rate

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which a run resumes exactly. Host sync.

        It holds the number of steps, the counters, the labels and the state of the threshold, and
        loads with ``torch.load(..., weights_only=True)``.
        <!-- test: tests/models/test_life.py; tests/faults/test_states.py -->
        """
        self._norm_thresholds.follow_labels()
        return {
            "steps": self.steps,
            **counters_in_state(self._recorder.counters),
            "labels": list(self.labels),
            "rule": type(self._threshold).__name__,
            "threshold": self._threshold.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned, to resume a run exactly.

        Raises:
            StateError: The state is malformed, or belongs to another threshold or other labels;
                nothing was changed.

        <!-- test: tests/faults/test_states.py; tests/logging/test_resume.py -->
        """
        steps, counters = parsed_state(state, self._labels, type(self._threshold).__name__)
        self._norm_thresholds.follow_labels()
        self._threshold.load_state_dict(state["threshold"])
        self.steps, self._recorder.counters = steps, counters

    # Its end

    def detach(self) -> None:
        """Stop clipping: remove the hooks from the optimizers. A second call does nothing."""
        for attachment in self._attachments:
            attachment.detach()
        self._attachments = []
        self._in_backward.finish()
        if self._weight_changes is not None:
            self._weight_changes.detach()
        self._joint.detach()
        self._norm_thresholds.release()

    def flush(self) -> None:
        """Write all records so far to the logs. Host sync.

        Raises:
            SkipLimitError: ``skip_limit`` consecutive steps were skipped, and only the device knew.

        <!-- test: tests/logging/test_replays.py -k too_many_raise; tests/logging/test_steps.py
        -k batches -->
        """
        self._in_backward.finish()
        self._recorder.flush()
        self._recorder.check_skips()

    def close(self) -> None:
        """Detach, write the remaining records and close the logs. A second call does nothing."""
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
            "clip. Attach a new clipper to the copied optimizer and load this one's state_dict()."
        )

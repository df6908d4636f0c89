"""The norms of the parameters at every n-th step, and those of their changes in it.

The changes need a copy of the parameters while their optimizer steps. It is made by hooks of their
own, which only a clipper has whose sinks ask for it (`Sink.weights_every`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..engines.base import lack_values
from ..engines.cuda_graphs import capturing
from ..engines.no_grad import no_grad
from ..errors import AttachError, GradientError
from ..gradients.buckets import buckets_of
from ..gradients.forms import forms_of
from ..gradients.held import distinct, parameters_held
from ..gradients.norms import measure_across_ranks
from ..gradients.policies import Settings
from ..records.parameter_norms import ParameterSums
from ..records.record import ClipRecord, add_weight_sums
from ..records.recorder import Recorder
from ..records.weight_sums import WeightSums
from ..scopes.labels import LabelledParameter
from .attachment import Attachment, uncompiled
from .call_stack import making_state, step_running
from .in_backward import running_pass
from .joint import JointGradients


class WeightChanges:
    """Measures the trainable parameters of a clipper's optimizers when a step is due.

    Across ranks a step that is due has two more collectives for each optimizer.

    Args:
        joint: The optimizers and the ranks, which know what steps are due.
        recorder: Knows the index of a step.
        settings: The options of the clipper.

    Raises:
        AttachError: A parameter has no norm that can be measured.
    """

    def __init__(self, joint: JointGradients, recorder: Recorder, settings: Settings) -> None:
        self._joint = joint
        self._recorder = recorder
        self._settings = settings
        self._attachments: dict[Optimizer, Attachment] = {}
        self._hooks: list[RemovableHandle] = []
        self._before: dict[Optimizer, _Before] = {}
        """The optimizers that take a step that is due."""
        self._taken: dict[Optimizer, _Change] = {}
        """Those that have taken one whose record is not counted yet."""
        for labelled in self._parameters(joint.optimizers):
            self._check(labelled)

    def attach(self, attachments: Sequence[Attachment]) -> None:
        """Add the hooks, within those of the attachments: after clipping, before the record."""
        for optimizer, attachment in zip(self._joint.optimizers, attachments, strict=True):
            self._attachments[optimizer] = attachment
            before = optimizer.register_step_pre_hook(uncompiled(self._begin))
            after = optimizer.register_step_post_hook(uncompiled(self._end))
            optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
            self._hooks += [before, after]

    def detach(self) -> None:
        """Remove the hooks; the second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._before = {}

    def move_to(self, record: ClipRecord) -> None:
        """Add the changes of a step to its record, which is counted now."""
        changes = [change for change in self._taken.values() if change.step == record.step]
        self._taken = {}
        if changes:
            # Optimizers that share the record may step after it was counted.
            is_open = len(changes) < len(self._joint.optimizers)
            sums = WeightSums(record.step, is_open=is_open)
            for change in changes:
                sums.add(change.weights, change.changes)
            add_weight_sums(record, sums)

    @no_grad
    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        """The step pre-hook: copy and measure the parameters if the step is due."""
        if optimizer in self._before:
            if step_running(optimizer, outside=1):
                return  # a nested step: the outer one may have changed parameters already
            del self._before[optimizer]  # it has raised
        if capturing():
            raise AttachError(
                "A step with weights_every is captured in a CUDA graph, whose replays could not "
                "tell which of them to measure: capture steps of a clipper whose sinks have "
                "weights_every=0."
            )
        record = self._attachments[optimizer].running_record
        step = self._recorder.seen if record is None else record.step
        if not any(step % every == 0 for every in self._joint.rank_layout.weights_every):
            return
        parameters = self._parameters([optimizer])
        weights = [labelled.parameter.data for labelled in parameters]
        if making_state() or lack_values(weights):
            return
        copies = [weight.clone() for weight in weights]
        self._before[optimizer] = _Before(step, parameters, copies, self._sums(parameters, weights))

    @no_grad
    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        """The step post-hook: measure the changes."""
        if optimizer not in self._before or step_running(optimizer, outside=1):
            return
        before = self._before.pop(optimizer)
        record = self._attachments[optimizer].running_record
        if record is None:
            if running_pass() == -1:
                return  # GradScaler has skipped the step, which does not count
        elif record.step != before.step:
            return  # its closure had nothing to clip but what an earlier step has clipped
        for copy, labelled in zip(before.weights, before.parameters, strict=True):
            copy -= labelled.parameter.data
        changes = self._sums(before.parameters, before.weights)
        if record is not None and record.weight_sums is not None:
            record.weight_sums.add(before.sums, changes)
        else:
            self._taken[optimizer] = _Change(before.step, before.sums, changes)

    def _parameters(self, optimizers: Sequence[Optimizer]) -> list[LabelledParameter]:
        """Return the trainable parameters of optimizers, each once."""
        trainable = [each for each in parameters_held(optimizers) if each.requires_grad]
        return [self._joint.labels.of(parameter) for parameter in distinct(trainable)]

    def _sums(
        self, parameters: Sequence[LabelledParameter], tensors: Sequence[Tensor]
    ) -> ParameterSums:
        """Measure a tensor for each parameter. Collective if the norms span several ranks."""
        order, engine = self._settings.norm_type, self._settings.engine
        names: Sequence[str] = [labelled.name for labelled in parameters]
        counts = [labelled.counts for labelled in parameters]
        buckets = buckets_of(tensors, order, None, () if all(counts) else counts)
        layout = self._joint.rank_layout
        if not layout.norm_ranks:
            names = [
                names[index]
                for bucket in buckets
                for index in bucket.indices or range(len(names))  # empty: those of all
            ]
            # Of their own memory: an engine may use that of its sums again.
            return ParameterSums(
                names, [each.power_sums(engine, order).clone() for each in buckets]
            )
        indices = tuple(layout.parameter_indices(names))
        names = layout.parameter_names(names) or ()
        shared = measure_across_ranks(
            buckets,
            order,
            layout.norm_ranks,
            count=1,
            device=self._joint.device,
            engine=engine,
            parameters=(indices, len(names)),
        )
        assert shared.parameter_sums is not None  # noqa: S101  # as it was asked for
        return ParameterSums(names, [shared.parameter_sums])

    def _check(self, labelled: LabelledParameter) -> None:
        try:
            forms_of(labelled.parameter.data, self._settings.norm_type)
        except GradientError as error:
            raise AttachError(
                f"A sink has weights_every, and the norm of {labelled.name} cannot be measured: "
                "set weights_every=0, or requires_grad=False for a parameter that is not trained. "
                f"In words for gradients: {error}"
            ) from error


class _Before(NamedTuple):
    """The parameters of an optimizer before it takes a step."""

    step: int
    parameters: list[LabelledParameter]
    weights: list[Tensor]
    """Copies of them, from which their changes are made."""
    sums: ParameterSums


class _Change(NamedTuple):
    """The parameters of an optimizer before a step, and their changes in it."""

    step: int
    weights: ParameterSums
    changes: ParameterSums

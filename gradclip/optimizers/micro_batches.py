"""Clips the gradients of a micro-batch by themselves, before they are accumulated.

The gradients that were accumulated before are put aside while the backward pass of a micro-batch
runs. What it computes is then alone in ``.grad``: it is measured, decided upon and scaled as the
gradients of a step are, with the threshold divided by the number of micro-batches, and added to
what was put aside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from ..engines.base import has_values
from ..engines.cuda_graphs import capturing
from ..engines.no_grad import no_grad
from ..errors import AttachError
from ..gradients.coefficients import are_finite
from ..gradients.held import gradients_of, parameters_held
from ..gradients.norm_thresholds import NormThresholds
from ..gradients.policies import Settings
from ..gradients.step import Decision
from ..gradients.without_values import GradientsWithoutValues
from ..ranks.averaging import AveragingModules
from ..ranks.shards import is_dtensor, stored
from ..records.incidents import nonfinite_micro_batch_error
from ..records.record import ClipRecord, add_micro_batches
from ..records.recorder import Recorder
from .call_stack import running_scaler
from .grad_scaler import stage_of
from .joint import JointGradients

Aside = Sequence[tuple[Tensor, Tensor]]
"""Parameters, each with the gradient that was accumulated before the micro-batch."""


class MicroBatches:
    """The micro-batches of a clipper, of which at most one runs.

    Args:
        joint: The gradients of the clipper's optimizers.
        norm_thresholds: The thresholds of their norms.
        recorder: Knows the index of the step.
        settings: The options of the clipper.

    Raises:
        AttachError: The parameters are those of FSDP1.
    """

    def __init__(
        self,
        joint: JointGradients,
        norm_thresholds: NormThresholds,
        recorder: Recorder,
        settings: Settings,
    ) -> None:
        self._joint = joint
        self._norm_thresholds = norm_thresholds
        self._recorder = recorder
        self._settings = settings
        self._modules = AveragingModules(self._parameters())
        self._running = False
        self._are_local = False
        """True if DistributedDataParallel has not averaged the accumulated gradients."""
        self.counts: Tensor | None = None
        """Those since the step that was recorded last; see `ClipRecord.micro_batches`."""

    @contextmanager
    def one_of(self, count: int, loss: Callable[[], Tensor | float | None]) -> Iterator[None]:
        """Clip the gradients that are computed in a block as those of one of ``count``.

        If the block or the clipping raises, the gradients are those from before the block.

        Args:
            count: Number of the micro-batches.
            loss: Returns the loss at the end of the block, for a rule that reads it.

        Raises:
            AttachError: The gradients cannot be clipped by themselves.
        """
        self._refuse_unfit()
        aside = self._put_aside()
        try:
            yield
            self._clip_and_add(aside, count, loss())
        except BaseException:
            self._restore(aside)
            raise
        finally:
            self._running = False

    # At a step

    def check_step(self) -> None:
        """Check that an optimizer may step with what was accumulated.

        Raises:
            AttachError: A micro-batch is running, or was clipped without the scale that it has.
        """
        if self._running:
            raise AttachError(
                "An optimizer steps inside micro_batch(), where its gradients are those of one "
                "micro-batch alone: call step() after the block."
            )
        scaler, known = running_scaler(), self._joint.grad_scaler
        if self.counts is not None and scaler is not known and scaler and scaler.is_enabled():
            raise AttachError(
                "Micro-batches were clipped as if their gradients were not scaled, and a "
                "GradScaler steps: give it to the clipper as grad_scaler=."
            )

    def move_counts_to(self, record: ClipRecord) -> None:
        """Give the record of a step the counts of its micro-batches."""
        add_micro_batches(record, self.counts)
        self.counts = None

    # Around a micro-batch

    def _parameters(self) -> Iterator[Tensor]:
        return parameters_held(self._joint.optimizers)

    def _refuse_unfit(self) -> None:
        if self._running:
            raise AttachError(
                "micro_batch() was entered within another one, whose gradients it would take for "
                "accumulated ones: leave the outer block first."
            )
        if capturing():
            raise AttachError(
                "micro_batch() is entered while a CUDA graph is captured, which would repeat the "
                "clipping and not the counting: capture the steps without it."
            )
        scaler = self._joint.grad_scaler
        if scaler is not None:
            stages = [stage_of(scaler, each) for each in self._joint.optimizers]
            if scaler.is_enabled() and OptState.UNSCALED in stages:
                raise AttachError(
                    "grad_scaler.unscale_() was called before micro_batch(), whose gradients are "
                    "scaled: unscale when all micro-batches are accumulated."
                )
        self._modules.refuse_hidden()

    def _put_aside(self) -> Aside:
        """Take the accumulated gradients from the parameters."""
        held = {parameter: parameter.grad for parameter in self._parameters()}
        copied = self._modules.overwrite_gradients
        aside = [(p, g.clone() if copied else g) for p, g in held.items() if g is not None]
        self._running = True
        for parameter in held:
            parameter.grad = None
        return aside

    def _restore(self, aside: Aside) -> None:
        """Put the accumulated gradients back, and drop those of the micro-batch."""
        for parameter in self._parameters():
            parameter.grad = None
        for parameter, accumulated in aside:
            parameter.grad = accumulated

    @no_grad
    def _clip_and_add(self, aside: Aside, count: int, loss: Tensor | float | None) -> None:
        """Clip the gradients that are there, and add them to those that were put aside."""
        self._modules.refuse_hidden()
        self._check_average(accumulated=bool(aside))
        gradients = gradients_of(self._parameters())
        if not gradients:
            warnings.warn(
                "No gradient was computed within micro_batch(), so that nothing was clipped: call "
                "backward() inside the block.",
                UserWarning,
                stacklevel=5,
            )
        skip = self._clip(count, loss)
        if skip is True:
            self._restore(aside)
            return
        if isinstance(skip, Tensor):
            # Only the device knows: what is left out becomes 0, also outside of all norms.
            for gradient in gradients:
                _memory_of(gradient).masked_fill_(skip, 0)
        _add(aside)

    def _check_average(self, *, accumulated: bool) -> None:
        """Refuse to add gradients of all ranks to those of this rank alone, or the reverse."""
        are_local = self._modules.skipped_average
        if accumulated and are_local != self._are_local:
            raise AttachError(
                "DistributedDataParallel averages the gradients of this micro-batch alone, while "
                "others were accumulated under no_sync(): leave no_sync() out, so that each "
                "micro-batch is averaged and then clipped; or have all of them under no_sync(), "
                "each clipped on its rank, and average .grad over the ranks before step()."
            )
        self._are_local = are_local

    # Its clipping

    def _clip(self, count: int, loss: Tensor | float | None) -> bool | Tensor:
        """Clip the gradients that are there, and return whether to leave them out.

        No host sync, unless ``nonfinite`` is "raise". Collective if the norms span several ranks.
        """
        scaler = self._joint.grad_scaler
        scale = scaler._scale if scaler is not None and scaler.is_enabled() else None
        settings = _settings_of_one(self._settings, count, scaled=scale is not None)
        gradients = self._joint.of_micro_batch(settings, scale)
        if isinstance(gradients, GradientsWithoutValues):
            return False
        gradients.loss = loss
        norms = gradients.norms()
        step = self._recorder.next_step(norms, captured=False)
        thresholds = self._norm_thresholds.of_micro_batch(gradients, norms, step, count)
        decision = gradients.decide_(norms, thresholds)
        gradients.scale_(decision)
        self._count(norms, thresholds, decision)
        if settings.raises and decision.skip is True and not are_finite(norms):
            raise nonfinite_micro_batch_error(norms, step, gradients.parameter_sums)
        return decision.skip

    def _count(self, norms: Tensor, thresholds: Tensor, decision: Decision) -> None:
        finite = norms.isfinite()
        clipped = finite & ((norms > thresholds) | (decision.reduction < 1))
        counts = norms.new_ones(3)
        counts[1], counts[2] = clipped.any(), ~finite.all()
        self.counts = counts if self.counts is None else self.counts + counts


@lru_cache(maxsize=16)
def _settings_of_one(settings: Settings, count: int, *, scaled: bool) -> Settings:
    """Return the options for one of so many micro-batches.

    Args:
        settings: The options of the clipper.
        count: Number of the micro-batches.
        scaled: True if GradScaler scales the gradients: it finds overflows itself, at the step.
    """
    bound = settings.max_value
    return replace(
        settings,
        max_value=None if bound is None else bound / count,
        nonfinite="propagate" if scaled else settings.nonfinite,
    )


def _memory_of(gradient: Tensor) -> Tensor:
    """Return the dense tensor on this rank that holds the values of a gradient."""
    local = stored(gradient) if is_dtensor(gradient) else gradient
    return local._values() if local.is_sparse else local


def _add(aside: Aside) -> None:
    """Add the gradients of a micro-batch to the accumulated ones, in the memory of these."""
    memories = {id(accumulated): _memory_of(accumulated) for _, accumulated in aside}
    places = {key: memory.data_ptr() for key, memory in memories.items() if has_values(memory)}
    # Autograd can leave two parameters with gradients in one memory, each of which would be added
    # to the other.
    apart = len({*places.values()}) == len(places)
    sums: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, accumulated in aside:
        gradient, total = parameter.grad, accumulated
        if gradient is None:
            pass
        elif not apart or (accumulated.is_sparse and not gradient.is_sparse):
            total = gradient + accumulated
        elif type(accumulated) is type(gradient) is Tensor and not accumulated.is_sparse:
            sums.append(accumulated)
            added.append(gradient)
        else:
            accumulated.add_(gradient)
        parameter.grad = total
    if sums:
        torch._foreach_add_(sums, added)

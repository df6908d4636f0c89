"""Which gradients are clipped together when an optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..engines import engine_for
from ..engines.base import host_may_read
from ..errors import AttachError
from ..gradients.held import HeldGradients, Weight, gradients_held, gradients_of, parameters_held
from ..gradients.policies import Settings
from ..gradients.step import StepGradients
from ..ranks.agreement import SCOPES_BY_NAME, RankLayout
from ..records.record import ClipRecord
from ..scopes.labels import NormLabels
from ..thresholds import Threshold, is_foreign, learns
from .clipped_already import ClippedGradients
from .grad_scaler import mark_of
from .joint_scaling import JointScaling
from .shared_overflow import SharedOverflow, refuse_unshared_overflow
from .step_changes import StepChanges
from .supported import check_groups, refuse_within_backward


class JointGradients:
    """The gradients of the optimizers that one clipper holds.

    With one optimizer, all of its gradients are clipped at each of its steps. With several, those
    of one backward pass share the norms: at the first step all that are new are clipped, and at
    the steps of the others nothing, unless some of their gradients were computed since.

    Args:
        optimizers: The optimizers.
        grad_scaler: The GradScaler of several optimizers, or None.
        settings: How to measure and what may be written.
        labels: The labels of the norms.
        rank_layout: The other ranks.
        threshold: What will be asked about the norms.

    Raises:
        EngineUnavailableError: The engine does not serve a device of the parameters.
        AttachError: The ranks do not fit together.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        grad_scaler: object,
        settings: Settings,
        labels: NormLabels,
        rank_layout: RankLayout,
        threshold: Threshold,
    ) -> None:
        self.optimizers = optimizers
        self._settings = settings
        self._labels = labels
        self._rank_layout = rank_layout
        self._needs_weights = threshold.needs_weights
        self._needs_present = learns(threshold) or is_foreign(threshold)
        self._named: tuple[Sequence[Tensor], Sequence[str]] = (), ()
        self._scaling = JointScaling(grad_scaler, everywhere=rank_layout.across is not None)
        self._clipped_gradients = ClippedGradients() if len(optimizers) > 1 else None
        self._overflow: SharedOverflow | None = None
        self._round: WeakSet[Optimizer] = WeakSet()
        self._states: object = None
        for device in self.devices:
            engine_for(settings.engine, device)
        rank_layout.refresh(parameters_held(optimizers))

    def attach(self, grad_scaler: object) -> None:
        """Let ranks agree on the overflows of the GradScaler, until `detach`."""
        across = self._rank_layout.across
        if across is not None and isinstance(grad_scaler, GradScaler):
            self._overflow = SharedOverflow(grad_scaler, self.optimizers, across, self.device)

    def detach(self) -> None:
        """Leave the GradScaler as it was; the second call does nothing."""
        if self._overflow is not None:
            self._overflow.release()

    @property
    def device(self) -> torch.device:
        """Where the norms are: with the first parameter."""
        first = next(parameters_held(self.optimizers), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def devices(self) -> list[torch.device]:
        """Where norms and parameters are, each device once."""
        return list(
            {self.device: None, **{p.device: None for p in parameters_held(self.optimizers)}}
        )

    def at_step(
        self, stepping: Optimizer, step_changes: StepChanges
    ) -> StepGradients | ClipRecord | None:
        """Return what is to be clipped before a step.

        Returns:
            The gradients; or the record of the clipping that has covered them; or None where
            there is nothing to do, as at a step that GradScaler leaves out.

        Raises:
            AttachError: It cannot be clipped rightly now; nothing was written.
            ArgumentError: A group or parameter that was added cannot be labelled.
        """
        refuse_within_backward(stepping)
        for optimizer in self.optimizers:
            check_groups(optimizer)
        self._labels.refresh()
        self._rank_layout.refresh(parameters_held(self.optimizers))
        if self._rank_layout.across is not None:
            refuse_unshared_overflow(self._overflow)
        overflow = mark_of(stepping, "found_inf")
        if overflow is not None:
            overflow = overflow > 0
            if host_may_read(overflow) or self._clipped_gradients is not None:
                if overflow:
                    return None
                overflow = None
        if self._clipped_gradients is not None:
            return self._of_several(self._clipped_gradients, stepping, step_changes)
        return self._of_one(stepping, overflow)

    def mark_clipped(self, gradients: Sequence[Tensor], record: ClipRecord) -> None:
        """Remember what has been clipped, with its record."""
        if self._clipped_gradients is not None:
            self._clipped_gradients.clipped(gradients, record)

    def mark_stepped(self, optimizer: Optimizer) -> None:
        """Remember the gradients of an optimizer as its step has left them."""
        if self._clipped_gradients is not None:
            self._clipped_gradients.stepped(optimizer, gradients_held(optimizer))

    def _of_one(self, optimizer: Optimizer, overflow: Tensor | None) -> StepGradients:
        held = self._held_by([optimizer])
        return self._step_gradients(held, scale=mark_of(optimizer, "grad_scale"), overflow=overflow)

    def _of_several(
        self, clipped_gradients: ClippedGradients, stepping: Optimizer, step_changes: StepChanges
    ) -> StepGradients | ClipRecord | None:
        self._scaling.unscale(stepping, self.optimizers, step_changes)
        own = self._held_by([stepping]).gradients
        if self._rank_layout.across is not None:
            return self._of_round(clipped_gradients, stepping, own)
        if not own:
            return self._of_none(stepping)
        covering = [clipped_gradients.record_for(stepping, gradient) for gradient in own]
        records = [record for record in covering if record is not None]
        if len(records) == len(own):
            return max(records, key=lambda record: record.step)
        self._scaling.refuse_new(stepping, [g for g in own if not clipped_gradients.knows(g)])
        left, partial = self._still_to_step(stepping)
        needed = {id(gradient) for gradient in own}
        held = self._held_by([stepping, *left]).filtered(
            lambda gradient: id(gradient) in needed or not clipped_gradients.knows(gradient)
        )
        return self._step_gradients(held, partial=partial)

    def _still_to_step(self, stepping: Optimizer) -> tuple[list[Optimizer], bool]:
        """Return the others whose gradients are of use, and whether an overflow left one out."""
        others = [optimizer for optimizer in self.optimizers if optimizer is not stepping]
        overflowed = [each for each in others if self._scaling.overflowed(each)]
        left_out = {*overflowed, *filter(self._scaling.stepped, others)}
        return [each for each in others if each not in left_out], bool(overflowed)

    def _of_round(
        self, clipped_gradients: ClippedGradients, stepping: Optimizer, own: Sequence[Tensor]
    ) -> StepGradients | ClipRecord | None:
        """Return what is clipped together with other ranks, which may have gradients of others.

        A round begins with an optimizer that has stepped in the last one, or after an update of
        the scaler: all ranks know that, whatever gradients they have.
        """
        states = self._scaling.states
        if self._round and stepping not in self._round and states is self._states:
            self._round.add(stepping)
            records = [clipped_gradients.record_for(stepping, gradient) for gradient in own]
            if None in records:
                raise AttachError(
                    f"Gradients of {type(stepping).__name__} were computed after another optimizer "
                    "of the clipper had stepped, and ranks agree on those of one backward pass: "
                    "step with all of them before the next one, or give each of them a clipper of "
                    "its own."
                )
            return max(filter(None, records), key=lambda record: record.step, default=None)
        self._round, self._states = WeakSet([stepping]), states
        left, partial = self._still_to_step(stepping)
        covered = {
            id(gradient)
            for optimizer in (stepping, *left)
            for gradient in gradients_held(optimizer)
            if clipped_gradients.record_for(optimizer, gradient) is not None
        }
        held = self._held_by([stepping, *left])
        held = held.filtered(lambda gradient: id(gradient) not in covered)
        return self._step_gradients(held, partial=partial)

    def _of_none(self, stepping: Optimizer) -> StepGradients | None:
        """Record a step for which nobody has a gradient once, as that of the first optimizer."""
        if any(map(gradients_held, self.optimizers)) or stepping is not self.optimizers[0]:
            return None
        return self._step_gradients(HeldGradients())

    def _step_gradients(self, held: HeldGradients, **options: Any) -> StepGradients:
        labels, rank_layout = self._labels, self._rank_layout
        names = (
            rank_layout.names
            if rank_layout.norm_ranks
            else held.names
            if rank_layout.wants_parameter_norms
            else None
        )
        joint = self._one_norm_for_all or labels.has_one_norm
        return StepGradients(
            held.gradients,
            None if joint else held.norm_indices,
            self._settings,
            len(labels.names),
            self.device,
            weights=held.weights if self._needs_weights else None,
            names=names,
            norm_ranks=rank_layout.norm_ranks,
            counts_here=() if labels.all_count else held.counts_here,
            parts=rank_layout.parameter_indices(held.names),
            needs_present=self._needs_present,
            **options,
        )

    def _held_by(self, optimizers: Sequence[Optimizer]) -> HeldGradients:
        """Return the distinct gradients of optimizers that belong to some norm."""
        parameters = [*parameters_held(optimizers)]
        if self._one_norm_for_all:
            gradients = gradients_of(parameters)
            return HeldGradients(gradients, names=self._names(parameters, gradients))
        names: list[str] = []
        held, seen = HeldGradients(names=names), set()
        # What has a norm of its own has a threshold as well while its gradient is on other ranks.
        idle = self._needs_weights and self._labels.kind in SCOPES_BY_NAME
        for parameter in parameters:
            gradient = parameter.grad
            if id(gradient) in seen or (gradient is None and not idle):
                continue
            known = self._labels.of(parameter)
            if known.norm_indices is None:
                continue
            if self._needs_weights:
                held.weights.append(Weight(parameter, known.norm_indices, known.counts))
            if gradient is not None:
                seen.add(id(gradient))
                held.gradients.append(gradient)
                held.norm_indices.append(known.norm_indices)
                held.counts_here.append(known.counts)
                names.append(known.name)
        return held

    def _names(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[str]:
        """Return the names of the parameters that gradients belong to, where they are wanted."""
        if not self._rank_layout.wants_parameter_norms:
            return ()
        if len(gradients) < len(parameters):
            held = {id(each.grad): each for each in reversed(parameters)}
            return [self._labels.of(held[id(gradient)]).name for gradient in gradients]
        named, names = self._named
        if len(named) != len(parameters) or not all(map(is_, named, parameters)):
            names = [self._labels.of(each).name for each in parameters]
            self._named = parameters, names
        return names

    @property
    def _one_norm_for_all(self) -> bool:
        return self._labels.is_global and not self._needs_weights

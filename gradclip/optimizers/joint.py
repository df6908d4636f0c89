"""Which gradients are clipped together when an optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engines import engine_for
from ..engines.base import host_may_read
from ..gradients.held import HeldGradients, Weight, gradients_of, parameters_held
from ..gradients.policies import Settings
from ..gradients.step import StepGradients
from ..ranks.agreement import SCOPES_BY_NAME
from ..ranks.layout import RankLayout
from ..records.record import ClipRecord
from ..scopes.labels import NormLabels
from ..thresholds import Threshold, is_foreign, learns
from .grad_scaler import checked_scaler, mark_of
from .several import Selection, SeveralOptimizers
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
        self._grad_scaler = checked_scaler(grad_scaler)
        self._overflow: SharedOverflow | None = None
        self._several: SeveralOptimizers | None = None
        if len(optimizers) > 1:
            across_ranks = rank_layout.across is not None
            self._several = SeveralOptimizers(
                optimizers, self._grad_scaler, self._held_by, across_ranks=across_ranks
            )
        for device in self.devices:
            engine_for(settings.engine, device)
        rank_layout.refresh(parameters_held(optimizers))

    def attach(self) -> None:
        """Let ranks share the overflows of the GradScaler until `detach`."""
        scaler, across = self._grad_scaler, self._rank_layout.across
        if scaler is not None and across is not None:
            self._overflow = SharedOverflow(scaler, self.optimizers, across, self.device)

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
            # The scales of several optimizers were read on the host in any case.
            if host_may_read(overflow) or self._several is not None:
                if overflow:
                    return None
                overflow = None
        if self._several is None:
            held, scale = self._held_by([stepping]), mark_of(stepping, "grad_scale")
            return self._step_gradients(held, scale=scale, overflow=overflow)
        choice = self._several.at_step(stepping, step_changes)
        if not isinstance(choice, Selection):
            return choice
        return self._step_gradients(choice.held, partial=choice.partial)

    def mark_clipped(self, gradients: Sequence[Tensor], record: ClipRecord) -> None:
        """Remember gradients as they were clipped, with the record of the clipping."""
        if self._several is not None:
            self._several.mark_clipped(gradients, record)

    def mark_stepped(self, optimizer: Optimizer) -> None:
        """Remember the gradients of an optimizer as its step has left them."""
        if self._several is not None:
            self._several.mark_stepped(optimizer)

    def _step_gradients(self, held: HeldGradients, **options: Any) -> StepGradients:
        labels, rank_layout = self._labels, self._rank_layout
        names = rank_layout.parameter_names(held.names)
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
            parameter_indices=rank_layout.parameter_indices(held.names),
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

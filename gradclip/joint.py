"""Which gradients are clipped together when an optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .changes import Changes
from .coverage import Coverage
from .engines import engine_for
from .engines.base import host_may_read
from .gradients import gradients_held, gradients_of, parameters_of
from .labels import NormLabels
from .optimizers import check_groups, refuse_within_backward
from .places import Place
from .ranks import Group, groups_of
from .records import ClipRecord
from .scaling import JointScaling, mark_of
from .settings import Settings
from .step_gradients import StepGradients


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
        weighed: Whether the norms of the parameters will be asked for.
        watched: Whether the parts of the norms are.

    Raises:
        EngineUnavailableError: The engine does not serve a device of the parameters.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        grad_scaler: object,
        settings: Settings,
        labels: NormLabels,
        weighed: bool = False,
        watched: bool = False,
    ) -> None:
        self.optimizers = optimizers
        self._settings = settings
        self._labels = labels
        self._weighed = weighed
        self._watched = watched
        self._named: tuple[Sequence[Tensor], Sequence[str]] = (), ()
        self._scaling = JointScaling(grad_scaler)
        self._coverage = Coverage() if len(optimizers) > 1 else None
        self._groups: tuple[Group, ...] = ()
        self._grouped = -1
        for device in self.devices:
            engine_for(settings.engine, device)

    @property
    def device(self) -> torch.device:
        """Where the norms are: with the first parameter."""
        first = next(_parameters_held(self.optimizers), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def devices(self) -> list[torch.device]:
        """Where norms and parameters are, each device once."""
        return list(
            {self.device: None, **{p.device: None for p in _parameters_held(self.optimizers)}}
        )

    def at_step(self, stepping: Optimizer, changes: Changes) -> StepGradients | ClipRecord | None:
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
        overflow = mark_of(stepping, "found_inf")
        if overflow is not None:
            overflow = overflow > 0
            if host_may_read(overflow) or self._coverage is not None:
                if overflow:
                    return None
                overflow = None
        if self._coverage is not None:
            return self._of_several(self._coverage, stepping, changes)
        return self._of_one(stepping, overflow)

    def cover(self, gradients: Sequence[Tensor], record: ClipRecord) -> None:
        """Remember what has been clipped, with its record."""
        if self._coverage is not None:
            self._coverage.clipped(gradients, record)

    def cover_stepped(self, optimizer: Optimizer) -> None:
        """Remember the gradients of an optimizer as its step has left them."""
        if self._coverage is not None:
            self._coverage.stepped(optimizer, gradients_held(optimizer))

    def _of_one(self, optimizer: Optimizer, overflow: Tensor | None) -> StepGradients:
        held = self._held_by([optimizer])
        return self._step_gradients(held, scale=mark_of(optimizer, "grad_scale"), overflow=overflow)

    def _of_several(
        self, coverage: Coverage, stepping: Optimizer, changes: Changes
    ) -> StepGradients | ClipRecord | None:
        self._scaling.unscale(stepping, self.optimizers, changes)
        own = self._held_by([stepping]).gradients
        if not own:
            return self._of_none(stepping)
        covering = [coverage.record_for(stepping, gradient) for gradient in own]
        records = [record for record in covering if record is not None]
        if len(records) == len(own):
            return max(records, key=lambda record: record.step)
        self._scaling.refuse_new(stepping, [g for g in own if not coverage.knows(g)])
        others = [optimizer for optimizer in self.optimizers if optimizer is not stepping]
        overflowed = [each for each in others if self._scaling.overflowed(each)]
        left_out = {*overflowed, *filter(self._scaling.stepped, others)}
        left = [each for each in others if each not in left_out]
        needed = {id(gradient) for gradient in own}
        held = self._held_by([stepping, *left]).filtered(
            lambda gradient: id(gradient) in needed or not coverage.knows(gradient)
        )
        return self._step_gradients(held, partial=bool(overflowed))

    def _of_none(self, stepping: Optimizer) -> StepGradients | None:
        """Record a step for which nobody has a gradient once, as that of the first optimizer."""
        if any(map(gradients_held, self.optimizers)) or stepping is not self.optimizers[0]:
            return None
        return self._step_gradients(Held())

    def _step_gradients(self, held: Held, **options: Any) -> StepGradients:
        labels, parameters = self._labels, held.parameters if self._weighed else ()
        groups = self._groups_now()
        joint = self._everything or labels.single
        return StepGradients(
            held.gradients,
            None if joint else held.places,
            self._settings,
            len(labels.names),
            self.device,
            parameters=parameters,
            names=held.names if self._watched and not groups else None,
            groups=groups,
            **options,
        )

    def _groups_now(self) -> tuple[Group, ...]:
        """Return the ranks that the parameters are spread over, of new ones as well."""
        count = self._labels.count
        if count != self._grouped:
            self._groups, self._grouped = groups_of(_parameters_held(self.optimizers)), count
        return self._groups

    def _held_by(self, optimizers: Sequence[Optimizer]) -> Held:
        """Return the distinct gradients of optimizers that belong to some norm."""
        parameters = [*_parameters_held(optimizers)]
        if self._everything:
            gradients = gradients_of(parameters)
            return Held(gradients, names=self._names(parameters, gradients))
        names: list[str] = []
        held, seen = Held(names=names), set()
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None or id(gradient) in seen:
                continue
            known = self._labels.of(parameter)
            if known.place is not None:
                seen.add(id(gradient))
                held.gradients.append(gradient)
                held.places.append(known.place)
                held.parameters.append(parameter)
                names.append(known.name)
        return held

    def _names(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[str]:
        """Return the names of the parameters that gradients belong to, where they are wanted."""
        if not self._watched:
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
    def _everything(self) -> bool:
        return self._labels.everything and not self._weighed


@dataclass(frozen=True, slots=True)
class Held:
    """Gradients that optimizers hold."""

    gradients: list[Tensor] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    """For each where its norms are; empty where all share one."""
    parameters: list[Tensor] = field(default_factory=list)
    """For each the parameter it belongs to; empty where all share one."""
    names: Sequence[str] = field(default_factory=list)
    """For each the name of that parameter; empty where nobody asks for it."""

    def filtered(self, wanted: Callable[[Tensor], bool]) -> Held:
        """Return those of which the gradient is wanted."""
        kept = [wanted(gradient) for gradient in self.gradients]
        return Held(
            list(compress(self.gradients, kept)),
            list(compress(self.places, kept)),
            list(compress(self.parameters, kept)),
            list(compress(self.names, kept)),
        )


def _parameters_held(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    return parameters_of(group for optimizer in optimizers for group in optimizer.param_groups)

"""The same choice for several optimizers: new gradients of all at the first step, then none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..errors import ArgumentError, AttachError
from ..gradients.held import HeldGradients, gradients_held
from ..records.record import ClipRecord
from .clipped_already import ClippedGradients
from .joint_scaling import JointScaling
from .step_changes import StepChanges


class Selection(NamedTuple):
    """Gradients that share their norms at one step."""

    held: HeldGradients
    partial: bool
    """True if an optimizer's gradients are missing because GradScaler skips its step."""


class SeveralOptimizers:
    """Several optimizers whose gradients of one backward pass share their norms.

    At the first step after a backward pass all gradients that it computed are clipped, whoever
    holds them. At the steps of the other optimizers nothing is left to do. Whether a gradient was
    clipped is a question to the gradient, by object and version, and not to the order of steps: a
    GAN steps its optimizers in turn after backward passes of their own, and a loop may step one
    of them more often than the other.

    Args:
        optimizers: The optimizers.
        grad_scaler: The GradScaler that scales their loss, or None.
        held_by: Returns the distinct gradients of optimizers that belong to some norm.
        across_ranks: Whether other ranks may hold gradients of optimizers that have none here.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        grad_scaler: GradScaler | None,
        held_by: Callable[[Sequence[Optimizer]], HeldGradients],
        *,
        across_ranks: bool,
    ) -> None:
        self._optimizers = optimizers
        self._held_by = held_by
        self._across_ranks = across_ranks
        self._scaling = JointScaling(grad_scaler, everywhere=across_ranks)
        self._clipped = ClippedGradients()
        self._round: WeakSet[Optimizer] = WeakSet()
        """Across ranks: the optimizers that have stepped since the last collective."""
        self._round_states: object = None
        """The GradScaler's record of its optimizers when the round began."""

    def at_step(
        self, stepping: Optimizer, step_changes: StepChanges
    ) -> Selection | ClipRecord | None:
        """Return the gradients to clip before a step. Host sync under a GradScaler.

        Args:
            stepping: The optimizer that is about to step.
            step_changes: The changes that last until that step ends.

        Returns:
            The gradients; or the record of the clipping that they have already had; or None where
            no optimizer has a gradient.

        Raises:
            AttachError: The gradients cannot be brought to one scale, or they were computed too
                late to share a norm with those of other ranks.
        """
        self._scaling.unscale(stepping, self._optimizers, step_changes)
        gradients = self._held_by([stepping]).gradients
        if self._across_ranks:
            return self._across(stepping, gradients)
        if not gradients:
            return self._without_gradients(stepping)
        records = self._clipped.records_for(stepping, gradients)
        if None not in records:
            return _newest(records)
        others, partial = self._still_to_step(stepping)
        held = self._held_by([stepping, *others])
        known = self._clipped.known_among(held.gradients)
        self._scaling.refuse_new(stepping, [g for g in gradients if id(g) not in known])
        # All of the stepping optimizer's gradients are measured, also those that were clipped and
        # stepped with before, as it steps with them again. Of the other optimizers only new
        # gradients are: the rest is within its threshold already.
        return Selection(held.without(known.difference(map(id, gradients))), partial)

    def mark_clipped(self, gradients: Sequence[Tensor], record: ClipRecord) -> None:
        """Remember gradients as a clipping has left them, with its record."""
        self._clipped.add(gradients, record)

    def mark_stepped(self, optimizer: Optimizer) -> None:
        """Remember the gradients of an optimizer as its step has left them."""
        self._clipped.mark_stepped(optimizer, gradients_held(optimizer))

    def _across(
        self, stepping: Optimizer, gradients: Sequence[Tensor]
    ) -> Selection | ClipRecord | None:
        """Choose the same way on all ranks, although some have no gradient of this optimizer.

        Gradients cannot decide here whether the ranks measure together, since they differ from
        rank to rank. A round decides instead, whose beginning all ranks know: it begins with an
        optimizer that has stepped in the round before, or after an update of the GradScaler.
        """
        states = self._scaling.states
        if self._round and stepping not in self._round and states is self._round_states:
            self._round.add(stepping)
            records = self._clipped.records_for(stepping, gradients)
            if None in records:
                raise AttachError(
                    f"Gradients of {type(stepping).__name__} were computed after another optimizer "
                    "of the clipper had stepped, and ranks agree on those of one backward pass: "
                    "step with all of them before the next one, or give each of them a clipper of "
                    "its own."
                )
            return _newest(records)
        self._round, self._round_states = WeakSet([stepping]), states
        others, partial = self._still_to_step(stepping)
        waiting = [stepping, *others]
        clipped = {
            id(gradient)
            for optimizer in waiting
            for gradients in [gradients_held(optimizer)]
            for gradient in compress(gradients, self._clipped.records_for(optimizer, gradients))
        }
        return Selection(self._held_by(waiting).without(clipped), partial)

    def _without_gradients(self, stepping: Optimizer) -> Selection | None:
        """Let the first optimizer record a step for which no optimizer has a gradient, once."""
        if stepping is not self._optimizers[0] or any(map(gradients_held, self._optimizers)):
            return None
        return Selection(HeldGradients(), partial=False)

    def _still_to_step(self, stepping: Optimizer) -> tuple[list[Optimizer], bool]:
        """Return the other optimizers that will step, and whether an overflow skips one of them.

        Without a GradScaler that is all of them. Gradients of the rest are of no use: their
        overflow would make the joint norm infinite, and what was added to them since their step
        carries the scale.
        """
        others = [optimizer for optimizer in self._optimizers if optimizer is not stepping]
        if self._scaling.states is None:
            return others, False
        overflowed = [optimizer for optimizer in others if self._scaling.overflowed(optimizer)]
        skipped = {*overflowed, *filter(self._scaling.stepped, others)}
        return [optimizer for optimizer in others if optimizer not in skipped], bool(overflowed)


def _newest(records: Sequence[ClipRecord | None]) -> ClipRecord | None:
    """Return the newest record; None without records."""
    return max({*records}, key=attrgetter("step"), default=None)


def step_each(optimizers: Sequence[Optimizer], closure: Callable[[], Any] | None) -> Any:
    """Take a step of each optimizer in turn; return what a single one returns, else None.

    Raises:
        ArgumentError: A closure was given for several optimizers, each of which would evaluate it.
    """
    if len(optimizers) == 1:
        [optimizer] = optimizers
        return optimizer.step() if closure is None else optimizer.step(closure)
    if closure is not None:
        raise ArgumentError(
            f"step() was given a closure, and the clipper has {len(optimizers)} "
            "optimizers, each of which would evaluate it again: call backward() and then "
            "step() without a closure, or give the closure to one optimizer's own step()."
        )
    for optimizer in optimizers:
        optimizer.step()
    return None

"""Several optimizers under one GradScaler: their gradients are unscaled before a joint norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ..errors import AttachError
from ..gradients.held import gradients_held
from .call_stack import running_scaler
from .clipped_already import TensorVersion
from .grad_scaler import found_inf_of, is_true, mark_of, overflowed, stage_of

if TYPE_CHECKING:
    from .step_changes import StepChanges


class JointScaling:
    """Brings the gradients of several optimizers to one scale before their norm is taken.

    Args:
        grad_scaler: The GradScaler of all of them; None where the loss is not scaled.
        everywhere: Whether other ranks have gradients of optimizers that have none here.
    """

    def __init__(self, grad_scaler: GradScaler | None, *, everywhere: bool = False) -> None:
        self._given = grad_scaler
        self._everywhere = everywhere
        self._scaler: GradScaler | None = None
        self._early: dict[int, _Early] = {}

    def unscale(
        self, stepping: Optimizer, optimizers: Sequence[Optimizer], step_changes: StepChanges
    ) -> None:
        """Unscale the gradients of all optimizers, each once for each update of the scaler.

        Host sync.

        Raises:
            AttachError: They carry scales that differ and can't be brought to one.
        """
        scaler = self._scaler = self._given or running_scaler()
        if self._given is None:
            _refuse_different_scales(scaler, stepping, optimizers)
        elif scaler is not None and scaler.is_enabled() and scaler._scale is not None:
            self._unscale_all(scaler, stepping, optimizers)
            if mark_of(stepping, "grad_scale") is not None:
                step_changes.set("grad_scale", None)

    def refuse_new(self, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
        """Refuse gradients that were computed since they were unscaled early.

        Args:
            optimizer: The optimizer that steps.
            gradients: Those of its gradients that no clipping has covered.

        Raises:
            AttachError: The scaler takes them for unscaled.
        """
        early = self._early.get(id(optimizer))
        if early is not None and not all(map(early.knows, gradients)):
            raise AttachError(
                f"Gradients of {type(optimizer).__name__} were computed after they had been "
                "unscaled for a joint norm, so that GradScaler does not unscale them again: call "
                "grad_scaler.update() after each optimizer's step, or give optimizers with "
                "different losses, as those of a GAN, a clipper each."
            )

    @property
    def states(self) -> object:
        """What the running scaler knows of optimizers since its last update; else None."""
        return None if self._scaler is None else self._scaler._per_optimizer_states

    def overflowed(self, optimizer: Optimizer) -> bool:
        """Tell whether the scaler leaves out the optimizer's step. Host sync, as it has itself."""
        return self._scaler is not None and overflowed(self._scaler, optimizer)

    def stepped(self, optimizer: Optimizer) -> bool:
        """Tell whether the optimizer has stepped since the scaler was updated.

        It will not step again before that, and what was added to its gradients is still scaled.
        """
        return self._scaler is not None and stage_of(self._scaler, optimizer) is OptState.STEPPED

    def _unscale_all(
        self, scaler: GradScaler, stepping: Optimizer, optimizers: Sequence[Optimizer]
    ) -> None:
        held = {each: gradients_held(each) for each in optimizers}
        self._check(scaler, stepping, held)
        updated = [key for key, early in self._early.items() if early.updated(scaler)]
        for key in updated:
            del self._early[key]
        for optimizer, gradients in held.items():
            asked = gradients or self._everywhere
            if asked and stage_of(scaler, optimizer) is OptState.READY:
                scaler.unscale_(optimizer)
                if optimizer is not stepping:
                    self._early[id(optimizer)] = _Early(scaler, optimizer, gradients)

    def _check(
        self, scaler: GradScaler, stepping: Optimizer, held: dict[Optimizer, list[Tensor]]
    ) -> None:
        if stage_of(scaler, stepping) is OptState.READY and mark_of(stepping, "grad_scale") is None:
            raise AttachError(
                f"The gradients of {type(stepping).__name__} are still scaled by grad_scaler: "
                "call grad_scaler.step(optimizer) instead of its own step(), or first "
                "grad_scaler.unscale_(optimizer)."
            )
        ids = [id(gradient) for gradients in held.values() for gradient in gradients]
        if len(set(ids)) < len(ids):
            raise AttachError(
                "Two of the optimizers hold the same parameter, whose gradient GradScaler "
                "unscales once for each: give it to one of them only."
            )
        for optimizer, gradients in held.items():
            early = self._early.get(id(optimizer))
            if early is not None and early.mixed(scaler, gradients):
                raise AttachError(
                    f"The gradients of {type(optimizer).__name__} were unscaled for a joint norm, "
                    "and the scaler was updated before it took its step: what was added since has "
                    "another scale. Under a GradScaler step every optimizer, or set its gradients "
                    "to None with zero_grad(), before grad_scaler.update()."
                )


class _Early:
    """Gradients that were unscaled at the step of another optimizer."""

    def __init__(
        self, scaler: GradScaler, optimizer: Optimizer, gradients: Sequence[Tensor]
    ) -> None:
        self._gradients = {id(gradient): TensorVersion(gradient) for gradient in gradients}
        self._optimizer = id(optimizer)
        self._found = found_inf_of(scaler, optimizer)
        self._state = scaler._per_optimizer_states[id(optimizer)]

    def updated(self, scaler: GradScaler) -> bool:
        """Tell whether the scaler was updated since."""
        return scaler._per_optimizer_states.get(self._optimizer) is not self._state

    def mixed(self, scaler: GradScaler, gradients: Sequence[Tensor]) -> bool:
        """Tell whether scaled gradients may have been added to them after an update.

        Not where the scaler has left out the optimizer's step, so that they are of no use, nor
        after that step.
        """
        if not self.updated(scaler) or self._state["stage"] is OptState.STEPPED:
            return False
        kept = any(seen.is_of(g) for g in gradients if (seen := self._gradients.get(id(g))))
        return kept and not is_true(self._found)

    def knows(self, gradient: Tensor) -> bool:
        """Tell whether a gradient is as it was when it was unscaled."""
        seen = self._gradients.get(id(gradient))
        return seen is not None and seen.unchanged(gradient)


def _refuse_different_scales(
    scaler: GradScaler | None, stepping: Optimizer, optimizers: Sequence[Optimizer]
) -> None:
    others = [
        optimizer
        for optimizer in optimizers
        if optimizer is not stepping and gradients_held(optimizer)
    ]
    scaled = scaler is not None and any(stage_of(scaler, o) is OptState.READY for o in others)
    if scaled or (others and mark_of(stepping, "grad_scale") is not None):
        raise AttachError(
            "GradScaler has not unscaled the gradients of all the optimizers, so that their scales "
            "differ: give the clipper grad_scaler=, or call grad_scaler.unscale_ for each of them "
            "before the first step."
        )

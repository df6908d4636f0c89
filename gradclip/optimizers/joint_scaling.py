"""Unscales the gradients of several optimizers under one GradScaler, before their joint norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ..errors import AttachError
from ..gradients.held import gradients_held
from .call_stack import running_scaler
from .clipped_already import TensorVersions
from .grad_scaler import found_inf_of, is_overflow, mark_of, overflowed, stage_of
from .step_changes import StepChanges


class JointScaling:
    """Brings the gradients of several optimizers to one scale before their norm is taken.

    GradScaler unscales an optimizer's gradients at that optimizer's step, so that at the first
    step those of the others still carry the scale, 1 beside 65536. A joint norm needs all of them
    at once: this unscales them early, and sees to it that nothing is added to them afterwards.

    Args:
        grad_scaler: The GradScaler that the clipper was given, or None.
        everywhere: Whether other ranks may hold gradients of optimizers that have none here, so
            that the scaler has to look for overflows of these as well.
    """

    def __init__(self, grad_scaler: GradScaler | None, *, everywhere: bool = False) -> None:
        self._given = grad_scaler
        self._everywhere = everywhere
        self._scaler: GradScaler | None = None
        """The scaler of the step that is running."""
        self._early: dict[int, _EarlyUnscaled] = {}
        """By id of the optimizer, until the scaler's next update."""

    def unscale(
        self, stepping: Optimizer, optimizers: Sequence[Optimizer], step_changes: StepChanges
    ) -> None:
        """Unscale the gradients of all optimizers, once between two updates of the scaler.

        Host sync.

        Args:
            stepping: The optimizer that is about to step.
            optimizers: All optimizers.
            step_changes: The changes that last until that step ends.

        Raises:
            AttachError: Their scales differ and cannot be brought to one.
        """
        scaler = self._scaler = self._given or running_scaler()
        if self._given is None:
            _refuse_different_scales(scaler, stepping, optimizers)
        elif scaler is not None and scaler.is_enabled() and scaler._scale is not None:
            self._unscale_all(scaler, stepping, optimizers)
            if mark_of(stepping, "grad_scale") is not None:
                # A fused optimizer would unscale its gradients once more.
                step_changes.set("grad_scale", None)

    def refuse_new(self, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
        """Refuse gradients that were computed after the early unscaling.

        Args:
            optimizer: The optimizer that steps.
            gradients: Those of its gradients that were not clipped yet.

        Raises:
            AttachError: They are scaled, and the scaler takes them for unscaled.
        """
        early = self._early.get(id(optimizer))
        if early is not None and not early.knows(gradients):
            raise AttachError(
                f"Gradients of {type(optimizer).__name__} were computed after they had been "
                "unscaled for a joint norm, so that GradScaler does not unscale them again: call "
                "grad_scaler.update() after each optimizer's step, or give optimizers with "
                "different losses, as those of a GAN, a clipper each."
            )

    @property
    def states(self) -> object:
        """The running scaler's record of its optimizers, another object after each update.

        None without a scaler that scales.
        """
        scaler = self._scaler
        return scaler._per_optimizer_states if scaler is not None and scaler.is_enabled() else None

    def overflowed(self, optimizer: Optimizer) -> bool:
        """Return whether the scaler skips the optimizer's step. Host sync, as in the scaler."""
        return self._scaler is not None and overflowed(self._scaler, optimizer)

    def stepped(self, optimizer: Optimizer) -> bool:
        """Return whether the optimizer has stepped since the scaler's last update.

        It cannot step again before the next, and what is added to its gradients is still scaled.
        """
        return self._scaler is not None and stage_of(self._scaler, optimizer) is OptState.STEPPED

    def _unscale_all(
        self, scaler: GradScaler, stepping: Optimizer, optimizers: Sequence[Optimizer]
    ) -> None:
        gradients_by_optimizer = {each: gradients_held(each) for each in optimizers}
        self._check(scaler, stepping, gradients_by_optimizer)
        updated = [key for key, early in self._early.items() if early.updated(scaler)]
        for key in updated:
            del self._early[key]
        for optimizer, gradients in gradients_by_optimizer.items():
            needed = gradients or self._everywhere
            if needed and stage_of(scaler, optimizer) is OptState.READY:
                scaler.unscale_(optimizer)
                if optimizer is not stepping:
                    self._early[id(optimizer)] = _EarlyUnscaled(scaler, optimizer, gradients)

    def _check(
        self,
        scaler: GradScaler,
        stepping: Optimizer,
        gradients_by_optimizer: dict[Optimizer, list[Tensor]],
    ) -> None:
        if stage_of(scaler, stepping) is OptState.READY and mark_of(stepping, "grad_scale") is None:
            raise AttachError(
                f"The gradients of {type(stepping).__name__} are still scaled by grad_scaler: "
                "call grad_scaler.step(optimizer) instead of its own step(), or first "
                "grad_scaler.unscale_(optimizer)."
            )
        ids = [id(gradient) for each in gradients_by_optimizer.values() for gradient in each]
        if len(set(ids)) < len(ids):
            raise AttachError(
                "Two of the optimizers hold the same parameter, whose gradient GradScaler "
                "unscales once for each: give it to one of them only."
            )
        for optimizer, gradients in gradients_by_optimizer.items():
            early = self._early.get(id(optimizer))
            if early is not None and early.mixed(scaler, gradients):
                raise AttachError(
                    f"The gradients of {type(optimizer).__name__} were unscaled for a joint norm, "
                    "and the scaler was updated before it took its step: what was added since has "
                    "another scale. Under a GradScaler step every optimizer, or set its gradients "
                    "to None with zero_grad(), before grad_scaler.update()."
                )


class _EarlyUnscaled:
    """Gradients of one optimizer that were unscaled at the step of another."""

    def __init__(
        self, scaler: GradScaler, optimizer: Optimizer, gradients: Sequence[Tensor]
    ) -> None:
        self._versions = TensorVersions(gradients)
        self._optimizer = id(optimizer)
        self._found_inf = found_inf_of(scaler, optimizer)
        self._state = scaler._per_optimizer_states[id(optimizer)]

    def updated(self, scaler: GradScaler) -> bool:
        """Return whether the scaler was updated since, which makes a new state."""
        return scaler._per_optimizer_states.get(self._optimizer) is not self._state

    def mixed(self, scaler: GradScaler, gradients: Sequence[Tensor]) -> bool:
        """Return whether scaled gradients may have been added to unscaled ones after an update.

        False after the optimizer's own step, and after an overflow that skipped it: the rest of
        such a gradient is infinite, which the scaler finds again.
        """
        if not self.updated(scaler) or self._state["stage"] is OptState.STEPPED:
            return False
        kept = any(self._versions.are_known(gradients))
        return kept and not is_overflow(self._found_inf)

    def knows(self, gradients: Sequence[Tensor]) -> bool:
        """Return whether all gradients are as the early unscaling has left them."""
        counted = [gradient for gradient in gradients if not gradient.is_inference()]
        known = self._versions.are_known(gradients)
        return all(known) and all(self._versions.are_unchanged(counted))


def _refuse_different_scales(
    scaler: GradScaler | None, stepping: Optimizer, optimizers: Sequence[Optimizer]
) -> None:
    marked = mark_of(stepping, "grad_scale") is not None
    if scaler is None and not marked:
        return
    others = [
        optimizer
        for optimizer in optimizers
        if optimizer is not stepping and gradients_held(optimizer)
    ]
    scaled = scaler is not None and any(stage_of(scaler, o) is OptState.READY for o in others)
    if scaled or (others and marked):
        raise AttachError(
            "GradScaler has not unscaled the gradients of all the optimizers, so that their scales "
            "differ: give the clipper grad_scaler=, or call grad_scaler.unscale_ for each of them "
            "before the first step."
        )

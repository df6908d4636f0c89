"""The protocol of a threshold: how large each norm may be at this step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a threshold may know of a step besides the norms."""

    step: int
    """Index of the step, from 0."""
    present: Tensor
    """Shape (k,), bool: which labels had a gradient at all."""
    order: float = 2.0
    """p of the norms, infinity for the largest element."""
    weight_norms: Tensor | None = None
    """Shape (k,): norms of the parameters with a gradient, of the same order; None for a rule
    without ``needs_weights``."""


class Threshold(ABC):
    """A rule for the largest norm allowed, called by the clipper once or twice a step.

    Its state belongs in tensors, so that it stays on the device and loads with
    ``weights_only=True``. No method may wait for a CUDA device.
    """

    needs_weights: bool = False
    """Whether ``context.weight_norms`` is wanted, which costs a reading of the parameters."""
    observes_skipped: bool = False
    """Whether norms of steps that were skipped are observed too, with the clipped norms that
    scaling would have made. Without it what it skips is never followed."""

    capturable: bool = False
    """Whether a captured CUDA graph may repeat what it does: the same operations at every step,
    and a state that is only written in place."""

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027
        """Prepare for k norms; may do nothing.

        Called when the clipper is attached, and again when there are more labels: the new ones
        come last and start fresh, the others go on as they are.

        Args:
            labels: The k names, in the order of the norms.
            device: Where norms will be.
            dtype: Their dtype, float64 where the device has it.
        """

    @abstractmethod
    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        """Return the largest allowed norms, called before the gradients are scaled.

        Args:
            norms: Shape (k,), as measured; may hold NaN and infinity.
            context: The step.

        Returns:
            Shape (k,), not negative, infinity for no limit, of the norms' device and dtype. The
            record of the step keeps it: return a new tensor rather than change it later.
        """

    def observe(self, norms: Tensor, clipped_norms: Tensor, context: StepContext) -> None:  # noqa: B027
        """Learn from a step, called once it was taken (or skipped, see ``observes_skipped``).

        May do nothing.

        Only entries that are finite and whose label is in ``context.present`` may enter a state.

        Args:
            norms: Shape (k,), as measured.
            clipped_norms: Shape (k,), after scaling.
            context: The step, without the labels that are not to be observed.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of tensors and plain numbers; empty for a rule without any."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned.

        Raises:
            StateError: It does not belong to this rule; nothing was changed.
        """
        if not isinstance(state, Mapping) or state:
            raise StateError(
                f"{type(self).__name__} keeps no state, found {state!r:.200}: "
                "load the state into a clipper with the threshold it was saved from. Nothing was "
                "loaded."
            )

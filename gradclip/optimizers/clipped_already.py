"""Which gradients a joint clipping has dealt with already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from ..records.record import ClipRecord


class ClippedGradients:
    """Remembers gradients by object and version, without keeping them alive.

    Whoever steps: a gradient that was computed, accumulated or zeroed since is a new one.
    """

    def __init__(self) -> None:
        self._clippings: dict[int, _Clipping] = {}

    def knows(self, gradient: Tensor) -> bool:
        """Tell whether the gradient is as it was when it was clipped, or stepped with."""
        clipping = self._clippings.get(id(gradient))
        # What keeps no version may have been written.
        return (
            clipping is not None
            and clipping.version.unchanged(gradient)
            and not gradient.is_inference()
        )

    def record_for(self, optimizer: Optimizer, gradient: Tensor) -> ClipRecord | None:
        """Return the record of the clipping that covered the gradient as it is now.

        None where the optimizer has stepped with it: what it steps with next is measured anew.
        """
        if not self.knows(gradient):
            return None
        clipping = self._clippings[id(gradient)]
        return None if id(optimizer) in clipping.stepped else clipping.record

    def add(self, gradients: Iterable[Tensor], record: ClipRecord) -> None:
        """Remember gradients as a clipping has left them."""
        # Those whose tensor is gone are of no use, and their id may serve another tensor.
        self._clippings = {
            k: clipping for k, clipping in self._clippings.items() if clipping.version.alive
        }
        for gradient in gradients:
            self._clippings[id(gradient)] = _Clipping(TensorVersion(gradient), record)

    def mark_stepped(self, optimizer: Optimizer, gradients: Iterable[Tensor]) -> None:
        """Remember gradients as the step of an optimizer has left them."""
        for gradient in gradients:
            clipping = self._clippings.get(id(gradient))
            if clipping is not None and clipping.version.is_of(gradient):
                clipping.version = TensorVersion(gradient)
                clipping.stepped.add(id(optimizer))


@dataclass(slots=True)
class _Clipping:
    version: TensorVersion
    record: ClipRecord
    stepped: set[int] = field(default_factory=set)
    """Ids of the optimizers that have stepped with it."""


class TensorVersion:
    """Knows a tensor again, by object and version, without keeping it alive.

    Args:
        tensor: The tensor, as it is now.
    """

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = ref(tensor)
        self._version = version_of(tensor)

    @property
    def alive(self) -> bool:
        """Whether the tensor still exists; its id may serve another one otherwise."""
        return self._tensor() is not None

    def is_of(self, tensor: Tensor) -> bool:
        """Tell whether it is the same tensor, whatever was written to it."""
        return self._tensor() is tensor

    def unchanged(self, tensor: Tensor) -> bool:
        """Tell whether it is the same tensor, and nothing is known to have been written to it."""
        return self.is_of(tensor) and self._version == version_of(tensor)


def version_of(tensor: Tensor) -> int | None:
    """Return what changes whenever a tensor is written in place; None in inference mode."""
    return None if tensor.is_inference() else tensor._version

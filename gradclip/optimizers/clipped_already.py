"""A memory of the gradients that are clipped already, by tensor and version counter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..records.record import ClipRecord


class TensorVersion:
    """A tensor's identity with its version counter. It does not keep the tensor alive.

    The weak reference is to the tensor's storage, as torch.utils.swap_tensors refuses a tensor
    that has one, which a module's ``to()`` may ask of its gradients.

    Args:
        tensor: The tensor, as it is now.
    """

    __slots__ = ("_id", "_memory", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._id = id(tensor)
        self._memory = ref(_memory_of(tensor))
        self._version = version_of(tensor)

    @property
    def alive(self) -> bool:
        """True while the memory exists; another tensor may have the id afterwards."""
        return self._memory() is not None

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether it is the same tensor, written or not."""
        return self._id == id(tensor) and self._memory() is _memory_of(tensor)

    def unchanged(self, tensor: Tensor) -> bool:
        """Return whether it is the same tensor and its version counter has not moved."""
        return self.is_of(tensor) and self._version == version_of(tensor)


def _memory_of(tensor: Tensor) -> object:
    """Return the storage of a tensor; the tensor itself if it is sparse and has none."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


def version_of(tensor: Tensor) -> int | None:
    """Return the counter of in-place writes; None for a tensor of inference mode, which has none.

    Writing through ``tensor.data`` moves no counter, and neither does ``GradScaler.unscale_``.
    """
    return None if tensor.is_inference() else tensor._version


@dataclass(slots=True)
class _Clipping:
    version: TensorVersion
    record: ClipRecord
    stepped: set[int] = field(default_factory=set)
    """Ids of the optimizers that have stepped with the gradient."""


class ClippedGradients:
    """The gradients that were clipped, each with the record of its clipping.

    A gradient that was computed, accumulated or zeroed since counts as another one, whichever
    optimizer steps. The gradients are not kept alive.
    """

    def __init__(self) -> None:
        self._clippings: dict[int, _Clipping] = {}

    def knows(self, gradient: Tensor) -> bool:
        """Return whether the gradient is as its clipping, or a step since, has left it."""
        clipping = self._clippings.get(id(gradient))
        if clipping is None or gradient.is_inference():
            return False  # without a version counter, a write would stay unnoticed
        return clipping.version.unchanged(gradient)

    def record_for(self, optimizer: Optimizer, gradient: Tensor) -> ClipRecord | None:
        """Return the record of the clipping that holds for an optimizer's next step.

        None where the optimizer has stepped with the gradient: its next step is measured anew, as
        the gradient may have been written without moving its counter.
        """
        if not self.knows(gradient):
            return None
        clipping = self._clippings[id(gradient)]
        return None if id(optimizer) in clipping.stepped else clipping.record

    def add(self, gradients: Iterable[Tensor], record: ClipRecord) -> None:
        """Remember gradients as a clipping has left them."""
        # Forget tensors that are gone, whose ids may serve others.
        self._clippings = {
            key: clipping for key, clipping in self._clippings.items() if clipping.version.alive
        }
        for gradient in gradients:
            self._clippings[id(gradient)] = _Clipping(TensorVersion(gradient), record)

    def mark_stepped(self, optimizer: Optimizer, gradients: Iterable[Tensor]) -> None:
        """Remember gradients as an optimizer's step has left them.

        A step may write them, for instance add weight decay or unscale them, and does not make
        them new by that.
        """
        for gradient in gradients:
            clipping = self._clippings.get(id(gradient))
            if clipping is not None and clipping.version.is_of(gradient):
                clipping.version = TensorVersion(gradient)
                clipping.stepped.add(id(optimizer))

"""Which gradients a joint clipping has dealt with already."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import ReferenceType, ref

from torch import Tensor

from .records import ClipRecord


class Coverage:
    """Remembers gradients by object and version, without keeping them alive.

    Whoever steps: a gradient that was computed, accumulated or zeroed since is a new one.
    """

    def __init__(self) -> None:
        self._covered: dict[int, tuple[ReferenceType[Tensor], int, ClipRecord]] = {}

    def record_of(self, gradient: Tensor) -> ClipRecord | None:
        """Return the record of the clipping that covered the gradient as it is now."""
        found = self._covered.get(id(gradient))
        if found is None or found[0]() is not gradient or found[1] != version_of(gradient):
            return None
        return found[2]

    def add(self, gradients: Iterable[Tensor], record: ClipRecord) -> None:
        """Remember gradients as they are now, after they were written."""
        # Those whose tensor is gone are of no use, and their id may serve another tensor.
        self._covered = {
            key: known for key, known in self._covered.items() if known[0]() is not None
        }
        for gradient in gradients:
            self._covered[id(gradient)] = (ref(gradient), version_of(gradient), record)


def version_of(gradient: Tensor) -> int:
    """Return what changes whenever a tensor is written in place."""
    # Tensors made in inference mode keep none.
    return -1 if gradient.is_inference() else gradient._version

"""A tensor as it was."""

from __future__ import annotations

from weakref import ref

from torch import Tensor


class Seen:
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

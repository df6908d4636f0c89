"""A memory of the gradients that are clipped already, by tensor and version counter.

Several optimizers ask for all their gradients at every step: everything here takes lists, with a
fraction of the calls that single tensors would make.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..records.record import ClipRecord

_VERSION = attrgetter("_version")


class TensorVersions:
    """The identities of tensors with their version counters. It keeps no tensor alive.

    The weak references are to the tensors' storages, as torch.utils.swap_tensors refuses a tensor
    that has one, which a module's ``to()`` may ask of its gradients.

    Args:
        tensors: Tensors, as they are now.
    """

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self._known: dict[int, tuple[ref[object], int | None]] = {}
        self.add(tensors)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Remember tensors as they are now, also those that are known."""
        known = zip(map(ref, _memories_of(tensors)), versions_of(tensors), strict=True)
        self._known.update(zip(map(id, tensors), known, strict=True))

    def follow(self, tensors: Sequence[Tensor]) -> list[int]:
        """Remember the known ones among tensors as they are now; return their ids."""
        known = [*compress(tensors, self.are_known(tensors))]
        # Few steps write a gradient, and asking is faster than remembering.
        if not all(self.are_unchanged(known)):
            self.add(known)
        return [*map(id, known)]

    def forget_dead(self) -> list[int]:
        """Forget the tensors whose memory is gone, whose ids may serve others; return the ids."""
        dead = [key for key, (memory, _) in self._known.items() if memory() is None]
        for key in dead:
            del self._known[key]
        return dead

    def are_known(self, tensors: Sequence[Tensor]) -> list[bool]:
        """Return for each tensor whether it is one of these, written or not."""
        items = map(self._known.get, map(id, tensors))
        return [
            item is not None and item[0]() is memory
            for item, memory in zip(items, _memories_of(tensors), strict=True)
        ]

    def are_unchanged(self, tensors: Sequence[Tensor]) -> list[bool]:
        """Return for each tensor whether it is one of these and its counter has not moved.

        False for tensors of inference mode, which have no counter: a write would stay unnoticed.
        """
        items = map(self._known.get, map(id, tensors))
        # The counters first: after a backward pass nearly all are others.
        same = [
            item is not None and item[1] == version is not None
            for item, version in zip(items, versions_of(tensors), strict=True)
        ]
        if any(same):
            same = [one and other for one, other in zip(same, self.are_known(tensors), strict=True)]
        return same


def versions_of(tensors: Sequence[Tensor]) -> list[int | None]:
    """Return the counters of in-place writes; None for a tensor of inference mode, without one.

    Writing through ``tensor.data`` moves no counter, and neither does ``GradScaler.unscale_``.
    """
    try:
        return [*map(_VERSION, tensors)]
    except RuntimeError:
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _memories_of(tensors: Sequence[Tensor]) -> list[Any]:
    """Return the storages of tensors; a tensor itself if it is sparse and has none."""
    try:
        return [*map(Tensor.untyped_storage, tensors)]
    except NotImplementedError:
        return [t.untyped_storage() if t.layout is torch.strided else t for t in tensors]


class ClippedGradients:
    """The gradients that were clipped, each with the record of its clipping.

    A gradient that was computed, accumulated or zeroed since counts as another one, whichever
    optimizer steps. The gradients are not kept alive.
    """

    def __init__(self) -> None:
        self._versions = TensorVersions()
        self._records: dict[int, ClipRecord] = {}
        """By id of the gradient."""
        self._stepped: dict[int, set[int]] = {}
        """By id of the optimizer: the ids of the gradients that it has stepped with."""

    def known_among(self, gradients: Sequence[Tensor]) -> set[int]:
        """Return the ids of gradients that are as their clipping, or a step since, left them."""
        return {*compress(map(id, gradients), self._versions.are_unchanged(gradients))}

    def records_for(
        self, optimizer: Optimizer, gradients: Sequence[Tensor]
    ) -> list[ClipRecord | None]:
        """Return for each gradient the clipping that holds for an optimizer's next step.

        None where the optimizer has stepped with the gradient: its next step is measured anew, as
        the gradient may have been written without moving its counter.
        """
        covered = self.known_among(gradients) - self._stepped.get(id(optimizer), set())
        return [self._records[key] if key in covered else None for key in map(id, gradients)]

    def add(self, gradients: Sequence[Tensor], record: ClipRecord) -> None:
        """Remember gradients as a clipping has left them."""
        ids = [*map(id, gradients)]
        for gone in self._versions.forget_dead():
            del self._records[gone]
        self._versions.add(gradients)
        self._records.update(dict.fromkeys(ids, record))
        for stepped in self._stepped.values():
            stepped.difference_update(ids)

    def mark_stepped(self, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
        """Remember gradients as an optimizer's step has left them.

        A step may write them, for instance add weight decay or unscale them, and does not make
        them new by that.
        """
        stepped = self._stepped.setdefault(id(optimizer), set())
        stepped.update(self._versions.follow(gradients))

"""The gradients that share their norms at one step: measured, bounded and scaled together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .capture import capturing, keep_if_captured
from .coefficients import are_finite
from .engines.base import host_may_read
from .gradients import Bucket, buckets_of, coalesce_, copied, refuse_unordered
from .naming import describe_nonfinite
from .norms import norms_of
from .parts import Parts, rescaled
from .places import Place, present
from .ranks import Group
from .settings import Settings


class StepGradients:
    """Gradients of any mixture of devices, dtypes and layouts, with the places of their norms.

    Args:
        tensors: Distinct gradients.
        places: For each where its norms are; None where all share one.
        settings: How to measure and what may be written.
        count: k, how many norms there are.
        device: Where the norms are wanted.
        parameters: The parameters of the gradients, where their norms will be asked for.
        names: The names of these parameters, where the parts of the norms will be.
        scale: By what GradScaler has multiplied the gradients, one element; None for not at all.
        overflow: Where only the device knows it: whether GradScaler leaves the step out, one bool.
        partial: Whether an optimizer's gradients are missing, since GradScaler leaves out its step.
        groups: The ranks that the parameters are spread over.

    Raises:
        GradientError: A gradient that cannot be clipped rightly.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        places: Sequence[Place] | None,
        settings: Settings,
        count: int,
        device: torch.device,
        *,
        parameters: Sequence[Tensor] = (),
        names: Sequence[str] | None = None,
        scale: Tensor | None = None,
        overflow: Tensor | None = None,
        partial: bool = False,
        groups: Sequence[Group] = (),
    ) -> None:
        if settings.max_value is not None:
            refuse_unordered(tensors)
        self.tensors = tensors
        self.overflow = overflow
        self.partial = partial
        self.parts: Parts | None = None
        """What each gradient has in the norms, once they were measured."""
        self._places = places
        self._parameters = parameters
        self._names = names
        self._groups = groups
        self._settings = settings
        self._count = count
        self._device = device
        self._scale = scale
        self._buckets = buckets_of(tensors, settings.norm_type, places)

    def present(self) -> Tensor:
        """Tell which of the k norms have a gradient behind them; shape (k,), bool."""
        if self._places is None:
            flag = _flag(bool(self.tensors), self._device)
            keep_if_captured(flag)
            return flag
        places = [
            # Of what is spread over ranks the rows that are elsewhere are there as well.
            place if bucket.group is None else self._places[index]
            for bucket in self._buckets
            for place, index in zip(bucket.places, bucket.indices, strict=True)
        ]
        return present(tuple(places), self._count, self._device)

    def weight_norms(self) -> Tensor:
        """Measure the norms of the parameters instead of their gradients; shape (k,)."""
        weights = [parameter.data for parameter in self._parameters]
        buckets = buckets_of(weights, self._settings.norm_type, self._places)
        return self._measured(buckets)

    def norms(self) -> Tensor:
        """Measure the true norms, whatever scale the gradients carry; shape (k,)."""
        if self._names is None:
            return self._norms(self._buckets)
        sums: list[Tensor] = []
        norms = self._norms(self._buckets, sums)
        self.parts = self._parts(self._names, norms, sums)
        return norms

    def norms_if_bounded(self, norms: Tensor) -> Tensor:
        """Return what the norms would be with ``max_value`` applied; nothing is written.

        Args:
            norms: Shape (k,), as measured without.
        """
        if self._settings.max_value is None:
            return norms
        return self._norms(self._clamped(copied(self._buckets), self._bounds(norms, False)))

    def bound_(self, norms: Tensor, untouched: bool | Tensor) -> Tensor:
        """Apply ``max_value`` where the norm is finite, and in place; return the norms then.

        Where nothing may ever be written, it is what they would be.

        Args:
            norms: Shape (k,), as measured before.
            untouched: Whether nothing may be written; 0-d where only the device knows.
        """
        if self._settings.max_value is None or untouched is True:
            return norms
        if not self._settings.writes:
            return self.norms_if_bounded(norms)
        if coalesce_(self.tensors):
            self._buckets = buckets_of(self.tensors, self._settings.norm_type, self._places)
        return self._norms(self._clamped(self._buckets, self._bounds(norms, untouched)))

    def scale_(self, coefficients: Tensor) -> None:
        """Multiply each gradient by the coefficient of its norm, in place; shape (k,)."""
        if self._count == 1 and host_may_read(coefficients) and coefficients.item() == 1:
            return
        for bucket in self._buckets:
            bucket.scale_(self._settings.engine, coefficients)

    def _norms(self, buckets: Sequence[Bucket], parts: list[Tensor] | None = None) -> Tensor:
        norms = self._measured(buckets, parts)
        return norms if self._scale is None else norms / self._scale.to(norms)

    def _measured(self, buckets: Sequence[Bucket], parts: list[Tensor] | None = None) -> Tensor:
        order, engine = self._settings.norm_type, self._settings.engine
        return norms_of(
            buckets,
            order,
            count=self._count,
            device=self._device,
            engine=engine,
            parts=parts,
            groups=self._groups,
        )

    def _parts(self, names: Sequence[str], norms: Tensor, sums: list[Tensor]) -> Parts | None:
        if capturing() or not sums:
            return None
        gradients, order = self.tensors, self._settings.norm_type
        if len(self._buckets) > 1:
            indices = [index for bucket in self._buckets for index in bucket.indices]
            names = [names[index] for index in indices]
            gradients = [gradients[index] for index in indices]
        if self._scale is not None:
            sums = [rescaled(each, order, self._scale) for each in sums]
        nonfinite = None
        if (self._settings.raises or host_may_read(norms)) and not are_finite(norms):
            nonfinite = describe_nonfinite(names, gradients, torch.cat(sums).tolist())
        return Parts(names, sums, nonfinite)

    def _bounds(self, norms: Tensor, untouched: bool | Tensor) -> Tensor:
        """Return ``max_value`` in the scale of the gradients, infinity for none; shape (k,)."""
        bounds = torch.full_like(norms, self._settings.max_value or 0.0)
        if self._scale is not None:
            bounds *= self._scale.to(bounds)
        bounded = norms < math.inf
        if isinstance(untouched, Tensor):
            bounded &= ~untouched
        return torch.where(bounded, bounds, math.inf)

    def _clamped(self, buckets: list[Bucket], bounds: Tensor) -> list[Bucket]:
        for bucket in buckets:
            bucket.clamp_(self._settings.engine, bounds)
        return buckets


@lru_cache(maxsize=8)
def _flag(value: bool, device: torch.device) -> Tensor:
    return torch.tensor([value], device=device)

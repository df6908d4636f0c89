"""The gradients that share their norms at one step: measured, bounded and scaled together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..engines.base import host_may_read
from ..engines.cuda_graphs import capturing, keep_if_captured
from ..ranks.groups import NormRanks
from ..records.parameter_norms import ParameterSums, rescaled
from ..scopes.naming import describe_nonfinite
from ..scopes.norm_indices import NormIndices, present_norms
from .buckets import Bucket, buckets_of, copies_of
from .coefficients import are_finite, has_skip_reason
from .forms import coalesce_, refuse_unordered
from .held import Weight
from .norms import measure_across_ranks, norms_of
from .policies import Settings

ALONE = NormRanks()


class StepGradients:
    """Gradients of any mixture of devices, dtypes and layouts, with the indices of their norms.

    Args:
        tensors: Distinct gradients.
        norm_indices: For each where its norms are; None where all share one.
        settings: How to measure and what may be written.
        count: k, how many norms there are.
        device: Where the norms are wanted.
        weights: The parameters whose norms will be asked for, if any will.
        names: The names of the gradients' parameters, where the parts of the norms will be.
        norm_ranks: The ranks that the norms span.
        counts_here: For each gradient whether this rank counts it, not another rank that has a copy
            of it; empty if this rank counts all.
        parts: For each where it is among the parameters of all ranks, whose names are ``names``.
        needs_present: Whether it matters which norms have a gradient behind them on some rank.
        scale: By what GradScaler has multiplied the gradients, one element; None for not at all.
        overflow: Where only the device knows it: whether GradScaler leaves the step out, one bool.
        partial: Whether an optimizer's gradients are missing, since GradScaler leaves out its step.

    Raises:
        GradientError: A gradient that cannot be clipped rightly.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        norm_indices: Sequence[NormIndices] | None,
        settings: Settings,
        count: int,
        device: torch.device,
        *,
        weights: Sequence[Weight] | None = None,
        names: Sequence[str] | None = None,
        norm_ranks: NormRanks = ALONE,
        counts_here: Sequence[bool] = (),
        parts: Sequence[NormIndices] = (),
        needs_present: bool = True,
        scale: Tensor | None = None,
        overflow: Tensor | None = None,
        partial: bool = False,
    ) -> None:
        if settings.max_value is not None:
            refuse_unordered(tensors)
        self.tensors = tensors
        self.overflow = overflow
        self.partial = partial
        self.parameter_sums: ParameterSums | None = None
        """What each gradient has in the norms, once they were measured."""
        self._norm_indices = norm_indices
        self._weights = weights
        self._names = names
        self._norm_ranks = norm_ranks
        self._counts_here = counts_here
        self._part_places = tuple(parts)
        self._needs_present = needs_present
        self._present: Tensor | None = None
        self._weight_norms: Tensor | None = None
        self._if_bounded: Tensor | None = None
        self._settings = settings
        self._count = count
        self._device = device
        self._scale = scale
        self._buckets = self._bucketed(tensors)

    def present(self) -> Tensor:
        """Tell which of the k norms have a gradient behind them; shape (k,), bool."""
        return self._present_here() if self._present is None else self._present

    def _present_here(self) -> Tensor:
        if self._norm_indices is None:
            flag = _flag(bool(self.tensors), self._device)
            keep_if_captured(flag)
            return flag
        norm_indices = [
            # Of what is spread over ranks the rows that are elsewhere are there as well.
            indices if bucket.group is None else self._norm_indices[index]
            for bucket in self._buckets
            for indices, index in zip(bucket.norm_indices, bucket.indices, strict=True)
        ]
        return present_norms(tuple(norm_indices), self._count, self._device)

    def weight_norms(self) -> Tensor:
        """Measure the norms of the parameters instead of their gradients; shape (k,)."""
        return (
            self._measured(self._weight_buckets())
            if self._weight_norms is None
            else self._weight_norms
        )

    def norms(self) -> Tensor:
        """Measure the true norms, whatever scale the gradients carry; shape (k,).

        Collective where they span several ranks, which tell each other all that they will be asked.
        """
        if self._norm_ranks:
            return self._norms_across()
        if self._names is None:
            return self._norms(self._buckets)
        sums: list[Tensor] = []
        norms = self._norms(self._buckets, sums)
        self.parameter_sums = self._parameter_sums(self._names, norms, sums)
        return norms

    def norms_if_bounded(self, norms: Tensor) -> Tensor:
        """Return what the norms would be with ``max_value`` applied; nothing is written.

        Args:
            norms: Shape (k,), as measured without.
        """
        if self._settings.max_value is None:
            return norms
        if self._if_bounded is None:
            clamped = self._clamped(copies_of(self._buckets), self._bounds(norms, False))
            self._if_bounded = self._norms(clamped)
        return self._if_bounded

    def skip_decision(self, norms: Tensor, thresholds: Tensor) -> bool | Tensor:
        """Return whether the policies skip this step; nothing is written.

        No host sync, unless the policy is to raise.

        Args:
            norms: Shape (k,), as measured.
            thresholds: Shape (k,).

        Returns:
            A bool, or where only the device knows, a tensor: 0-d, bool.
        """
        settings = self._settings
        if not (settings.skips or settings.raises):
            return False
        exceeding = settings.exceed == "skip"
        skip = has_skip_reason(
            self.norms_if_bounded(norms) if exceeding else norms,
            thresholds,
            nonfinite=settings.nonfinite in ("skip", "raise"),
            exceeding=exceeding,
        )
        if self.overflow is not None:
            skip = skip & ~self.overflow
        return bool(skip) if settings.raises or host_may_read(skip) else skip

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
            self._buckets = self._bucketed(self.tensors)
        clamped = self._clamped(self._buckets, self._bounds(norms, untouched))
        if self._if_bounded is None:
            return self._norms(clamped)
        known = self._if_bounded
        return torch.where(untouched, norms, known) if isinstance(untouched, Tensor) else known

    def scale_(self, coefficients: Tensor) -> None:
        """Multiply each gradient by the coefficient of its norm, in place; shape (k,)."""
        if self._count == 1 and host_may_read(coefficients) and coefficients.item() == 1:
            return
        for bucket in self._buckets:
            bucket.scale_(self._settings.engine, coefficients)

    def _norms(self, buckets: Sequence[Bucket], parts: list[Tensor] | None = None) -> Tensor:
        return self._unscaled(self._measured(buckets, parts))

    def _unscaled(self, norms: Tensor) -> Tensor:
        return norms if self._scale is None else norms / self._scale.to(norms)

    def _measured(self, buckets: Sequence[Bucket], parts: list[Tensor] | None = None) -> Tensor:
        order = self._settings.norm_type
        if self._norm_ranks:
            return measure_across_ranks(buckets, order, self._norm_ranks, **self._options).norms
        return norms_of(buckets, order, parts=parts, **self._options)

    def _norms_across(self) -> Tensor:
        """Measure the norms together with other ranks, and remember what else these tell."""
        order = self._settings.norm_type
        records_parameters = self._names is not None and not capturing()
        found = measure_across_ranks(
            self._buckets,
            order,
            self._norm_ranks,
            **self._options,
            parts=(self._part_places, len(self._names or ())) if records_parameters else None,
            weights=None if self._weights is None else self._weight_buckets(),
            present=self._present_here() if self._needs_present else None,
        )
        self._present, self._weight_norms = found.present, found.weight_norms
        norms = self._unscaled(found.norms)
        if found.parts is not None:
            self.parameter_sums = self._described(self._names or (), None, norms, [found.parts])
        return norms

    @property
    def _options(self) -> dict[str, Any]:
        """What every measurement is given."""
        engine = self._settings.engine
        return {"count": self._count, "device": self._device, "engine": engine}

    def _bucketed(self, tensors: Sequence[Tensor]) -> list[Bucket]:
        return buckets_of(tensors, self._settings.norm_type, self._norm_indices, self._counts_here)

    def _weight_buckets(self) -> list[Bucket]:
        weights = self._weights or ()
        counts_here = [weight.counts for weight in weights]
        return buckets_of(
            [weight.parameter.data for weight in weights],
            self._settings.norm_type,
            None if self._norm_indices is None else [weight.norm_indices for weight in weights],
            () if all(counts_here) else counts_here,
        )

    def _parameter_sums(
        self, names: Sequence[str], norms: Tensor, sums: list[Tensor]
    ) -> ParameterSums | None:
        if capturing() or not sums:
            return None
        gradients = self.tensors
        if len(self._buckets) > 1:
            indices = [index for bucket in self._buckets for index in bucket.indices]
            names = [names[index] for index in indices]
            gradients = [gradients[index] for index in indices]
        return self._described(names, gradients, norms, sums)

    def _described(
        self,
        names: Sequence[str],
        gradients: Sequence[Tensor] | None,
        norms: Tensor,
        sums: list[Tensor],
    ) -> ParameterSums:
        if self._scale is not None:
            sums = [rescaled(each, self._settings.norm_type, self._scale) for each in sums]
        nonfinite = None
        if (self._settings.raises or host_may_read(norms)) and not are_finite(norms):
            values = [value for each in sums for value in each.tolist()]  # of several devices
            nonfinite = describe_nonfinite(names, gradients, values)
        return ParameterSums(names, sums, nonfinite)

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

"""The clipping of one step's gradients: norms, decision, element-wise bound, scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engines.base import host_may_read
from ..engines.cuda_graphs import capturing, keep_if_captured
from ..ranks.groups import NormRanks
from ..ranks.shared_loss import host_mean_loss, sum_and_count
from ..records.parameter_norms import ParameterSums, rescaled
from ..scopes.naming import describe_nonfinite
from ..scopes.norm_indices import NormIndices, all_present, present_norms
from .buckets import Bucket, buckets_of, copies_of
from .coefficients import (
    are_finite,
    clip_coefficients,
    has_skip_reason,
    ones_if_skipped,
    reduction_of,
)
from .differentiable import refuse_graphs, require_grad, scale_tracked_
from .forms import coalesce_, refuse_unordered
from .held import Weight
from .norms import measure_across_ranks, norms_of
from .policies import Settings

ALONE = NormRanks()


class Decision(NamedTuple):
    """What happens to the gradients of one step."""

    skip: bool | Tensor
    """True if the whole step is skipped; 0-d, bool, if only the device knows."""
    coefficients: Any
    """The factor of each norm's gradients: shape (k,); a number where the one norm is a number."""
    reduction: Any
    """Norm after ``max_value`` and scaling, divided by the norm as measured; as `coefficients`."""


class StepGradients:
    """The gradients of one step, of any mixture of devices, dtypes and layouts.

    Args:
        tensors: Distinct gradients.
        norm_indices: The norm indices of each gradient; None if all share one norm.
        settings: The options of the clipper.
        count: k, the number of norms.
        device: The device of the norms.
        weights: The parameters whose norms the threshold reads; None if it reads none.
        names: The names of the parameters, if their norms are recorded.
        norm_ranks: The ranks that the norms span.
        counts_here: For each gradient, True if this rank counts it, False if another rank counts
            its copy; empty if this rank counts all.
        parameter_indices: The index of each gradient among the parameters of all ranks, whose
            names are ``names``.
        needs_present: True if the threshold reads which norms have a gradient on any rank.
        scale: The factor by which GradScaler has multiplied the gradients, one element; None for
            unscaled gradients.
        overflow: If only the device knows whether GradScaler skips the step: 0-d, bool.
        partial: True if gradients of an optimizer are missing, because GradScaler skips its step.

    Raises:
        GradientError: A gradient cannot be clipped rightly.
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
        parameter_indices: Sequence[NormIndices] = (),
        needs_present: bool = True,
        scale: Tensor | None = None,
        overflow: Tensor | None = None,
        partial: bool = False,
    ) -> None:
        if settings.max_value is not None:
            refuse_unordered(tensors)
            if settings.writes:
                refuse_graphs(tensors, "max_value")
        self.tensors = tensors
        self.overflow = overflow
        self.partial = partial
        self.parameter_sums: ParameterSums | None = None
        """The power sums of the parameters, after `norms` has measured them."""
        self.loss: float | Tensor | None = None
        """The loss of the step on this rank; after `norms` that of all ranks."""
        self._norm_indices = norm_indices
        self._weights = weights
        self._names = names
        self._norm_ranks = norm_ranks
        self._counts_here = counts_here
        self._parameter_indices = tuple(parameter_indices)
        self._needs_present = needs_present
        self._present: Tensor | None = None
        self._finite: tuple[Tensor | None, Tensor | None] = None, None
        """Some norms, and which of them are finite."""
        self._weight_norms: Tensor | None = None
        self._norms_if_bounded: Tensor | None = None
        self._settings = settings
        self._count = count
        self._device = device
        self._scale = scale
        self._buckets = self._bucketed(tensors)

    # Norms

    def norms(self) -> Any:
        """Measure the norms, without the scale of GradScaler; shape (k,). Nothing is written.

        Collective if the norms span several ranks. The same collective exchanges what `present`,
        `weight_norms`, `loss` and the record of the parameters need.
        """
        if self._norm_ranks:
            return self._norms_across()
        if self._names is None:
            return self._norms(self._buckets)
        sums: list[Tensor] = []
        norms = self._norms(self._buckets, sums)
        self.parameter_sums = self._parameter_sums(self._names, norms, sums)
        return norms

    def present(self) -> Tensor:
        """Return which of the k norms have a gradient; shape (k,), bool."""
        return self._present_here()[0] if self._present is None else self._present

    def usable(self, norms: Tensor) -> Tensor:
        """Return which norms are finite and have a gradient; shape (k,), bool. No host sync.

        Args:
            norms: Shape (k,), as measured.
        """
        finite = norms < math.inf
        self._finite = norms, finite
        if self._present is not None:
            return finite & self._present
        present, all_present = self._present_here()
        return finite if all_present else finite & present

    def weight_norms(self) -> Tensor:
        """Measure the norms of the parameters instead of their gradients; shape (k,)."""
        if self._weight_norms is None:
            self._weight_norms = self._measured(self._weight_buckets())
        return self._weight_norms

    # Decision

    def decide_(self, norms: Tensor, thresholds: Tensor) -> Decision:
        """Decide what happens to the gradients, and apply ``max_value`` to them in indices.

        A coefficient belongs to the norm of the bounded elements, which are therefore written and
        measured here. No host sync, unless the policy is "raise".

        Args:
            norms: Shape (k,), as measured.
            thresholds: Shape (k,).
        """
        # Before the bound, which would hide an infinite element.
        skip = self._skip(norms, thresholds)
        # A step that GradScaler skips writes nothing either, but is none of the skipped steps.
        untouched = skip if self.overflow is None else self.overflow | skip
        bounded_norms = self._bound_(norms, untouched)
        asked, finite = self._finite
        finite = finite if bounded_norms is asked else None
        coefficients = clip_coefficients(bounded_norms, thresholds, self._settings.erases, finite)
        if untouched is not False:
            coefficients = ones_if_skipped(untouched, coefficients)
        return Decision(skip, coefficients, reduction_of(coefficients, bounded_norms, norms))

    def scale_(self, decision: Decision) -> None:
        """Multiply each gradient by the coefficient of its norm, in indices.

        Nothing is written if the clipper observes or the step is skipped, nor where a coefficient
        is 1.
        """
        if not self._settings.writes or decision.skip is True:
            return
        coefficients = decision.coefficients
        if self._count == 1 and host_may_read(coefficients) and coefficients.item() == 1:
            return
        if require_grad(self.tensors):
            self._scale_in_graphs_(coefficients)
            return
        for bucket in self._buckets:
            bucket.scale_(self._settings.engine, coefficients)

    def _scale_in_graphs_(self, coefficients: Tensor) -> None:
        """Scale gradients that carry a graph, so that what is derived from them later is exact."""
        by_norm: Sequence[NormIndices | None] = self._norm_indices or [None] * len(self.tensors)
        if any(indices is not None and indices.rows for indices in by_norm):
            refuse_graphs(self.tensors, "scope='unit'")
        if self._norm_ranks:
            refuse_graphs(self.tensors, "a norm across ranks")
        members: dict[int, list[Tensor]] = {}
        for gradient, indices in zip(self.tensors, by_norm, strict=True):
            index = 0 if indices is None else indices.indices.tolist()[0]
            members.setdefault(index, []).append(gradient)
        for index, gradients in members.items():
            scale_tracked_(gradients, coefficients[index], self._settings.norm_type)

    def _skip(self, norms: Tensor, thresholds: Tensor) -> bool | Tensor:
        """Return whether the policies skip this step; 0-d, bool, if only the device knows."""
        settings = self._settings
        if not (settings.skips or settings.raises):
            return False
        exceeding = settings.exceed == "skip"
        skip = has_skip_reason(
            self._if_bounded(norms) if exceeding else norms,
            thresholds,
            nonfinite=settings.nonfinite in ("skip", "raise"),
            exceeding=exceeding,
        )
        if self.overflow is not None:
            skip = skip & ~self.overflow
        return bool(skip) if settings.raises or host_may_read(skip) else skip

    def _bound_(self, norms: Tensor, untouched: bool | Tensor) -> Tensor:
        """Apply ``max_value`` in indices where the norm is finite, and return the norms afterwards.

        Args:
            norms: Shape (k,), as measured before.
            untouched: True if nothing may be written; 0-d, bool, if only the device knows.
        """
        if self._settings.max_value is None or untouched is True:
            return norms
        if not self._settings.writes:
            return self._if_bounded(norms)
        if coalesce_(self.tensors):
            # The buckets hold the duplicates, which are no longer the gradient.
            self._buckets = self._bucketed(self.tensors)
        clamped = self._clamped(self._buckets, self._bounds(norms, untouched))
        if self._norms_if_bounded is None:
            return self._norms(clamped)
        bounded = self._norms_if_bounded
        return torch.where(untouched, norms, bounded) if isinstance(untouched, Tensor) else bounded

    def _if_bounded(self, norms: Tensor) -> Tensor:
        """Return the norms that the gradients would have after ``max_value``; nothing is written.

        Args:
            norms: Shape (k,), as measured without the bound.
        """
        if self._settings.max_value is None:
            return norms
        if self._norms_if_bounded is None:
            clamped = self._clamped(copies_of(self._buckets), self._bounds(norms, False))
            self._norms_if_bounded = self._norms(clamped)
        return self._norms_if_bounded

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

    # Measuring

    def _norms(self, buckets: Sequence[Bucket], sums: list[Tensor] | None = None) -> Tensor:
        return self._unscaled(self._measured(buckets, sums))

    def _unscaled(self, norms: Tensor) -> Tensor:
        return norms if self._scale is None else norms / self._scale.to(norms)

    def _measured(self, buckets: Sequence[Bucket], sums: list[Tensor] | None = None) -> Tensor:
        order = self._settings.norm_type
        if self._norm_ranks:
            return measure_across_ranks(buckets, order, self._norm_ranks, **self._options).norms
        return norms_of(buckets, order, gradient_sums=sums, **self._options)

    def _norms_across(self) -> Tensor:
        """Measure the norms together with other ranks, and keep what else the ranks exchange."""
        # A captured graph runs no Python that could record the norms of parameters.
        names = None if capturing() else self._names
        shared = measure_across_ranks(
            self._buckets,
            self._settings.norm_type,
            self._norm_ranks,
            **self._options,
            parameters=None if names is None else (self._parameter_indices, len(names)),
            weights=None if self._weights is None else self._weight_buckets(),
            present=self._present_here()[0] if self._needs_present else None,
            shares_loss=True,
            loss=self.loss,
        )
        self._present, self._weight_norms = shared.present, shared.weight_norms
        self.loss = self._mean_loss(shared.loss)
        norms = self._unscaled(shared.norms)
        if names is not None and shared.parameter_sums is not None:
            self.parameter_sums = self._described(names, None, norms, [shared.parameter_sums])
        return norms

    def _mean_loss(self, losses: Any) -> float | Tensor | None:
        """Return the loss of all ranks, for a record."""
        order = self._settings.norm_type
        if host_may_read(losses):
            return host_mean_loss(losses.tolist(), order)
        return sum_and_count(losses, order)  # divided when somebody asks

    def _present_here(self) -> tuple[Tensor, bool]:
        """Return which norms have a gradient on this rank, and whether all have."""
        if self._norm_indices is None:
            flag = presence_flag(bool(self.tensors), self._device)
            keep_if_captured(flag)
            return flag, bool(self.tensors)
        norm_indices = tuple(
            # Rows of a sharded gradient that are on other ranks have a gradient as well.
            indices if bucket.group is None else self._norm_indices[index]
            for bucket in self._buckets
            for indices, index in zip(bucket.norm_indices, bucket.indices, strict=True)
        )
        of_norms = norm_indices, self._count, self._device
        return present_norms(*of_norms), all_present(*of_norms)

    @property
    def _options(self) -> dict[str, Any]:
        """Arguments of every measurement."""
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

    # The record of the parameters

    def _parameter_sums(
        self, names: Sequence[str], norms: Tensor, sums: list[Tensor]
    ) -> ParameterSums | None:
        if capturing() or not sums:
            return None
        gradients = self.tensors
        if len(self._buckets) > 1:
            # The sums stand in the order of the buckets.
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
            sums = [rescaled(vector, self._settings.norm_type, self._scale) for vector in sums]
        nonfinite = None
        # Now, while the gradients still hold the elements that are not finite.
        if (self._settings.raises or host_may_read(norms)) and not are_finite(norms):
            # The vectors may lie on several devices, which torch.cat would refuse.
            values = [value for vector in sums for value in vector.tolist()]
            nonfinite = describe_nonfinite(names, gradients, values)
        return ParameterSums(names, sums, nonfinite)


@lru_cache(maxsize=8)
def presence_flag(value: bool, device: torch.device) -> Tensor:
    """Return whether one norm has a gradient; shape (1,), bool, made once for each device."""
    return torch.tensor([value], device=device)

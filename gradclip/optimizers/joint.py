"""The choice of the gradients that are clipped when an optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engines import engine_for
from ..engines.base import CPU, TensorList, host_may_read, lack_values
from ..gradients.differentiable import require_grad
from ..gradients.held import (
    GRADIENT,
    HeldGradients,
    Weight,
    gradients_of,
    parameters_held,
    parameters_of,
)
from ..gradients.host_step import HostGradients, SharedHostGradients
from ..gradients.policies import Settings
from ..gradients.row_step import RowGradients, RowPlan
from ..gradients.step import StepGradients
from ..gradients.without_values import GradientsWithoutValues
from ..ranks.agreement import SCOPES_BY_NAME
from ..ranks.layout import RankLayout
from ..ranks.shards import parts_in
from ..ranks.shared_loss import check_reach
from ..records.record import ClipRecord
from ..scopes.labels import NormLabels
from ..thresholds import RelativeToWeights, Threshold, is_foreign, learns
from .grad_scaler import checked_scaler, heeds_marks, mark_of
from .several import Selection, SeveralOptimizers
from .shared_overflow import SharedOverflow, refuse_unshared_overflow
from .step_changes import StepChanges
from .supported import check_groups

HostRoute = Callable[..., HostGradients | None]
"""Takes gradients, the names of their parameters or none, and whether some are missing. Returns
None for gradients that are not the plain ones of a usual step."""

AnyGradients = HostGradients | RowGradients | StepGradients | GradientsWithoutValues


class JointGradients:
    """The gradients of the optimizers that one clipper holds.

    All gradients of one optimizer are clipped at each of its steps. Gradients of several
    optimizers share their norms as `SeveralOptimizers` says.

    Args:
        optimizers: The optimizers.
        grad_scaler: The clipper's option: a GradScaler, or None.
        settings: How to measure, and whether gradients may be written.
        labels: The labels of the norms.
        rank_layout: The other ranks, and how parameters lie on them.
        threshold: The rule that the norms will be given to.

    Raises:
        ArgumentError: ``grad_scaler`` is neither a GradScaler nor None.
        EngineUnavailableError: The engine does not serve a device of the parameters.
        AttachError: The ranks do not fit together.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        grad_scaler: object,
        settings: Settings,
        labels: NormLabels,
        rank_layout: RankLayout,
        threshold: Threshold,
    ) -> None:
        self.optimizers = optimizers
        self._settings = settings
        self.labels = labels
        self.rank_layout = rank_layout
        self.needs_weights = threshold.needs_weights
        self._threshold = threshold
        self._may_be_usual = (
            settings.max_value is None
            and not threshold.needs_weights
            and host_may_read(torch.empty(0, device=self.device))
        )
        self._row_rule: RelativeToWeights | None = None
        """The rule, if an engine may apply it while it measures."""
        self._row_plan: RowPlan | None = None
        if isinstance(threshold, RelativeToWeights) and not is_foreign(threshold):
            alone = settings.max_value is None and len(optimizers) == 1
            measured = not lack_values([*parameters_held(optimizers)])
            self._row_rule = threshold if alone and measured else None
        self._needs_present = learns(threshold) or is_foreign(threshold)
        self._named: tuple[Sequence[Tensor], Sequence[str]] = (), ()
        """The parameters whose names were asked for last, and these names."""
        self.grad_scaler = checked_scaler(grad_scaler)
        self._overflow: SharedOverflow | None = None
        self.several: SeveralOptimizers | None = None
        """What several optimizers share; None for one, which has nothing to remember."""
        if len(optimizers) > 1:
            across_ranks = rank_layout.across is not None
            self.several = SeveralOptimizers(
                optimizers, self.grad_scaler, self._held_by, across_ranks=across_ranks
            )
        for device in self.devices:
            engine_for(settings.engine, device)
        self._engine = engine_for(settings.engine, self.device)
        self._plan()

    def attach(self) -> None:
        """Let the ranks share the overflows of the GradScaler until `detach`."""
        scaler, across = self.grad_scaler, self.rank_layout.across
        if scaler is not None and across is not None:
            self._overflow = SharedOverflow(scaler, self.optimizers, across, self.device)

    def detach(self) -> None:
        """Leave the GradScaler as it was; the second call does nothing."""
        if self._overflow is not None:
            self._overflow.release()

    @property
    def spans_ranks(self) -> bool:
        """True if other ranks may have gradients that share a norm with those of this one."""
        return not self.rank_layout.is_alone

    @property
    def device(self) -> torch.device:
        """The device of the norms: that of the first parameter, with values if one has."""
        device = CPU
        for parameter in parameters_held(self.optimizers):
            device = parameter.device
            if device.type != "meta":
                break
        return device

    @property
    def devices(self) -> list[torch.device]:
        """The devices of norms and parameters, each once."""
        return list(
            {self.device: None, **{p.device: None for p in parameters_held(self.optimizers)}}
        )

    def at_step(
        self, stepping: Optimizer, step_changes: StepChanges
    ) -> AnyGradients | ClipRecord | None:
        """Return the gradients to clip before a step.

        Args:
            stepping: The optimizer that is about to step.
            step_changes: The changes that last until that step ends.

        Returns:
            The gradients; or the record of the clipping that they have already had; or None where
            there is nothing to do, as at a step that GradScaler skips.

        Raises:
            AttachError: The gradients cannot be clipped rightly; nothing was written.
            ArgumentError: A group or parameter that was added cannot be labelled.
        """
        for optimizer in self.optimizers:
            check_groups(optimizer)
        # `_refresh` written out: a usual step makes as few calls as possible.
        self.labels.refresh()
        if self.labels.names is not self._planned_for:
            self._plan()
        scale = overflow = None
        if heeds_marks(stepping):
            scale, overflow = mark_of(stepping, "grad_scale"), mark_of(stepping, "found_inf")
        if self.rank_layout.across is not None:
            refuse_unshared_overflow(self._overflow)
        if overflow is not None:
            overflow = overflow > 0
            # Several optimizers under a GradScaler wait for the device in any case.
            if host_may_read(overflow) or self.several is not None:
                if overflow:
                    return None
                overflow = None
        if self.several is not None:
            choice = self.several.at_step(stepping, step_changes)
            return self._selected(choice) if isinstance(choice, Selection) else choice
        if scale is None and overflow is None and self._host_route is not None:
            usual = self._usual(self._host_route, stepping)
            if usual is not None:
                return usual
        if scale is None and overflow is None and self._row_rule is not None:
            rows = self._by_rows(self._row_rule, stepping)
            if rows is not None:
                return rows
        return self._step_gradients(self._held_by([stepping]), scale=scale, overflow=overflow)

    def of_micro_batch(
        self, settings: Settings, scale: Tensor | None
    ) -> StepGradients | GradientsWithoutValues:
        """Return the gradients that all optimizers hold, to be clipped before they are accumulated.

        Args:
            settings: The options for one of several micro-batches.
            scale: The factor by which GradScaler has multiplied the gradients, one element; None
                for unscaled gradients.
        """
        self._refresh()
        return self._step_gradients(self._held_by(self.optimizers), settings, scale=scale)

    def held_in_backward(self, stepping: Optimizer) -> HeldGradients:
        """Return the gradients that an optimizer holds when it steps inside ``backward()``."""
        check_groups(stepping)
        self._refresh()
        return self._held_by([stepping])

    def of_part(self, held: HeldGradients, count: int) -> StepGradients | GradientsWithoutValues:
        """Return the gradients of some of the norms.

        Args:
            held: The gradients, with indices among these norms; without any for a single norm.
            count: The number of these norms.
        """
        return self._step_gradients(held, count=count)

    def _refresh(self) -> None:
        """Label the parameters that were added since the last step, and plan anew if some were."""
        self.labels.refresh()
        if self.labels.names is not self._planned_for:  # made anew whenever parameters are added
            self._plan()

    def _plan(self) -> None:
        """Choose what serves a step, until parameters are added."""
        labels, rank_layout = self.labels, self.rank_layout
        if rank_layout.count != labels.count:
            rank_layout.refresh(parameters_held(self.optimizers))
        if self._threshold.needs_loss:
            check_reach(repr(self._threshold), rank_layout.norm_ranks)
        self._planned_for = labels.names
        self._one_norm_for_all = labels.is_global and not self.needs_weights
        self._host_route = None
        if self._may_be_usual and labels.is_global:
            if rank_layout.is_alone:
                self._host_route = self._here
            elif rank_layout.norm_ranks.only_group is not None:
                self._host_route = self._across_ranks

    def _selected(self, choice: Selection) -> AnyGradients:
        """Return the gradients that several optimizers share a norm of."""
        held, partial = choice
        if self._host_route is not None and held.gradients:
            usual = self._host_route(TensorList(held.gradients), held.names, partial)
            if usual is not None:
                return usual
        return self._step_gradients(held, partial=partial)

    def _usual(self, route: HostRoute, optimizer: Optimizer) -> HostGradients | None:
        """Return the gradients of the usual step; None if some are no plain ones on the CPU."""
        parameters = [*parameters_of(optimizer.param_groups)]
        named = self.rank_layout.wants_parameter_norms
        gradients = TensorList(map(GRADIENT, parameters))
        usual = route(gradients, self._names(parameters, gradients) if named else ())
        if usual is None:
            # Some parameters have no gradient, or share one.
            gradients = TensorList(gradients_of(parameters))
            usual = route(gradients, self._names(parameters, gradients) if named else ())
        return usual

    def _here(
        self, gradients: TensorList, names: Sequence[str], partial: bool = False
    ) -> HostGradients | None:
        """Return gradients that are on no other rank as those of a usual step, if they can be."""
        engine, settings = self._engine, self._settings
        if not engine.prepare(gradients, settings.norm_type):
            return None
        return HostGradients(engine, gradients, settings, names, partial)

    def _across_ranks(
        self, gradients: TensorList, names: Sequence[str], partial: bool = False
    ) -> HostGradients | None:
        """Do the same for gradients whose norm spans the ranks of one collective."""
        engine, settings, rank_layout = self._engine, self._settings, self.rank_layout
        parts = parts_in(rank_layout.norm_ranks, gradients)
        if parts is None or not engine.prepare(parts.tensors, settings.norm_type):
            return None
        return SharedHostGradients(
            engine,
            gradients,
            parts,
            settings,
            (rank_layout.parameter_names(names) or ()) if names else (),
            tuple(rank_layout.parameter_indices(names)) if names else (),
            self._needs_present,
            partial,
        )

    def _by_rows(self, rule: RelativeToWeights, optimizer: Optimizer) -> RowGradients | None:
        """Return gradients to clip in one pass by row; None if norms or gradients are not such."""
        parameters = [*parameters_of(optimizer.param_groups)]
        plan = self._row_plan
        if plan is None or not plan.fits(parameters, self.labels):
            plan = self._row_plan = RowPlan(parameters, self.labels)
        if not (plan.is_possible and self.rank_layout.is_alone):
            return None
        engine, order = self._engine, self._settings.norm_type
        gradients = TensorList(map(GRADIENT, plan.parameters))
        weights = TensorList(plan.parameters)
        if require_grad(gradients):
            return None  # the pass would write into their graph
        rows = engine.prepare_rows(gradients, weights, order, rows=plan.by_rows)
        if rows != len(self.labels.names):
            return None  # or a parameter was resized, which the general way refuses
        names = plan.names if self.rank_layout.wants_parameter_norms else None
        limit, settings = rule.relative_limit, self._settings
        return RowGradients(engine, gradients, weights, plan.norm_indices, limit, settings, names)

    def _step_gradients(
        self,
        held: HeldGradients,
        settings: Settings | None = None,
        count: int | None = None,
        **options: Any,
    ) -> StepGradients | GradientsWithoutValues:
        labels, rank_layout = self.labels, self.rank_layout
        one_norm = self._one_norm_for_all or labels.has_one_norm
        if count is None:
            count = len(labels.names)
        else:
            one_norm = not held.norm_indices
        if lack_values(held.gradients):
            return GradientsWithoutValues(held.gradients, count, self.device)
        names = rank_layout.parameter_names(held.names)
        return StepGradients(
            held.gradients,
            None if one_norm else held.norm_indices,
            settings or self._settings,
            count,
            self.device,
            weights=held.weights if self.needs_weights else None,
            names=names,
            norm_ranks=rank_layout.norm_ranks,
            counts_here=() if labels.all_count else held.counts_here,
            parameter_indices=rank_layout.parameter_indices(held.names),
            needs_present=self._needs_present,
            **options,
        )

    def _held_by(self, optimizers: Sequence[Optimizer]) -> HeldGradients:
        """Return the distinct gradients of optimizers that belong to some norm."""
        parameters = [*parameters_held(optimizers)]
        if self._one_norm_for_all:
            gradients = gradients_of(parameters)
            asked = self.rank_layout.wants_parameter_norms
            return HeldGradients(
                gradients, names=self._names(parameters, gradients) if asked else ()
            )
        names: list[str] = []
        held, ids = HeldGradients(names=names), set()
        # The threshold of a parameter's own norm follows from its weights, also on a rank that has
        # no gradient of it, because another rank has one.
        weights_alone = self.needs_weights and self.labels.kind in SCOPES_BY_NAME
        for parameter in parameters:
            gradient = parameter.grad
            if id(gradient) in ids or (gradient is None and not weights_alone):
                continue
            labelled = self.labels.of(parameter)
            if labelled.norm_indices is None:
                continue
            if self.needs_weights:
                held.weights.append(Weight(parameter, labelled.norm_indices, labelled.counts))
            if gradient is not None:
                ids.add(id(gradient))
                held.gradients.append(gradient)
                held.norm_indices.append(labelled.norm_indices)
                held.counts_here.append(labelled.counts)
                names.append(labelled.name)
        return held

    def _names(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Sequence[str]:
        """Return the names of the gradients' parameters."""
        if len(gradients) < len(parameters):
            # Reversed, so that of several parameters with one gradient the first names it.
            by_id = {id(parameter.grad): parameter for parameter in reversed(parameters)}
            return [self.labels.of(by_id[id(gradient)]).name for gradient in gradients]
        # The usual case: the same parameters as at the last step, all of them with a gradient.
        named, names = self._named
        if len(named) != len(parameters) or not all(map(is_, named, parameters)):
            names = [self.labels.of(parameter).name for parameter in parameters]
            self._named = parameters, names
        return names

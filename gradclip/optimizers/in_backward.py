"""Steps that optimizers take inside ``backward()``, each as soon as its gradients are there.

Norms that need no other optimizer's gradient are measured and clipped at each of these steps. When
the backward pass is over they become one record, from which the rule learns once.

Whether gradients are still to come is known to the autograd engine, which tells the nodes that the
running pass executes. An optimizer whose parameters have no part in the pass steps as ever: one
that a function trains in its own ``backward``, or that checkpointed code trains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer

from ..engines.cuda_graphs import capturing
from ..errors import AttachError
from ..gradients.held import HeldGradients, parameters_held, parameters_of
from ..gradients.norm_thresholds import NormThresholds
from ..gradients.parts import OwnNorms, StepParts
from ..gradients.policies import Settings
from ..gradients.without_values import GradientsWithoutValues
from ..ranks.averaging import AveragingModules
from ..ranks.shards import is_dtensor
from ..records.record import ClipRecord
from ..records.recorder import Recorder
from ..scopes.labels import LabelledParameter
from ..scopes.norm_indices import NOWHERE
from .call_stack import running_scaler
from .joint import JointGradients

running_pass = torch._C._current_graph_task_id  # as torch.utils.checkpoint asks, too
"""Returns the number of the backward pass that runs, -1 for none."""


class StepsInBackward:
    """The steps of a clipper's optimizers inside ``backward()``.

    Args:
        joint: The gradients of the optimizers.
        norm_thresholds: The thresholds of their norms.
        recorder: Knows the index of a step.
        settings: The options of the clipper.
        count: Takes the record of a whole backward pass.
    """

    def __init__(
        self,
        joint: JointGradients,
        norm_thresholds: NormThresholds,
        recorder: Recorder,
        settings: Settings,
        count: Callable[[ClipRecord], None],
    ) -> None:
        self._joint = joint
        self._labels = joint.labels
        self._norm_thresholds = norm_thresholds
        self._recorder = recorder
        self._settings = settings
        self._count = count
        self._running: _BackwardPass | None = None
        # The engine has a thread for each device, and their hooks may run at the same time.
        self._lock = Lock()
        self._known_for: tuple[str, ...] = ()
        self._shared: dict[Optimizer, list[LabelledParameter]] = {}
        """The optimizers with norms of their own alone, each with the parameters that share one."""
        self._own_norms: dict[Optimizer, tuple[tuple[int, ...], OwnNorms]] = {}

    def awaits_gradients(self, stepping: Optimizer) -> bool:
        """Return whether gradients of the clipper's optimizers belong to the running pass."""
        # The first parameter decides in nearly every case.
        others = [optimizer for optimizer in self._joint.optimizers if optimizer is not stepping]
        return any(map(_takes_part, parameters_held([stepping, *others])))

    def clip(self, stepping: Optimizer, loss: Tensor | float | None) -> None:
        """Clip the gradients of an optimizer that steps inside the running backward pass.

        Raises:
            AttachError: Its norms need gradients that are not there yet, or an option needs the
                norms of the whole step.
        """
        with self._lock:
            held = self._joint.held_in_backward(stepping)
            if self._known_for is not self._labels.names:
                self._check_options(stepping)
                self._known_for, self._shared, self._own_norms = self._labels.names, {}, {}
            self._check(stepping)
            own = self._norms_of(stepping, held)
            if own is None:
                return
            gradients = self._joint.of_part(own.among_these(held), len(own.numbers))
            if isinstance(gradients, GradientsWithoutValues):
                return
            gradients.loss = loss
            running = self._pass_with(own.numbers)
            running.parts.clip_(
                gradients,
                own.indices,
                lambda part, norms: self._norm_thresholds.at_step(part, norms, running.step),
                needs_weights=self._joint.needs_weights,
            )

    def finish(self) -> None:
        """End the pass that is under way, and hand over its record."""
        running, self._running = self._running, None
        if running is None or not running.parts:
            return  # or its first step has raised
        parts, step = running.parts, running.step
        norms = parts.norms()
        # Asked again for all norms at once, the rule learns from them, and has the thresholds of
        # those without a gradient.
        thresholds = parts.thresholds(self._norm_thresholds.at_step(parts, norms, step))
        values = (norms, thresholds, parts.coefficients(), False, None, parts.parameter_sums())
        self._count(ClipRecord(step, time.time(), *values, parts.loss))

    # The pass

    def _norms_of(self, stepping: Optimizer, held: HeldGradients) -> OwnNorms | None:
        """Return the norms of the gradients that an optimizer holds; None for none."""
        key = (*map(id, held.norm_indices),)
        if not key:
            return None
        known, own = self._own_norms.get(stepping, ((), None))
        if known != key or own is None:
            own = OwnNorms.of(held, self._joint.device)
            self._own_norms[stepping] = key, own
        return own if own.numbers else None

    def _pass_with(self, norms: frozenset[int]) -> _BackwardPass:
        """Return the running pass; another one begins where a norm comes a second time."""
        task, names, running = running_pass(), self._labels.names, self._running
        if running is not None and not running.may_take(task, names, norms):
            # It raised before its end, or it goes on after one that runs within it.
            self.finish()
            running = None
        if running is None:
            step = self._recorder.next_step(0.0, captured=False)
            running = _BackwardPass(task, names, step, StepParts(len(names), self._joint.device))
            self._running = running
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(partial(self._finish_pass, running))
        running.norms |= norms
        return running

    def _finish_pass(self, ended: _BackwardPass) -> None:
        """Called by the engine after the last node of a pass, unless that raises."""
        if self._running is ended:
            with torch.no_grad():
                self.finish()

    # Refusals

    def _check(self, stepping: Optimizer) -> None:
        if capturing():
            raise AttachError(
                f"{_steps(stepping)}, and a CUDA graph is captured, which would repeat the step "
                "and record nothing: capture steps that are taken after backward()."
            )
        scaler = self._joint.grad_scaler
        if running_scaler() is not None or (scaler is not None and scaler.is_enabled()):
            raise AttachError(
                f"{_steps(stepping)} under a GradScaler, which may find an overflow after other "
                "optimizers have stepped: step after backward(), or train in bfloat16, which "
                "needs no scale."
            )
        if stepping not in self._shared:
            self._shared[stepping] = self._parameters_that_share(stepping)
        for labelled in self._shared[stepping]:
            parameter = labelled.parameter
            if parameter.grad is None and _takes_part(parameter):
                raise AttachError(
                    f"{_steps(stepping)}, where the gradient of {labelled.name} is not there yet, "
                    "which shares its norm: step when all gradients of the group are there, or "
                    "give the clipper scope='parameter' or 'unit'."
                )

    def _check_options(self, stepping: Optimizer) -> None:
        """Refuse what holds for all steps inside backward, until there are other parameters."""
        if self._settings.skips or self._settings.raises:
            raise AttachError(
                f"{_steps(stepping)}, where other optimizers have stepped already, so that the "
                "whole step can no longer be skipped: set exceed to 'scale' and nonfinite to "
                "'zero', or step after backward()."
            )
        if self._joint.rank_layout.across is not None:
            raise AttachError(
                f"{_steps(stepping)}, and the clipper has ranks=, whose other ranks need not step "
                "at the same time: step after backward()."
            )
        if AveragingModules(parameters_held(self._joint.optimizers)).replicate:
            raise AttachError(
                f"{_steps(stepping)}, before DistributedDataParallel has averaged its gradients: "
                "step after backward()."
            )

    def _parameters_that_share(self, stepping: Optimizer) -> list[LabelledParameter]:
        """Check that an optimizer has all parameters of its norms; return those that share one."""
        labels = self._labels
        own = {id(parameter) for parameter in parameters_of(stepping.param_groups)}
        inside = [each for each in labels.labelled if id(each.parameter) in own]
        count = len(labels.names)
        sizes, own_sizes = _sizes(labels.labelled, count), _sizes(inside, count)
        is_global = torch.tensor(
            [labels.kind == "global" and limit is None for limit in labels.group_thresholds],
            device="cpu",
        )
        torn = (own_sizes > 0) & ((own_sizes < sizes) | is_global)
        if bool(torn.any()):
            name = labels.names[int(torn.nonzero()[0])]
            raise AttachError(
                f"{_steps(stepping)}, where the other gradients of the norm {name!r} are not there "
                "yet, so that it is not known: step after backward(), or give the clipper "
                "scope='parameter', 'unit', or 'group' where an optimizer holds whole groups."
            )
        return [each for each in inside if bool((sizes[_numbers(each)] > 1).any())]


class _BackwardPass:
    """A backward pass in which optimizers step.

    Args:
        task: Its number.
        names: The labels of the norms.
        step: Index of the step that its steps are together.
        parts: The norms so far.
    """

    def __init__(self, task: int, names: tuple[str, ...], step: int, parts: StepParts) -> None:
        self._task = task
        self._names = names
        self.step = step
        self.parts = parts
        self.norms: frozenset[int] = frozenset()
        """The indices of the norms so far."""

    def may_take(self, task: int, names: tuple[str, ...], norms: frozenset[int]) -> bool:
        """Return whether further norms belong to this pass."""
        return task == self._task and names is self._names and self.norms.isdisjoint(norms)


def _steps(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__name__} steps inside backward()"


def _takes_part(parameter: Tensor) -> bool:
    """Return whether the running pass computes the gradient of a parameter, now or before."""
    if is_dtensor(parameter) or getattr(parameter, "_fsdp_flattened", False):
        return True  # FSDP has parameters of its own in the graph
    if not parameter.requires_grad:
        return False
    takes_part: bool = torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    return takes_part


def _numbers(labelled: LabelledParameter) -> Tensor:
    """Return the indices of a parameter's norms, each once."""
    if labelled.norm_indices is None:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    indices: Tensor = labelled.norm_indices.indices.unique()
    return indices[indices != NOWHERE]


def _sizes(labelled: Sequence[LabelledParameter], count: int) -> Tensor:
    """Return the number of parameters in each norm; shape (k,)."""
    sizes: Tensor = torch.cat([*map(_numbers, labelled)]).bincount(minlength=count)
    return sizes

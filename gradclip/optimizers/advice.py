"""Warnings about optimizers whose updates clipping changes in unexpected ways, or not at all."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..engines.base import has_values
from ..gradients.held import parameters_of
from ..records.record import ClipRecord
from ..scopes.labels import NormLabels

MARK = "ignores_gradient_scale"
"""Attribute of an optimizer, or of its class, that says whether `ignores_scale`."""
WORDS = {"lion", "muon", "sign", "signsgd", "signum", "tiger"}
"""Words in the names of classes whose update does not depend on the scale of the gradient."""
MUON_KEY = "use_muon"
"""Key of the parameter groups of an optimizer that serves some by Muon and others by Adam, as
MuonWithAuxAdam of Keller Jordan's package does."""

FIRST_STEPS = 3
"""Steps from the first on that get a warning if none of them has a gradient."""


def ignores_scale(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Return whether the update keeps its size when all gradients are multiplied by a factor.

    Muon makes the gradient orthogonal, Lion and signSGD take its signs. Known by the name of the
    class or of a parent class, wherever it comes from, unless the optimizer says it itself by an
    attribute ``ignores_gradient_scale``, or its groups by a key ``use_muon``.

    Args:
        optimizer: The optimizer.
        group: One of its parameter groups.
    """
    mark = getattr(optimizer, MARK, None)
    if mark is not None:
        return bool(mark)
    return not WORDS.isdisjoint(_words_of(optimizer)) and bool(group.get(MUON_KEY, True))


def warn_of_shared_norms(optimizers: Sequence[Optimizer], labels: NormLabels) -> None:
    """Warn if parameters whose update ignores the scale of the gradient share a norm with others.

    Args:
        optimizers: The optimizers of a clipper.
        labels: The labels of their norms.
    """
    owners: dict[bool, dict[int, str]] = {True: {}, False: {}}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            norms = _norms_of([group], labels).values()
            names = owners[ignores_scale(optimizer, group)]
            names.update(dict.fromkeys(norms, _name_of(optimizer, group)))
    shared = owners[True].keys() & owners[False].keys()
    if shared:
        name, other = (owners[free][min(shared)] for free in (True, False))
        warnings.warn(
            f"{name} shares a norm with {other}, and its update does not depend on the scale of "
            f"its gradients: they enlarge the norm by which those of {other} are clipped, and "
            "clipping only brings them closer to 0, where a normalisation such as Muon's (plus "
            "1e-7) loses them. Leave them out of the norm by the parameter group "
            "{'params': ..., 'max_norm': None}, or give each parameter group a norm of its own by "
            "scope='group'.",
            UserWarning,
            stacklevel=4,
        )


def normalised(optimizers: Sequence[Optimizer], labels: NormLabels) -> dict[str, int]:
    """Return the parameters whose gradient the optimizer divides by its norm, with their norms.

    Muon adds 1e-7 to that norm. The sign of a gradient has no such limit.
    """
    dividing = [
        group
        for optimizer in optimizers
        if getattr(optimizer, MARK, "muon" in _words_of(optimizer))
        for group in optimizer.param_groups
        if ignores_scale(optimizer, group)
    ]
    return _norms_of(dividing, labels)


def _words_of(optimizer: Optimizer) -> list[str]:
    """Return the words in the names of its classes: "PagedLion8bit" has "lion", "Million" not."""
    names = " ".join(kind.__name__ for kind in type(optimizer).__mro__)
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", names)]


def _name_of(optimizer: Optimizer, group: dict[str, Any]) -> str:
    name = type(optimizer).__name__
    return f"{name} with {MUON_KEY}={group[MUON_KEY]}" if MUON_KEY in group else name


def _norms_of(groups: Sequence[dict[str, Any]], labels: NormLabels) -> dict[str, int]:
    """Return the norm of each parameter of groups, but of those whose rows have norms."""
    return {
        entry.name: entry.norm_indices.indices.tolist()[0]
        for entry in map(labels.of, parameters_of(groups))
        if entry.norm_indices is not None and not entry.norm_indices.rows
    }


Clip = Callable[..., ClipRecord | None]


def advising(clip: Clip, optimizer: Optimizer) -> Clip:
    """Return a function that clips, and warns once if that is no way to step.

    Args:
        clip: Clips the gradients of an optimizer and returns the record.
        optimizer: The optimizer.
    """
    lacks_search = isinstance(optimizer, LBFGS) and any(
        group["line_search_fn"] is None for group in optimizer.param_groups
    )
    return _WithLineSearchAdvice(clip) if lacks_search else clip


class _WithLineSearchAdvice:
    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self._has_warned = False

    def __call__(self, *args: object) -> ClipRecord | None:
        record = self._clip(*args)
        # LBFGS reads its loss on the host after each evaluation: this waits for nothing more.
        if not self._has_warned and record is not None and _is_reduced(record.values[2]):
            self._has_warned = True
            warnings.warn(
                "The gradients of LBFGS were clipped, and it has no line search: it infers the "
                "curvature from differences of gradients, which clipping makes smaller, and may "
                "take steps that are far too long. Build it with line_search_fn='strong_wolfe', "
                "which rejects such steps, or leave its gradients unclipped with max_norm=None.",
                UserWarning,
                stacklevel=2,
            )
        return record


def _is_reduced(coefficients: Tensor | float) -> bool:
    if isinstance(coefficients, float):
        return coefficients < 1
    return has_values(coefficients) and bool((coefficients < 1).any())


class EmptySteps:
    """Warns once if there was no gradient to clip at any of the first steps.

    Args:
        name: Name of the optimizer.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._newest: ClipRecord | None = None
        self._count = 0

    def add(self, record: ClipRecord, last: ClipRecord | None) -> None:
        """Take the record of a step without gradients, and that of the step before."""
        if last is not self._newest:
            return  # the step before had some
        self._newest = record
        self._count += 1
        if self._count == FIRST_STEPS:
            warnings.warn(
                f"There was no gradient to clip in the first {FIRST_STEPS} steps: the parameters "
                f"of {self._name} had none. Call backward() before step(), and give the optimizer "
                "the parameters that are trained, those with requires_grad=True.",
                UserWarning,
                stacklevel=8,  # the line that steps
            )

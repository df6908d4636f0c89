"""The labels of all norms, and for each parameter which of them are its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ArgumentError, AttachError
from .group_keys import ABSENT, GroupKeys
from .naming import NamedParameter, group_name, named_parameters
from .places import NOWHERE, Place
from .scopes import SHARED, Scope


class NormLabels:
    """Labels parameters when they are first seen: by their group's ``max_norm``, else by a scope.

    Args:
        optimizers: The optimizers, in the order in which they are counted.
        scope: The labelling of parameters whose group has no ``max_norm``.
        model: Gives parameters their names.

    Raises:
        ArgumentError: The scope labels a parameter with what is no label, or a group has an
            impossible ``max_norm``, or ``model`` is no module.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], scope: Scope, model: nn.Module | None = None
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise ArgumentError(f"model is a {type(model).__name__}: give a torch.nn.Module.")
        self._optimizers = optimizers
        self._scope = scope
        self._model = model
        self._keys = GroupKeys(optimizers)
        self._known: dict[int, Known] = {}
        self._indices: dict[tuple[bool, str], int] = {}
        self.count = -1
        """How many parameters the groups have."""
        self.warn_of_lost_keys = self._keys.warn_of_lost_keys
        self.names: tuple[str, ...] = ()
        """The k labels, in the order of the norms."""
        self.limits: tuple[float | None, ...] = ()
        """For each label the threshold of its group; None where the clipper's threshold rules."""
        self.everything = scope.is_everything
        """Whether all gradients share one norm, so that no place need be looked up."""
        self.single = True
        """Whether there is one label, and all that is labelled belongs to it."""
        self.refresh()
        scope.check_names([each.name for each in self._named()])

    def refresh(self) -> None:
        """Label the groups and parameters that were added since.

        Raises:
            ArgumentError: One of them cannot be labelled.
            AttachError: Groups or parameters were taken away or moved, so that it is not known
                which is which.
        """
        self._keys.refresh(numbered=self._scope.kind == "group")
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        count = sum(len(group["params"]) for group in groups)
        if count != self.count:
            self._label_new()
            self.count = count

    def of(self, parameter: Tensor) -> Known:
        """Return the name of a parameter, and where the norms of its gradient are.

        Raises:
            ArgumentError: The parameter is new, and cannot be labelled.
            AttachError: It has the name of another.
        """
        known = self._known.get(id(parameter))
        if known is None or known.parameter() is not parameter:
            self._label_new()
            known = self._known[id(parameter)]
        return known

    def _label_new(self) -> None:
        """Label what is new; all of it or, on an error, nothing."""
        table = _Table(self._indices, self.limits)
        known: dict[int, Known] = {}
        for named in self._named():
            found = self._known.get(id(named.parameter))
            if found is None or found.parameter() is not named.parameter:
                found = Known(ref(named.parameter), named.name, self._new_place(named, table))
            known[id(named.parameter)] = found
        self._check_distinct(known.values())
        if not table.indices:
            table.index_of(SHARED)  # everything is left out: a norm of nothing
        self._known, self._indices, self.limits = known, table.indices, tuple(table.limits)
        self.names = tuple(label for _, label in table.indices)
        self.everything = self._scope.is_everything and not self._keys.given
        kept = [each.place for each in known.values() if each.place is not None]
        self.single = len(self.names) == 1 and not any(place.rows for place in kept)

    def _check_distinct(self, known: Iterable[Known]) -> None:
        if self._scope.kind not in ("parameter", "unit"):
            return
        for name, count in Counter(each.name for each in known).items():
            if count > 1:
                raise AttachError(
                    f"Parameters were moved so that {name} is the name of {count} of them, which "
                    f"scope={self._scope.kind!r} would clip together: detach() and attach a new "
                    "clipper, with model= so that names do not depend on places."
                )

    def _named(self) -> Iterator[NamedParameter]:
        return named_parameters(self._optimizers, self._model)

    def _new_place(self, named: NamedParameter, table: _Table) -> Place | None:
        group = group_name(self._optimizers, named.optimizer, named.group)
        key = self._keys.of(named.optimizer, named.group)
        if key is None:
            return None
        if key is not ABSENT:
            return Place(_indices([table.index_of(group, limit=key)]))
        labels = self._scope.labels(named.name, named.parameter, group)
        if labels is None:
            return None
        if isinstance(labels, str):
            return Place(_indices([table.index_of(labels)]))
        each = [NOWHERE if label is None else table.index_of(label) for label in labels]
        return Place(_indices(each), rows=True)


@dataclass(frozen=True, slots=True)
class Known:
    """A parameter that was labelled."""

    parameter: ref[Tensor]
    name: str
    """Its name at that time."""
    place: Place | None
    """None where its gradient is in no norm."""


class _Table:
    """The labels so far, with the thresholds of groups that have their own."""

    def __init__(
        self, indices: dict[tuple[bool, str], int], limits: Sequence[float | None]
    ) -> None:
        self.indices = dict(indices)
        self.limits = list(limits)

    def index_of(self, label: str, limit: float | None = None) -> int:
        """Return the index of a label, which is a new one where it was not there."""
        index = self.indices.setdefault((limit is None, label), len(self.indices))
        if index == len(self.limits):
            self.limits.append(limit)
        return index


def _indices(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")

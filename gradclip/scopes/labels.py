"""The labels of all norms, and for each parameter which of them are its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ArgumentError, AttachError
from .group_keys import ABSENT, GroupKeys
from .naming import NamedParameter, group_name, named_parameters
from .norm_indices import NOWHERE, Place
from .scope import SHARED, Scope


class NormLabels:
    """Labels parameters when they are first seen: by their group's ``max_norm``, else by a scope.

    Args:
        optimizers: The optimizers, in the order in which they are counted.
        scope: The labelling of parameters whose group has no ``max_norm``.
        model: Gives parameters their names.
        copy_name: Returns the name that all copies of a parameter on several ranks share, and None
            for one without copies; None where there are no other ranks.

    Raises:
        ArgumentError: The scope labels a parameter with what is no label, or a group has an
            impossible ``max_norm``, or ``model`` is no module.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        scope: Scope,
        model: nn.Module | None = None,
        copy_name: Callable[[str, Tensor], str | None] | None = None,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise ArgumentError(f"model is a {type(model).__name__}: give a torch.nn.Module.")
        self._optimizers = optimizers
        self._scope = scope
        self._model = model
        self._copy_name = copy_name
        self._agreed = False
        self._keys = GroupKeys(optimizers)
        self._known: dict[int, LabelledParameter] = {}
        self._indices: dict[Key, int] = {}
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
        self.complete = True
        """Whether all parameters count here, none being a copy of what is on another rank."""
        self.refresh()
        if copy_name is None:
            self.check_exclusions(self.all_names)

    @property
    def kind(self) -> str:
        """The scope's kind; "" for a function."""
        return self._scope.kind if isinstance(self._scope.kind, str) else ""

    @property
    def all_names(self) -> list[str]:
        """The names of all parameters, in a norm or not."""
        return [each.name for each in self.parameters]

    @property
    def labelled(self) -> tuple[LabelledParameter, ...]:
        """All parameters with their labels, in the order in which they were first seen."""
        return tuple(self._known.values())

    @property
    def parameters(self) -> Iterator[NamedParameter]:
        """All parameters of the optimizers under their present names, in a norm or not."""
        return named_parameters(self._optimizers, self._model)

    @property
    def by_key(self) -> dict[Key, float | None]:
        """The labels, each with whether the clipper's threshold rules it, and their limits."""
        return dict(zip(self._indices, self.limits, strict=True))

    def check_exclusions(self, names: Sequence[str]) -> None:
        """Check that each name that the scope excludes is among these.

        Raises:
            ArgumentError: One matches none of them.
        """
        self._scope.exclude.check(names)

    def adopt(
        self, thresholds: Mapping[Key, float | None], labelled: Iterable[LabelledParameter]
    ) -> None:
        """Replace the norms by those that all ranks agree on; later ones are refused.

        Args:
            thresholds: The norms in their order, with the thresholds of groups that have their own.
            labelled: The parameters, with their indices among these norms.
        """
        for known in labelled:
            parameter = known.parameter()
            if parameter is not None:
                self._known[id(parameter)] = known
        self._agreed = True
        self._settle({key: i for i, key in enumerate(thresholds)}, [*thresholds.values()])

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

    def of(self, parameter: Tensor) -> LabelledParameter:
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
        any_placed = any(each.place is not None for each in self._known.values())
        # Not the norm of nothing, once there is something.
        table = _Table(self._indices, self.limits) if any_placed else _Table({}, ())
        known: dict[int, LabelledParameter] = {}
        for named in self.parameters:
            found = self._known.get(id(named.parameter))
            if found is None or found.parameter() is not named.parameter:
                found = self._new(named, table)
            known[id(named.parameter)] = found
        self._check_distinct(known.values())
        if not table.indices:
            table.index_of(SHARED)  # everything is left out: a norm of nothing
        self._known = known
        self._settle(table.indices, table.limits)

    def _settle(self, indices: dict[Key, int], limits: Sequence[float | None]) -> None:
        self._indices, self.limits = indices, tuple(limits)
        self.names = tuple(label for _, label in indices)
        self.complete = all(each.counts for each in self._known.values())
        self.everything = (
            self._scope.is_everything
            and not self._keys.given
            and self.complete
            and len(self.names) == 1
        )
        kept = [each.place for each in self._known.values() if each.place is not None]
        self.single = len(self.names) == 1 and not any(place.rows for place in kept)

    def _check_distinct(self, known: Iterable[LabelledParameter]) -> None:
        if self._scope.kind not in ("parameter", "unit"):
            return
        for name, count in Counter(each.name for each in known).items():
            if count > 1:
                raise AttachError(
                    f"Parameters were moved so that {name} is the name of {count} of them, which "
                    f"scope={self._scope.kind!r} would clip together: detach() and attach a new "
                    "clipper, with model= so that names do not depend on places."
                )

    def _new(self, named: NamedParameter, table: _Table) -> LabelledParameter:
        name, parameter, count = named.name, named.parameter, len(table.indices)
        place = self._new_place(named, table)
        copy_of = None
        if self._copy_name is not None and place is not None:
            copy_of = self._copy_name(name, parameter)
        if self._agreed and (copy_of is not None or len(table.indices) > count):
            raise AttachError(
                f"{name} was added after the ranks had agreed on the norms and the copies of "
                "parameters, which it changes: detach() on all ranks, and attach new clippers."
            )
        return LabelledParameter(ref(parameter), name, place, named.given, copy_of)

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
class LabelledParameter:
    """A parameter that was labelled."""

    parameter: ref[Tensor]
    name: str
    """Its name at that time."""
    place: Place | None
    """None where its gradient is in no norm."""
    given: bool = True
    """Whether the name is no place in the groups."""
    copy_of: str | None = None
    """What all copies of it are called, where other ranks have some."""
    counts: bool = True
    """Whether it is the one of them that counts."""


class _Table:
    """The labels so far, with the thresholds of groups that have their own."""

    def __init__(self, indices: dict[Key, int], limits: Sequence[float | None]) -> None:
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


Key = tuple[bool, str]
"""Whether the clipper's threshold rules a norm, and its label."""


Limits = dict[Key, float | None]
"""Norms in their order, with the thresholds of groups that have their own."""

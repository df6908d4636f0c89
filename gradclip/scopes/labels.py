"""The labels of one clipper's norms, and the norms that each parameter contributes to.

Parameters are labelled when they are first met, not at every step: a scope may be a function of
the user's, and the index of a norm has to stay what it is in records and in the state of rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ArgumentError, AttachError
from .group_keys import ABSENT, GroupKeys
from .naming import NamedParameter, group_name, named_parameters
from .norm_indices import NOWHERE, NormIndices, index_tensor
from .scope import SHARED, Scope

NormKey = tuple[bool, str]
"""True if the clipper's threshold applies to the norm, and its label. A parameter group with a
``max_norm`` may have the same label as a norm of the scope, and is another norm."""

_GROUPS, _PARAMETERS = attrgetter("param_groups"), itemgetter("params")

GroupThresholds = dict[NormKey, float | None]
"""The norms in order, each with the ``max_norm`` of its parameter group, None for the others."""


@dataclass(frozen=True, slots=True)
class LabelledParameter:
    """A parameter with the norms of its gradient."""

    parameter: Tensor
    """No weak reference: torch.utils.swap_tensors refuses a tensor that has one, as a module's
    ``to()`` may ask of it."""
    name: str
    """Its name when it was labelled."""
    norm_indices: NormIndices | None
    """None where its gradient is never clipped, in no norm."""
    has_given_name: bool = True
    """True if the model or the optimizer gave the name, False if it was generated."""
    copy_of: str | None = None
    """The name that its copies on all ranks share; None for a parameter without copies."""
    counts: bool = True
    """True if its gradient enters the norm here; of several copies one does."""


class NormLabels:
    """Labels parameters when they are first met: by their group's ``max_norm``, else by a scope.

    Args:
        optimizers: The optimizers, in the order in which they are numbered.
        scope: The labelling of parameters whose group has no ``max_norm``.
        model: Gives parameters their names.
        copy_name: Returns the name that all copies of a parameter on several ranks share, and None
            for one without copies; None where there are no other ranks.

    Raises:
        ArgumentError: The scope returns an invalid label, a group has an invalid ``max_norm``, or
            ``model`` is not a module.
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
        # By id, since a tensor compares element by element. Entries keep their parameters alive, so
        # that no other one gets their ids.
        self._labelled: dict[int, LabelledParameter] = {}
        self._indices: dict[NormKey, int] = {}
        self.count = -1
        """Number of the parameters in all groups."""
        self.warn_of_lost_keys = self._keys.warn_of_lost_keys
        self.names: tuple[str, ...] = ()
        """The k labels, in the order of the norms."""
        self.group_thresholds: tuple[float | None, ...] = ()
        """For each norm the ``max_norm`` of its parameter group; None where the clipper's threshold
        applies."""
        self.is_global = scope.is_everything
        """True if all gradients share one norm, so that no parameter need be looked up."""
        self.has_one_norm = True
        """True if there is one norm, and every gradient is in it whole or not at all."""
        self.all_count = True
        """True if no parameter is a copy that counts on another rank."""
        self.refresh()
        if copy_name is None:  # else once the names of all ranks are known
            self.check_exclusions(self.all_names)

    @property
    def kind(self) -> str:
        """The scope's kind; "" for a function."""
        return self._scope.kind if isinstance(self._scope.kind, str) else ""

    @property
    def all_names(self) -> list[str]:
        """The names of all parameters, in a norm or not."""
        return [named.name for named in self.parameters]

    @property
    def labelled(self) -> tuple[LabelledParameter, ...]:
        """All parameters with their norms, in the order in which they were first met."""
        return tuple(self._labelled.values())

    @property
    def parameters(self) -> Iterator[NamedParameter]:
        """All parameters of the optimizers under their present names, in a norm or not."""
        return named_parameters(self._optimizers, self._model)

    @property
    def thresholds_by_key(self) -> GroupThresholds:
        """The norms by key, with the thresholds of their parameter groups."""
        return dict(zip(self._indices, self.group_thresholds, strict=True))

    def check_exclusions(self, names: Sequence[str]) -> None:
        """Check that each name or pattern that the scope excludes matches one of these names.

        Raises:
            ArgumentError: One matches none of them.
        """
        self._scope.exclude.check(names)

    def adopt(
        self, thresholds: Mapping[NormKey, float | None], labelled: Iterable[LabelledParameter]
    ) -> None:
        """Replace the norms by those that all ranks agree on, and refuse norms added later.

        Args:
            thresholds: The norms in order, with the thresholds of their parameter groups.
            labelled: The parameters, with their indices among these norms.
        """
        self._labelled |= {id(entry.parameter): entry for entry in labelled}
        self._agreed = True
        self._settle({key: index for index, key in enumerate(thresholds)}, [*thresholds.values()])

    def refresh(self) -> None:
        """Label the groups and parameters that were added since the last call.

        Raises:
            ArgumentError: One of them cannot be labelled.
            AttachError: Groups or parameters were removed or moved, so that norms and parameters
                can no longer be matched.
        """
        self._keys.refresh(numbered=self._scope.kind == "group")
        groups = chain.from_iterable(map(_GROUPS, self._optimizers))
        # Called at every step: a count, not a walk over all parameters.
        count = sum(map(len, map(_PARAMETERS, groups)))
        if count != self.count:
            self._label_added()
            self.count = count

    def of(self, parameter: Tensor) -> LabelledParameter:
        """Return the name of a parameter and the norms of its gradient.

        Raises:
            ArgumentError: The parameter was added since, and cannot be labelled.
            AttachError: It has the name of another parameter.
        """
        entry = self._labelled.get(id(parameter))
        if entry is None:
            self._label_added()
            entry = self._labelled[id(parameter)]
        return entry

    def _label_added(self) -> None:
        """Label the parameters that were added; all of them or, on an error, none."""
        any_in_norm = any(entry.norm_indices is not None for entry in self._labelled.values())
        # The norm of no gradients, made below, does not stay once there are gradients.
        table = _NormTable(self._indices, self.group_thresholds) if any_in_norm else _NormTable()
        labelled: dict[int, LabelledParameter] = {}
        for named in self.parameters:
            entry = self._labelled.get(id(named.parameter))
            labelled[id(named.parameter)] = entry or self._label(named, table)
        self._check_distinct(labelled.values())
        if not table.indices:
            table.index_of(SHARED)  # every parameter is excluded: one norm, of no gradients
        self._labelled = labelled
        self._settle(table.indices, table.group_thresholds)

    def _settle(
        self, indices: dict[NormKey, int], group_thresholds: Sequence[float | None]
    ) -> None:
        self._indices, self.group_thresholds = indices, tuple(group_thresholds)
        self.names = tuple(label for _, label in indices)
        self.all_count = all(entry.counts for entry in self._labelled.values())
        one_norm = len(self.names) == 1
        no_keys = not self._keys.given
        self.is_global = self._scope.is_everything and no_keys and self.all_count and one_norm
        norm_indices = [entry.norm_indices for entry in self._labelled.values()]
        self.has_one_norm = one_norm and not any(n.rows for n in norm_indices if n is not None)

    def _check_distinct(self, labelled: Iterable[LabelledParameter]) -> None:
        """Refuse two parameters of one name, where names are labels."""
        if self._scope.kind not in ("parameter", "unit"):
            return
        for name, count in Counter(entry.name for entry in labelled).items():
            if count > 1:
                raise AttachError(
                    f"Parameters were moved so that {name} is the name of {count} of them, which "
                    f"scope={self._scope.kind!r} would clip together: detach() and attach a new "
                    "clipper, with model= so that names do not depend on positions in groups."
                )

    def _label(self, named: NamedParameter, table: _NormTable) -> LabelledParameter:
        name, parameter, count = named.name, named.parameter, len(table.indices)
        norm_indices = self._norm_indices(named, table)
        copy_of = None
        if self._copy_name is not None and norm_indices is not None:
            copy_of = self._copy_name(name, parameter)
        if self._agreed and (copy_of is not None or len(table.indices) > count):
            raise AttachError(
                f"{name} was added after the ranks had agreed on the norms and the copies of "
                "parameters, which it changes: detach() on all ranks, and attach new clippers."
            )
        return LabelledParameter(parameter, name, norm_indices, named.has_given_name, copy_of)

    def _norm_indices(self, named: NamedParameter, table: _NormTable) -> NormIndices | None:
        group = group_name(self._optimizers, named.optimizer, named.group)
        key = self._keys.of(named.optimizer, named.group)
        if key is None:
            return None
        if key is not ABSENT:
            return NormIndices(index_tensor([table.index_of(group, threshold=key)]))
        labels = self._scope.labels(named.name, named.parameter, group)
        if labels is None:
            return None
        if isinstance(labels, str):
            return NormIndices(index_tensor([table.index_of(labels)]))
        rows = [NOWHERE if label is None else table.index_of(label) for label in labels]
        return NormIndices(index_tensor(rows), rows=True)


class _NormTable:
    """The norms so far, to which labels are added."""

    def __init__(
        self,
        indices: Mapping[NormKey, int] | None = None,
        group_thresholds: Sequence[float | None] = (),
    ) -> None:
        self.indices = dict(indices or {})
        self.group_thresholds = list(group_thresholds)

    def index_of(self, label: str, threshold: float | None = None) -> int:
        """Return the index of a norm, adding it at the end if its label is unknown."""
        index = self.indices.setdefault((threshold is None, label), len(self.indices))
        if index == len(self.group_thresholds):
            self.group_thresholds.append(threshold)
        return index

"""The ranks that contribute to the norms of one clipper, settled when it attaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import ParamSpec

from torch import Tensor

from ..errors import AttachError
from ..scopes.labels import NormLabels
from ..scopes.norm_indices import NOWHERE, NormIndices, index_tensor
from .agreement import agreement_across, confirm_alike
from .groups import NormRanks, norm_ranks_of
from .messages import FailureMessage, message_of
from .ranks import Ranks
from .shards import groups_of

P = ParamSpec("P")


class RankLayout:
    """The ranks that the norms of a clipper span, and the parameters of all of them.

    Args:
        ranks: The ``ranks=`` option, or None.
        labels: The labels of the norms, which become those of all ranks.
        options: The options from `comparable_options`; ranks that differ in them are refused.
        wants_parameter_norms: Whether the norms of parameters are needed on this rank.
        weights_every: The numbers of steps after which the norms of weights are needed on it.

    Raises:
        AttachError: There is no process group.
    """

    def __init__(
        self,
        ranks: Ranks | None,
        labels: NormLabels,
        options: Mapping[str, str],
        wants_parameter_norms: bool,
        weights_every: frozenset[int] = frozenset(),
    ) -> None:
        self.norm_ranks = NormRanks()
        self.across = None if ranks is None else ranks.joined()
        """The group of the ``ranks=`` option."""
        self.wants_parameter_norms = wants_parameter_norms
        """True if one of the ranks needs the norms of parameters; all of them then measure."""
        self.weights_every = weights_every
        """The numbers of steps after which one of the ranks needs the norms of weights."""
        self._ranks = ranks
        self._labels = labels
        self._options = options
        self._names: tuple[str, ...] | None = None
        self._indices: dict[str, NormIndices] = {}
        self.is_alone = True
        """True if the norms span no other rank."""
        self.count = -1
        """Number of the parameters at the last `refresh`."""

    def refresh(self, parameters: Iterable[Tensor]) -> None:
        """Find the ranks that parameters are spread over. Called when there are more parameters.

        Collective at the first call. With DTensors alone it is again one when there are more, as
        the ranks of a DTensor have the same parameters. With ``ranks=`` it is not: one rank may
        have more when the others have not, and parameters that change the norms are refused.

        Raises:
            AttachError: The ranks do not fit together.
            ArgumentError: A name in an option is that of no parameter on any rank.
        """
        norm_ranks = norm_ranks_of(groups_of(parameters), self.across)
        if self.across is None or self.count < 0:
            self._agree(norm_ranks)
        self.norm_ranks, self.count = norm_ranks, self._labels.count
        self.is_alone = not norm_ranks

    def parameter_names(self, local_names: Sequence[str]) -> Sequence[str] | None:
        """Return the names of the parameters whose norms are measured; None for no such norms.

        Args:
            local_names: The names of the gradients on this rank, if it is alone.
        """
        if self.norm_ranks:
            return self._names
        return local_names if self.wants_parameter_norms else None

    def parameter_indices(self, names: Sequence[str]) -> list[NormIndices]:
        """Return the indices of this rank's parameters among those of all ranks.

        A parameter that was added since has none: its norm is in no log.
        """
        if self._names is None:
            return []
        return [self._indices.get(name, _UNKNOWN) for name in names]

    def _agree(self, norm_ranks: NormRanks) -> None:
        message = message_of(
            self._labels,
            self._options,
            across=self.across is not None,
            wants_parameter_norms=self.wants_parameter_norms,
            weights_every=self.weights_every,
        )
        if not (norm_ranks or message.elsewhere):
            return
        message = confirm_alike(message, norm_ranks.groups)
        names = [parameter.name for parameter in message.parameters]
        indices = {name: index for index, name in enumerate(names)}
        wanted, every = message.wants_parameter_norms, message.weights_every
        if self._ranks is not None and norm_ranks.across is not None:
            agreement = agreement_across(message, norm_ranks.across, self._ranks)
            agreement.apply_to(self._labels, norm_ranks.across.rank)
            names, indices = [*agreement.parameters], agreement.local_parameters
            wanted, every = agreement.wants_parameter_norms, agreement.weights_every
        self.wants_parameter_norms, self.weights_every = wanted, every
        self._names = tuple(names) if wanted else None
        self._indices = {name: _one_index(index) for name, index in indices.items()}


def announces_failure(attach: Callable[P, None]) -> Callable[P, None]:
    """Send an error of this rank alone to the ranks that wait for its message.

    Args:
        attach: A constructor that takes ``ranks`` by keyword, and agrees with them.
    """

    @wraps(attach)
    def attach_or_announce(*args: P.args, **kwargs: P.kwargs) -> None:
        ranks = kwargs.get("ranks")
        if isinstance(ranks, Ranks):
            ranks.announced = False
        try:
            attach(*args, **kwargs)
        except Exception as error:
            # After its own message a rank owes the others none: they find the error themselves.
            if isinstance(ranks, Ranks) and not ranks.announced:
                with suppress(AttachError):  # no process group: nobody waits
                    ranks.joined().gathered(FailureMessage(f"{type(error).__name__}: {error}"))
            raise

    return attach_or_announce


def _one_index(index: int) -> NormIndices:
    return NormIndices(index_tensor([index]))


_UNKNOWN = _one_index(NOWHERE)

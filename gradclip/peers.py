"""The other ranks of a clipper, and what it has agreed on with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .agreement import adopt, agreed_across, agreed_alike, message_of
from .ranks import Ranks, Reach, reach_of
from .scopes.labels import NormLabels
from .scopes.norm_indices import NOWHERE, Place
from .shards import groups_of

_UNKNOWN = Place(torch.tensor([NOWHERE], device="cpu"))


class Peers:
    """Knows which ranks the norms of a clipper span. Collective where there are any.

    Args:
        ranks: Those that have other parameters, or None.
        labels: The labels of the norms, which become those of all ranks.
        options: How the clipper is set; ranks that differ in it are refused.
        watched: Whether the norms of parameters are asked for on this rank.

    Raises:
        AttachError: There is no process group.
    """

    def __init__(
        self,
        ranks: Ranks | None,
        labels: NormLabels,
        options: Mapping[str, str],
        watched: bool,
    ) -> None:
        self.reach = Reach()
        self.names: tuple[str, ...] | None = None
        """Those of the parameters of all ranks, where one of the ranks asks for their norms."""
        self._ranks = ranks
        self.across = None if ranks is None else ranks.joined()
        self._labels = labels
        self._options = options
        self.watched = watched
        """Whether the norms of parameters are asked for on one of the ranks."""
        self._places: dict[str, Place] = {}
        self._count = -1

    def refresh(self, parameters: Iterable[Tensor]) -> None:
        """Find the ranks that parameters are spread over, again whenever there are new ones.

        Raises:
            AttachError: The ranks do not fit together.
            ArgumentError: A name in an option is that of no parameter of any rank.
        """
        count = self._labels.count
        if count == self._count:
            return
        reach = reach_of(groups_of(parameters), self.across)
        if self.across is None or self._count < 0:
            self._agree(reach)
        self.reach, self._count = reach, count

    def places(self, names: Sequence[str]) -> list[Place]:
        """Return where parameters are among those of all ranks; nowhere if added since."""
        if self.names is None:
            return []
        return [self._places.get(name, _UNKNOWN) for name in names]

    def _agree(self, reach: Reach) -> None:
        labels = self._labels
        message = message_of(
            labels, self._options, across=self.across is not None, watched=self.watched
        )
        if not (reach or message.elsewhere):
            return
        own = agreed_alike(message, reach.groups)
        names, self.watched = [each.name for each in own.parameters], own.watched
        places = {name: index for index, name in enumerate(names)}
        if self._ranks is not None and reach.across is not None:
            agreed = agreed_across(own, reach.across, self._ranks)
            adopt(labels, agreed, reach.across.own)
            names, places, self.watched = [*agreed.names], agreed.places, agreed.watched
        self.names = tuple(names) if self.watched else None
        self._places = {name: Place(torch.tensor([i], device="cpu")) for name, i in places.items()}

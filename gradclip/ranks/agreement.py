"""The agreement that all ranks reach on norms, parameter names and replicated parameters.

Clippers whose DTensors lie on the same ranks have the same parameters, and only confirm it
(`confirm_alike`). Clippers with ``ranks=`` have different ones: each rank merges the messages of
all in the order of the ranks (`agreement_across`), so that all find the same agreement.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import distributed

from ..errors import AttachError
from ..scopes.labels import GroupThresholds, LabelledParameter, NormLabels
from ..scopes.norm_indices import NOWHERE, NormIndices, index_tensor
from ..scopes.scope import SHARED
from .groups import RankGroup
from .messages import ClipperMessage, Original
from .ranks import Ranks
from .refusals import (
    add_norm,
    check_alike,
    check_copied,
    check_copy,
    check_elsewhere,
    check_errors,
    check_names,
    check_options,
    check_uncopied,
)

SCOPES_BY_NAME = ("parameter", "unit")
"""Scopes whose norms are those of single parameters, matched across ranks by name."""


@dataclass(slots=True)
class Agreement:
    """The facts that are the same on all ranks, and where this rank's parameters are among them."""

    all_names: list[str]
    """Names of the parameters of all ranks, in a norm or not."""
    wants_parameter_norms: bool
    """True if one of the ranks needs the norm of each parameter."""
    weights_every: frozenset[int]
    """The numbers of steps after which one of the ranks needs the norms of the weights."""
    thresholds: GroupThresholds = field(default_factory=dict)
    """The norms of all ranks in order, with the thresholds of parameter groups."""
    originals: dict[str, Original] = field(default_factory=dict)
    """By the name that all copies share."""
    parameters: dict[str, int] = field(default_factory=dict)
    """The parameters of all ranks that are in some norm, each with its index among them."""
    local_parameters: dict[str, int] = field(default_factory=dict)
    """The same indices for the parameters of this rank, by the names they have here."""

    def add(self, rank: int, message: ClipperMessage, ranks: set[int]) -> dict[str, int]:
        """Add the norms, originals and parameters of a rank.

        Args:
            rank: The rank.
            message: Its message.
            ranks: All ranks of the agreement.

        Returns:
            Its parameters, each with its index among those of all ranks.
        """
        keys, indices = [*message.thresholds], {}
        for parameter in message.parameters:
            norm_keys = [None if i == NOWHERE else keys[i] for i in parameter.norm_indices]
            # Two ranks may generate the same name for different parameters.
            generated = f"rank {rank}: {parameter.name}"
            name = parameter.name if parameter.has_given_name else generated
            if parameter.copy_of is not None:
                # Of a DTensor all shards count, unless some of them are outside of the group.
                holders = {rank, *parameter.mesh} if ranks >= {*parameter.mesh} else {rank}
                first = Original(rank, holders, name, parameter.shape, norm_keys, parameter.rows)
                original = self.originals.setdefault(parameter.copy_of, first)
                if original is not first:
                    thresholds = [message.thresholds[key] for key in norm_keys if key is not None]
                    needed = [self.thresholds[key] for key in original.keys if key is not None]
                    check_copy(original, rank, parameter, same=thresholds == needed)
                    # The norms of a copy are those of its original, whatever its own name.
                    name, norm_keys = original.name, []
            for key in norm_keys:
                if key is not None:
                    add_norm(self.thresholds, key, rank, message.thresholds[key])
            indices[parameter.name] = self.parameters.setdefault(name, len(self.parameters))
        return indices

    def settle(self) -> None:
        """Bring the norms into an order that does not depend on which rank has which parameter.

        A state can then be loaded by a run with its parameters on other ranks.
        """
        if not self.thresholds:
            self.thresholds[True, SHARED] = None  # every parameter is excluded: an empty norm
        self.thresholds = dict(sorted(self.thresholds.items(), key=lambda item: _words(*item[0])))

    def apply_to(self, labels: NormLabels, rank: int) -> None:
        """Give the labels of this rank's clipper the norms of all ranks.

        Raises:
            ArgumentError: The scope excludes a name that no parameter has on any rank.
        """
        labels.check_exclusions(self.all_names)
        indices = {key: index for index, key in enumerate(self.thresholds)}
        # One entry more: NOWHERE is -1, the last index, and stays NOWHERE.
        moved = index_tensor(
            [*(indices.get(k, NOWHERE) for k in labels.thresholds_by_key), NOWHERE]
        )
        uncounted = {name for name, original in self.originals.items() if rank in original.ranks}
        adopted: list[LabelledParameter] = []
        for labelled in labels.labelled:
            if labelled.copy_of is not None:
                original = self.originals[labelled.copy_of]
                norms = [NOWHERE if key is None else indices[key] for key in original.keys]
                norm_indices = NormIndices(index_tensor(norms), original.rows)
                counts = labelled.copy_of in uncounted
                uncounted.discard(labelled.copy_of)  # two copies on one rank count once, too
                adopted.append(replace(labelled, norm_indices=norm_indices, counts=counts))
            elif labelled.norm_indices is not None:
                local = labelled.norm_indices
                norm_indices = NormIndices(moved[local.indices], local.rows)
                adopted.append(replace(labelled, norm_indices=norm_indices))
        labels.adopt(self.thresholds, adopted)


def confirm_alike(message: ClipperMessage, groups: Iterable[RankGroup]) -> ClipperMessage:
    """Confirm that all ranks of each group have the same parameters, norms and options. Collective.

    Args:
        message: The message of this rank.
        groups: The groups that its DTensors are spread over, in the order of their collectives.

    Returns:
        The message, in which norms of gradients and weights are wanted if another rank wants them.

    Raises:
        AttachError: The ranks of one group differ.
    """
    error: AttachError | None = None
    for group in groups:
        messages = group.gathered(message)
        try:
            check_alike(messages, message)
        except AttachError as raised:
            # Not raised yet: the ranks of the groups that follow wait for this one.
            error = error or raised
            message = replace(message, error=str(error))
        wanted = any(other.wants_parameter_norms for other in messages.values())
        every = _weights_every(messages.values())
        message = replace(message, wants_parameter_norms=wanted, weights_every=every)
    if error is not None:
        raise error
    check_elsewhere({distributed.get_rank(): message})
    return message


def agreement_across(message: ClipperMessage, group: RankGroup, ranks: Ranks) -> Agreement:
    """Agree with ranks that have other parameters, or other parts of the same. Collective.

    Args:
        message: The message of this rank.
        group: All ranks of the agreement.
        ranks: The option that they were given by.

    Raises:
        AttachError: The messages do not fit together.
        ArgumentError: A name in ``replicated`` is that of no parameter.
    """
    ranks.announced = True  # whatever raises from here on raises on all ranks
    messages = group.gathered(message)
    check_errors(messages)
    check_options(messages)
    all_names = [name for other in messages.values() for name in other.names]
    ranks.replicated.check(all_names)
    if message.scope in SCOPES_BY_NAME:
        check_names(messages, message.scope)
    wanted = any(other.wants_parameter_norms for other in messages.values())
    agreement = Agreement(all_names, wanted, _weights_every(messages.values()))
    for rank, other in messages.items():
        indices = agreement.add(rank, other, {*messages})
        if rank == group.rank:
            agreement.local_parameters = indices
    if len(messages) > 1:
        check_copied(agreement.originals, messages)
    check_uncopied(messages)
    agreement.settle()
    return agreement


def _weights_every(messages: Iterable[ClipperMessage]) -> frozenset[int]:
    """Return the numbers of steps after which any rank needs the norms of the weights."""
    return frozenset[int]().union(*(message.weights_every for message in messages))


def _words(_: bool, label: str) -> list[str | int]:
    """Return a label in words and numbers, so that "block.2" comes before "block.10"."""
    return [int(word) if word.isdecimal() else word for word in re.split(r"(\d+)", label)]

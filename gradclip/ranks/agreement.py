"""What the clippers of several ranks tell each other when they are attached."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor, distributed

from ..errors import AttachError
from ..scopes.labels import NormLabels
from ..scopes.norm_indices import NOWHERE, NormIndices
from ..scopes.scope import SHARED
from .groups import NormRanks, RankGroup, norm_ranks_of
from .messages import Agreement, ClipperMessage, FailureMessage, Original, ParameterMessage
from .ranks import Ranks
from .refusals import (
    add_limit,
    check_alike,
    check_copied,
    check_copy,
    check_errors,
    check_names,
    check_options,
    check_uncopied,
    refuse_elsewhere,
)
from .shards import groups_of, is_elsewhere, mesh_ranks

P = ParamSpec("P")
SCOPES_BY_NAME = ("parameter", "unit")
"""Scopes in which names tell what shares a norm."""


def comparable_options(
    options: Mapping[str, str],
    threshold: object,
    grad_scaler: object,
    optimizers: Sequence[object],
) -> dict[str, str]:
    """Return how a clipper is set in words that are the same on all ranks where they mean the same.

    Args:
        options: Its options.
        threshold: Its threshold, of which a user's own may show less than decides.
        grad_scaler: Its GradScaler, or None.
        optimizers: Its optimizers, for each of which ranks agree on an overflow.
    """
    scaled = None if grad_scaler is None else f"that of {len(optimizers)} optimizers"
    named = {**options, "threshold": vars(threshold), "grad_scaler": scaled}
    return {name: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for name, value in named.items()}


def message_of(
    labels: NormLabels, options: Mapping[str, str], *, across: bool, wants_parameter_norms: bool
) -> ClipperMessage:
    """Return what this rank tells the others of its clipper.

    Args:
        labels: The labels of its norms.
        options: How it is set, from `comparable`.
        across: Whether it was given other ranks, so that DTensors may lie on those alone.
        wants_parameter_norms: Whether parameter norms are asked for on this rank.
    """
    elsewhere = [] if across else [p.name for p in labels.parameters if is_elsewhere(p.parameter)]
    return ClipperMessage(
        labels.kind,
        options,
        labels.thresholds_by_key,
        _parameter_messages(labels),
        labels.all_names,
        elsewhere,
        wants_parameter_norms,
    )


def _parameter_messages(labels: NormLabels) -> list[ParameterMessage]:
    messages = []
    for labelled in labels.labelled:
        parameter = labelled.parameter()
        if labelled.norm_indices is None or parameter is None:
            continue
        # FullyShardedDataParallel has flattened a parameter that had rows.
        flat = labels.kind == "unit" and getattr(parameter, "_fsdp_flattened", False)
        messages.append(
            ParameterMessage(
                labelled.name,
                labelled.has_given_name,
                tuple(parameter.shape),
                labelled.norm_indices.indices.tolist(),
                labelled.norm_indices.rows or flat,
                labelled.copy_of,
                mesh_ranks(parameter),
            )
        )
    return messages


def adopt(labels: NormLabels, agreement: Agreement, rank: int) -> None:
    """Give the labels of a clipper the norms that all ranks agree on.

    Args:
        labels: The labels of its norms.
        agreement: The agreement.
        rank: The number of this rank.

    Raises:
        ArgumentError: A name that the scope excludes is that of no parameter on any rank.
    """
    labels.check_exclusions(agreement.all_names)
    indices = {key: index for index, key in enumerate(agreement.thresholds)}
    moved = _tensor([*(indices.get(key, NOWHERE) for key in labels.thresholds_by_key), NOWHERE])
    counted = {name for name, each in agreement.originals.items() if rank in each.ranks}
    adopted = []
    for labelled in labels.labelled:
        if labelled.copy_of is not None:
            original = agreement.originals[labelled.copy_of]
            own = [NOWHERE if key is None else indices[key] for key in original.keys]
            norm_indices = NormIndices(_tensor(own), original.rows)
            counts = labelled.copy_of in counted
            counted.discard(labelled.copy_of)
            adopted.append(replace(labelled, norm_indices=norm_indices, counts=counts))
        elif labelled.norm_indices is not None:
            norm_indices = NormIndices(
                moved[labelled.norm_indices.indices], labelled.norm_indices.rows
            )
            adopted.append(replace(labelled, norm_indices=norm_indices))
    labels.adopt(agreement.thresholds, adopted)


def _tensor(indices: Sequence[int]) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device="cpu")


def confirm_alike(own: ClipperMessage, groups: Iterable[RankGroup]) -> ClipperMessage:
    """Agree with the ranks that DTensors lie on, which have the same parameters. Collective.

    Returns:
        What this rank has told, watched where it is on one of them.

    Raises:
        AttachError: They differ.
    """
    error: AttachError | None = None
    for group in groups:
        messages = group.gathered(own)
        try:
            check_alike(messages, own)
        except AttachError as found:
            # Ranks of the groups that follow wait for this one.
            error = error or found
            own = replace(own, error=str(error))
        own = replace(
            own, wants_parameter_norms=any(each.wants_parameter_norms for each in messages.values())
        )
    if error is not None:
        raise error
    refuse_elsewhere({distributed.get_rank(): own})
    return own


def agreement_across(own: ClipperMessage, group: RankGroup, ranks: Ranks) -> Agreement:
    """Agree with ranks that have other parameters, or other parts of them. Collective.

    Raises:
        AttachError: What they tell does not fit together.
        ArgumentError: A name in ``replicated`` is that of no parameter.
    """
    ranks.announced = True
    messages = group.gathered(own)
    check_errors(messages)
    check_options(messages)
    agreement = Agreement(
        wants_parameter_norms=any(each.wants_parameter_norms for each in messages.values())
    )
    agreement.all_names = [name for each in messages.values() for name in each.names]
    ranks.replicated.check(agreement.all_names)
    if own.scope in SCOPES_BY_NAME:
        check_names(messages, own.scope)
    for rank, each in messages.items():
        places = _add(agreement, rank, each, among={*messages})
        if rank == group.rank:
            agreement.places = places
    if len(messages) > 1:
        check_copied(agreement, messages)
    check_uncopied(messages)
    if not agreement.thresholds:
        agreement.thresholds[True, SHARED] = None  # everything is left out: a norm of nothing
    # In an order that does not depend on which rank has what, for a state to fit any number.
    agreement.thresholds = dict(
        sorted(agreement.thresholds.items(), key=lambda each: _in_words(each[0][1]))
    )
    return agreement


def _in_words(label: str) -> list[str | int]:
    """Return a label so that those that differ in a number are sorted by it."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", label)]


def _add(
    agreement: Agreement, rank: int, message: ClipperMessage, *, among: set[int]
) -> dict[str, int]:
    """Add what a rank has told; return the places of its parameters among those of all ranks."""
    keys, places = [*message.thresholds], {}
    for parameter in message.parameters:
        own = [None if label == NOWHERE else keys[label] for label in parameter.labels]
        name = parameter.name if parameter.given else f"rank {rank}: {parameter.name}"
        if parameter.copy_of is not None:
            ranks = {rank} | ({*parameter.mesh} if among >= {*parameter.mesh} else set())
            original = Original(rank, ranks, name, parameter.shape, own, parameter.rows)
            first = agreement.originals.setdefault(parameter.copy_of, original)
            if first is not original:
                limits = [message.thresholds[key] for key in own if key is not None]
                needed = [agreement.thresholds[key] for key in first.keys if key is not None]
                check_copy(first, rank, parameter, same=limits == needed)
                name, own = first.name, []
        for key in own:
            if key is not None:
                add_limit(agreement.thresholds, key, rank, message.thresholds[key])
        places[parameter.name] = agreement.names.setdefault(name, len(agreement.names))
    return places


def announces_failure(attach: Callable[P, None]) -> Callable[P, None]:
    """Let the ranks that wait for this one hear of an error that it has alone.

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
            if isinstance(ranks, Ranks) and not ranks.announced:
                with suppress(AttachError):  # no group, nobody waits
                    ranks.joined().gathered(FailureMessage(f"{type(error).__name__}: {error}"))
            raise

    return attach_or_announce


_UNKNOWN = NormIndices(torch.tensor([NOWHERE], device="cpu"))


class RankLayout:
    """Knows which ranks the norms of a clipper span. Collective where there are any.

    Args:
        ranks: Those that have other parameters, or None.
        labels: The labels of the norms, which become those of all ranks.
        options: How the clipper is set; ranks that differ in it are refused.
        wants_parameter_norms: Whether the norms of parameters are asked for on this rank.

    Raises:
        AttachError: There is no process group.
    """

    def __init__(
        self,
        ranks: Ranks | None,
        labels: NormLabels,
        options: Mapping[str, str],
        wants_parameter_norms: bool,
    ) -> None:
        self.norm_ranks = NormRanks()
        self.names: tuple[str, ...] | None = None
        """Those of the parameters of all ranks, where one of the ranks asks for their norms."""
        self._ranks = ranks
        self.across = None if ranks is None else ranks.joined()
        self._labels = labels
        self._options = options
        self.wants_parameter_norms = wants_parameter_norms
        """Whether the norms of parameters are asked for on one of the ranks."""
        self._places: dict[str, NormIndices] = {}
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
        norm_ranks = norm_ranks_of(groups_of(parameters), self.across)
        if self.across is None or self._count < 0:
            self._agree(norm_ranks)
        self.norm_ranks, self._count = norm_ranks, count

    def parameter_indices(self, names: Sequence[str]) -> list[NormIndices]:
        """Return where parameters are among those of all ranks; nowhere if added since."""
        if self.names is None:
            return []
        return [self._places.get(name, _UNKNOWN) for name in names]

    def _agree(self, norm_ranks: NormRanks) -> None:
        labels = self._labels
        message = message_of(
            labels,
            self._options,
            across=self.across is not None,
            wants_parameter_norms=self.wants_parameter_norms,
        )
        if not (norm_ranks or message.elsewhere):
            return
        own = confirm_alike(message, norm_ranks.groups)
        names, self.wants_parameter_norms = (
            [each.name for each in own.parameters],
            own.wants_parameter_norms,
        )
        places = {name: index for index, name in enumerate(names)}
        if self._ranks is not None and norm_ranks.across is not None:
            agreement = agreement_across(own, norm_ranks.across, self._ranks)
            adopt(labels, agreement, norm_ranks.across.rank)
            names, places, self.wants_parameter_norms = (
                [*agreement.names],
                agreement.places,
                agreement.wants_parameter_norms,
            )
        self.names = tuple(names) if self.wants_parameter_norms else None
        self._places = {
            name: NormIndices(torch.tensor([i], device="cpu")) for name, i in places.items()
        }

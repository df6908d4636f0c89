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

from .disagreement import (
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
from .errors import AttachError
from .ranks import Group, Ranks
from .scopes.labels import NormLabels
from .scopes.norm_indices import NOWHERE, Place
from .scopes.scope import SHARED
from .shards import is_elsewhere, mesh_ranks
from .told import Agreed, Failed, Original, Told, ToldParameter

P = ParamSpec("P")
BY_NAME = ("parameter", "unit")
"""Scopes in which names tell what shares a norm."""


def comparable(
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
    labels: NormLabels, options: Mapping[str, str], *, across: bool, watched: bool
) -> Told:
    """Return what this rank tells the others of its clipper.

    Args:
        labels: The labels of its norms.
        options: How it is set, from `comparable`.
        across: Whether it was given other ranks, so that DTensors may lie on those alone.
        watched: Whether parameter norms are asked for on this rank.
    """
    elsewhere = [] if across else [p.name for p in labels.parameters if is_elsewhere(p.parameter)]
    return Told(
        labels.kind,
        options,
        labels.by_key,
        _told_parameters(labels),
        labels.all_names,
        elsewhere,
        watched,
    )


def _told_parameters(labels: NormLabels) -> list[ToldParameter]:
    told = []
    for labelled in labels.labelled:
        parameter = labelled.parameter()
        if labelled.place is None or parameter is None:
            continue
        # FullyShardedDataParallel has flattened a parameter that had rows.
        flat = labels.kind == "unit" and getattr(parameter, "_fsdp_flattened", False)
        told.append(
            ToldParameter(
                labelled.name,
                labelled.given,
                tuple(parameter.shape),
                labelled.place.labels.tolist(),
                labelled.place.rows or flat,
                labelled.copy_of,
                mesh_ranks(parameter),
            )
        )
    return told


def adopt(labels: NormLabels, agreed: Agreed, rank: int) -> None:
    """Give the labels of a clipper the norms that all ranks agree on.

    Args:
        labels: The labels of its norms.
        agreed: The agreement.
        rank: The number of this rank.

    Raises:
        ArgumentError: A name that the scope excludes is that of no parameter on any rank.
    """
    labels.check_exclusions(agreed.everyone)
    indices = {key: index for index, key in enumerate(agreed.limits)}
    moved = _tensor([*(indices.get(key, NOWHERE) for key in labels.by_key), NOWHERE])
    counted = {name for name, each in agreed.originals.items() if rank in each.ranks}
    adopted = []
    for labelled in labels.labelled:
        if labelled.copy_of is not None:
            original = agreed.originals[labelled.copy_of]
            own = [NOWHERE if key is None else indices[key] for key in original.keys]
            place, counts = Place(_tensor(own), original.rows), labelled.copy_of in counted
            counted.discard(labelled.copy_of)
            adopted.append(replace(labelled, place=place, counts=counts))
        elif labelled.place is not None:
            place = Place(moved[labelled.place.labels], labelled.place.rows)
            adopted.append(replace(labelled, place=place))
    labels.adopt(agreed.limits, adopted)


def _tensor(indices: Sequence[int]) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device="cpu")


def agreed_alike(own: Told, groups: Iterable[Group]) -> Told:
    """Agree with the ranks that DTensors lie on, which have the same parameters. Collective.

    Returns:
        What this rank has told, watched where it is on one of them.

    Raises:
        AttachError: They differ.
    """
    error: AttachError | None = None
    for group in groups:
        told = group.gathered(own)
        try:
            check_alike(told, own)
        except AttachError as found:
            # Ranks of the groups that follow wait for this one.
            error = error or found
            own = replace(own, error=str(error))
        own = replace(own, watched=any(each.watched for each in told.values()))
    if error is not None:
        raise error
    refuse_elsewhere({distributed.get_rank(): own})
    return own


def agreed_across(own: Told, group: Group, ranks: Ranks) -> Agreed:
    """Agree with ranks that have other parameters, or other parts of them. Collective.

    Raises:
        AttachError: What they tell does not fit together.
        ArgumentError: A name in ``replicated`` is that of no parameter.
    """
    ranks.told = True
    told = group.gathered(own)
    check_errors(told)
    check_options(told)
    agreed = Agreed(watched=any(each.watched for each in told.values()))
    agreed.everyone = [name for each in told.values() for name in each.names]
    ranks.replicated.check(agreed.everyone)
    if own.scope in BY_NAME:
        check_names(told, own.scope)
    for rank, each in told.items():
        places = _add(agreed, rank, each, among={*told})
        if rank == group.own:
            agreed.places = places
    if len(told) > 1:
        check_copied(agreed, told)
    check_uncopied(told)
    if not agreed.limits:
        agreed.limits[True, SHARED] = None  # everything is left out: a norm of nothing
    # In an order that does not depend on which rank has what, for a state to fit any number.
    agreed.limits = dict(sorted(agreed.limits.items(), key=lambda each: _in_words(each[0][1])))
    return agreed


def _in_words(label: str) -> list[str | int]:
    """Return a label so that those that differ in a number are sorted by it."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", label)]


def _add(agreed: Agreed, rank: int, told: Told, *, among: set[int]) -> dict[str, int]:
    """Add what a rank has told; return the places of its parameters among those of all ranks."""
    keys, places = [*told.limits], {}
    for parameter in told.parameters:
        own = [None if label == NOWHERE else keys[label] for label in parameter.labels]
        name = parameter.name if parameter.given else f"rank {rank}: {parameter.name}"
        if parameter.copy_of is not None:
            ranks = {rank} | ({*parameter.mesh} if among >= {*parameter.mesh} else set())
            original = Original(rank, ranks, name, parameter.shape, own, parameter.rows)
            first = agreed.originals.setdefault(parameter.copy_of, original)
            if first is not original:
                limits = [told.limits[key] for key in own if key is not None]
                needed = [agreed.limits[key] for key in first.keys if key is not None]
                check_copy(first, rank, parameter, same=limits == needed)
                name, own = first.name, []
        for key in own:
            if key is not None:
                add_limit(agreed.limits, key, rank, told.limits[key])
        places[parameter.name] = agreed.names.setdefault(name, len(agreed.names))
    return places


def telling_ranks(attach: Callable[P, None]) -> Callable[P, None]:
    """Let the ranks that wait for this one hear of an error that it has alone.

    Args:
        attach: A constructor that takes ``ranks`` by keyword, and agrees with them.
    """

    @wraps(attach)
    def attach_or_tell(*args: P.args, **kwargs: P.kwargs) -> None:
        ranks = kwargs.get("ranks")
        if isinstance(ranks, Ranks):
            ranks.told = False
        try:
            attach(*args, **kwargs)
        except Exception as error:
            if isinstance(ranks, Ranks) and not ranks.told:
                with suppress(AttachError):  # no group, nobody waits
                    ranks.joined().gathered(Failed(f"{type(error).__name__}: {error}"))
            raise

    return attach_or_tell

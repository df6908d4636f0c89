"""Checks that the clippers of all ranks are compatible.

All ranks hold the same messages and make the same checks in the same order, so that all of them
raise, and none waits in a collective for one that has raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import AttachError
from ..scopes.labels import GroupThresholds, NormKey
from .messages import ClipperMessage, FailureMessage, Original, ParameterMessage

SHOWN = 5
"""Names that an error shows."""


def check_errors(messages: Mapping[int, ClipperMessage | FailureMessage]) -> None:
    """Refuse to attach without a rank whose clipper could not attach."""
    for rank, message in messages.items():
        if message.error is not None:
            raise AttachError(f"The clipper of rank {rank} could not be attached: {message.error}")


def check_options(messages: Mapping[int, ClipperMessage]) -> None:
    """Refuse clippers with different options."""
    first, *others = messages
    for rank in others:
        for name, value in messages[first].options.items():
            other = messages[rank].options.get(name)
            if other != value:
                raise AttachError(
                    f"The clippers of several ranks differ: {name} is {value} on rank {first} and "
                    f"{other} on rank {rank}. Give all ranks the same options."
                )


def check_alike(messages: Mapping[int, ClipperMessage], own: ClipperMessage) -> None:
    """Refuse clippers on the ranks of a DTensor that have different parameters or norms."""
    check_errors(messages)
    check_options(messages)
    check_elsewhere(messages)
    for rank, message in messages.items():
        found, needed = _names_in_norms(message), _names_in_norms(own)
        # As lists: the order of the norms is that of the vectors which the collective adds up.
        same_norms = [*message.thresholds.items()] == [*own.thresholds.items()]
        if found != needed or not same_norms:
            raise AttachError(
                f"Rank {rank} clips {_shown(found)} in {len(message.thresholds)} norms and this "
                f"rank clips {_shown(needed)} in {len(own.thresholds)}, although DTensors lie on "
                "both. Parameters that only some ranks have need ranks=gradclip.Ranks(group), "
                "with a group of all ranks that hold a part of the model."
            )


def check_elsewhere(messages: Mapping[int, ClipperMessage]) -> None:
    """Refuse DTensors without a shard on some rank, which would clip by another norm."""
    for rank, message in messages.items():
        if message.elsewhere:
            raise AttachError(
                f"{_shown(message.elsewhere)} of rank {rank} are DTensors whose mesh does not "
                "include that rank, so that it cannot know their norm: give "
                "ranks=gradclip.Ranks(group), with a group of all ranks that hold a part of the "
                "model."
            )


def check_names(messages: Mapping[int, ClipperMessage], scope: str) -> None:
    """Refuse names by which parameters cannot be matched across ranks."""
    first_shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
    for rank, message in messages.items():
        for parameter in message.parameters:
            name, shape = parameter.name, parameter.shape
            if not parameter.has_given_name:
                raise AttachError(
                    f"{name} of rank {rank} has a generated name, and scope={scope!r} matches "
                    "parameters across ranks by their names: give model=, or named parameters to "
                    "the optimizer."
                )
            first, first_shape = first_shapes.setdefault(name, (rank, shape))
            if first == rank or parameter.copy_of is not None or parameter.mesh:
                continue
            differing = sum(one != two for one, two in zip(shape, first_shape, strict=False))
            # Shards differ in the dimension that was split, and in no other.
            if len(shape) != len(first_shape) or differing > 1:
                raise AttachError(
                    f"{name} has the shape {shape} on rank {rank} and {first_shape} on rank "
                    f"{first}, which cannot be shards of one parameter: give each parameter a "
                    "name that no other parameter has on any rank, as those of the whole model "
                    "are."
                )
            if parameter.rows:
                raise AttachError(
                    f"{name} is on ranks {first} and {rank}, and only of DTensors is it known "
                    f"which indices of dimension 0 a rank holds, as scope={scope!r} needs: use "
                    "scope='parameter', or give scope= a function that returns the labels."
                )


def check_copy(original: Original, rank: int, copy: ParameterMessage, *, same: bool) -> None:
    """Refuse a copy that differs from the original, in its threshold or its shape.

    Args:
        original: The original.
        rank: The rank of the copy.
        copy: The copy.
        same: Whether the thresholds of their parameter groups are the same.
    """
    if not same:
        raise AttachError(
            f"{copy.name} on rank {rank} is a copy of {original.name} on rank {original.rank}, and "
            "their parameter groups have different max_norm: give both the same."
        )
    if original.shape != copy.shape:
        raise AttachError(
            f"{copy.name} has the shape {copy.shape} on rank {rank}, and {original.name}, of which "
            f"it is a copy, has {original.shape} on rank {original.rank}: give replicated= only "
            "parameters that are the same on all their ranks."
        )


def check_copied(originals: Mapping[str, Original], messages: Mapping[int, ClipperMessage]) -> None:
    """Refuse an original without a copy."""
    names = [p.copy_of for message in messages.values() for p in message.parameters]
    for name, count in Counter(names).items():
        if name is not None and count == 1:
            original = originals[name]
            raise AttachError(
                f"{original.name} is replicated, and only rank {original.rank} has a parameter "
                f"called {name}: copies need the same name on all their ranks, or a function for "
                "replicated= that returns the same string for all of them."
            )


def check_uncopied(messages: Mapping[int, ClipperMessage]) -> None:
    """Refuse a parameter that some ranks call replicated and others do not."""
    copies = {p.name: rank for rank, m in messages.items() for p in m.parameters if p.copy_of}
    for rank, message in messages.items():
        for parameter in message.parameters:
            # A generated name may be that of another parameter, and says nothing of copies.
            is_plain = parameter.copy_of is None and parameter.has_given_name
            if is_plain and parameter.name in copies:
                raise AttachError(
                    f"{parameter.name} is replicated on rank {copies[parameter.name]} and not on "
                    f"rank {rank}: give all ranks the same replicated=."
                )


def add_norm(thresholds: GroupThresholds, key: NormKey, rank: int, threshold: float | None) -> None:
    """Add a norm, or refuse it if its parameter group has another threshold on another rank."""
    if thresholds.setdefault(key, threshold) != threshold:
        raise AttachError(
            f"The group {key[1]!r} has max_norm {threshold} on rank {rank} and {thresholds[key]} "
            "on an earlier rank: give it the same on all ranks."
        )


def _names_in_norms(message: ClipperMessage) -> list[str]:
    return [parameter.name for parameter in message.parameters]


def _shown(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return f"[{', '.join(names[:SHOWN])}{f' and {more} more' if more > 0 else ''}]"

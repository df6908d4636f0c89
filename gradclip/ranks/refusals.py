"""What clippers of several ranks tell each other that does not fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import AttachError
from ..scopes.labels import GroupThresholds, NormKey
from .messages import Agreement, ClipperMessage, FailureMessage, Original, ParameterMessage

SHOWN = 5
"""Names that an error shows."""


def check_alike(messages: Mapping[int, ClipperMessage], own: ClipperMessage) -> None:
    """Refuse clippers of DTensors that have different parameters."""
    check_errors(messages)
    check_options(messages)
    refuse_elsewhere(messages)
    for rank, each in messages.items():
        found, needed = _in_norms(each), _in_norms(own)
        if found != needed or [*each.thresholds.items()] != [*own.thresholds.items()]:
            raise AttachError(
                f"Rank {rank} clips {_shown(found)} in {len(each.thresholds)} norms where this one "
                f"clips {_shown(needed)} in {len(own.thresholds)}, and DTensors lie on both: what "
                "only some ranks have needs ranks=gradclip.Ranks(group), with all that have a part "
                "of the model."
            )


def check_errors(messages: Mapping[int, ClipperMessage | FailureMessage]) -> None:
    """Refuse to go on without a rank that could not attach a clipper."""
    for rank, each in messages.items():
        if each.error is not None:
            raise AttachError(f"The clipper of rank {rank} could not be attached: {each.error}")


def check_options(messages: Mapping[int, ClipperMessage]) -> None:
    """Refuse clippers that are set in different ways."""
    first, *others = messages
    for rank in others:
        for name, value in messages[first].options.items():
            other = messages[rank].options.get(name)
            if other != value:
                raise AttachError(
                    f"The clippers of several ranks differ: {name} is {value} on rank {first} and "
                    f"{other} on rank {rank}. Give all of them the same."
                )


def refuse_elsewhere(messages: Mapping[int, ClipperMessage]) -> None:
    """Refuse DTensors that some ranks have no part in, and would have another norm without."""
    for rank, each in messages.items():
        if each.elsewhere:
            raise AttachError(
                f"{_shown(each.elsewhere)} of rank {rank} are DTensors whose mesh leaves it out, "
                "so that it does not know their norm: give ranks=gradclip.Ranks(group), with all "
                "that have a part of the model."
            )


def check_names(messages: Mapping[int, ClipperMessage], scope: str) -> None:
    """Refuse names that do not tell which parameters are parts of one."""
    seen: dict[str, tuple[int, tuple[int, ...]]] = {}
    for rank, each in messages.items():
        for parameter in each.parameters:
            name, shape = parameter.name, parameter.shape
            if not parameter.given:
                raise AttachError(
                    f"{name} of rank {rank} has no name of its own, by which to tell whether "
                    f"parameters of several ranks are parts of one, as scope={scope!r} asks: "
                    "give model=, or the optimizer named parameters."
                )
            first, other = seen.setdefault(name, (rank, shape))
            if first == rank or parameter.copy_of is not None or parameter.mesh:
                continue
            unequal = sum(one != two for one, two in zip(shape, other, strict=False))
            if len(shape) != len(other) or unequal > 1:
                raise AttachError(
                    f"{name} has the shape {shape} on rank {rank} and {other} on rank {first}, "
                    "which cannot be parts of one parameter: give parameters names that no other "
                    "rank has for another one, as those of the whole model are."
                )
            if parameter.rows:
                raise AttachError(
                    f"{name} is on the ranks {first} and {rank}, and of parts that are no DTensors "
                    f"it is not known which indices of dimension 0 they are, as scope={scope!r} "
                    "asks: give a function that returns their labels as scope, or scope="
                    "'parameter'."
                )


def check_copied(agreement: Agreement, messages: Mapping[int, ClipperMessage]) -> None:
    """Refuse a copy of nothing."""
    everything = [each.copy_of for rank in messages.values() for each in rank.parameters]
    for name, count in Counter(everything).items():
        if name is not None and count == 1:
            original = agreement.originals[name]
            raise AttachError(
                f"{original.name} is replicated, and only rank {original.rank} has a parameter "
                f"that is called {name}: copies need the same name on all their ranks, or a "
                "function for replicated= that returns the same string for all of them."
            )


def check_uncopied(messages: Mapping[int, ClipperMessage]) -> None:
    """Refuse what is a copy for some ranks alone."""
    copies = {p.name: rank for rank, each in messages.items() for p in each.parameters if p.copy_of}
    for rank, each in messages.items():
        for parameter in each.parameters:
            if parameter.copy_of is None and parameter.given and parameter.name in copies:
                raise AttachError(
                    f"{parameter.name} is replicated on rank {copies[parameter.name]} and not on "
                    f"rank {rank}: give all ranks the same replicated=."
                )


def check_copy(first: Original, rank: int, copy: ParameterMessage, *, same: bool) -> None:
    """Refuse copies that cannot be of one parameter, or have different thresholds."""
    if not same:
        raise AttachError(
            f"{copy.name} is in a group with another max_norm on rank {rank} than {first.name}, of "
            f"which it is a copy, on rank {first.rank}: give their groups the same."
        )
    if first.shape != copy.shape:
        raise AttachError(
            f"{copy.name} has the shape {copy.shape} on rank {rank}, and {first.name}, of which it "
            f"is to be a copy, has {first.shape} on rank {first.rank}: give replicated= only what "
            "is the same on its ranks."
        )


def add_limit(limits: GroupThresholds, key: NormKey, rank: int, limit: float | None) -> None:
    """Add a norm and the threshold of its group, if that is the same for all that have it."""
    if limits.setdefault(key, limit) != limit:
        raise AttachError(
            f"The group {key[1]!r} has max_norm {limit} on rank {rank} and {limits[key]} on an "
            "earlier one: give it the same on all ranks."
        )


def _in_norms(message: ClipperMessage) -> list[str]:
    return [parameter.name for parameter in message.parameters]


def _shown(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return f"[{', '.join(names[:SHOWN])}{f' and {more} more' if more > 0 else ''}]"

"""The messages that ranks exchange when their clippers attach.

A message is pickled and compared with those of other processes. So it holds plain data, no tensor,
and no text that differs from process to process, such as the address in the repr of an object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..scopes.labels import GroupThresholds, LabelledParameter, NormKey, NormLabels
from .shards import is_elsewhere, mesh_ranks


@dataclass(frozen=True, slots=True)
class ParameterMessage:
    """A parameter whose gradient is in some norm, as its rank describes it."""

    name: str
    has_given_name: bool
    """True if the model or the optimizer gave the name, False if it was generated."""
    shape: tuple[int, ...]
    """The shape on its rank; of a DTensor, the whole one."""
    norm_indices: list[int]
    """Norm indices among the thresholds of its rank's message: one, or with ``rows`` one for each
    index of dimension 0, `NOWHERE` for a row in no norm."""
    rows: bool
    copy_of: str | None
    """The name that its copies on all ranks share; None for a parameter without copies."""
    mesh: tuple[int, ...]
    """The ranks of a DTensor, which knows its shard; empty for other tensors."""


@dataclass(frozen=True, slots=True)
class ClipperMessage:
    """The clipper of one rank."""

    scope: str
    """The scope's kind; "" for a function."""
    options: Mapping[str, str]
    """The options from `comparable_options`."""
    thresholds: GroupThresholds
    """The norms of the rank in order, with the thresholds of parameter groups."""
    parameters: list[ParameterMessage]
    names: list[str]
    """Names of all parameters, in a norm or not."""
    elsewhere: list[str]
    """Names of DTensors that have no shard on the rank and that no ``ranks=`` accounts for."""
    wants_parameter_norms: bool
    """True if a sink or an error of the rank may need the norm of each parameter."""
    weights_every: frozenset[int]
    """The numbers of steps after which sinks of the rank ask for the norms of the weights."""
    error: str | None = None
    """The reason why the clipper cannot attach, once there is one."""


@dataclass(frozen=True, slots=True)
class FailureMessage:
    """A rank whose clipper raised before it had anything to agree on."""

    error: str


def comparable_options(
    options: Mapping[str, str],
    threshold: object,
    grad_scaler: object,
    optimizers: Sequence[object],
) -> dict[str, str]:
    """Return the options of a clipper as text that is equal on two ranks if they mean the same.

    Args:
        options: The options, as text.
        threshold: The threshold. The repr of a user's own rule may hide a number that it decides
            by, so that all of its attributes are compared.
        grad_scaler: The GradScaler, or None. Two processes never share one: that there is one
            is compared.
        optimizers: The optimizers. Ranks agree on the overflow of each, so that their number
            has to be the same.
    """
    scaler = None if grad_scaler is None else f"that of {len(optimizers)} optimizers"
    texts = {**options, "threshold": vars(threshold), "grad_scaler": scaler}
    # The default repr of a function or an object shows its address.
    return {name: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for name, value in texts.items()}


def message_of(
    labels: NormLabels,
    options: Mapping[str, str],
    *,
    across: bool,
    wants_parameter_norms: bool,
    weights_every: frozenset[int],
) -> ClipperMessage:
    """Return the message of this rank about its clipper.

    Args:
        labels: The labels of its norms.
        options: Its options, from `comparable_options`.
        across: Whether it has ``ranks=``: DTensors may then lie on other ranks alone.
        wants_parameter_norms: Whether the norms of parameters are needed on this rank.
        weights_every: The numbers of steps after which the norms of weights are needed on it.
    """
    elsewhere = [] if across else [p.name for p in labels.parameters if is_elsewhere(p.parameter)]
    messages = (_parameter_message(entry, labels.kind) for entry in labels.labelled)
    return ClipperMessage(
        labels.kind,
        options,
        labels.thresholds_by_key,
        [message for message in messages if message is not None],
        labels.all_names,
        elsewhere,
        wants_parameter_norms,
        weights_every,
    )


def _parameter_message(labelled: LabelledParameter, scope: str) -> ParameterMessage | None:
    """Return the message about a parameter; None if it is in no norm."""
    parameter, norm_indices = labelled.parameter, labelled.norm_indices
    if norm_indices is None:
        return None
    # FullyShardedDataParallel makes views of one dimension into its flat parameter: what had rows
    # has none any more, and must not pass for a vector that scope "unit" gives one norm.
    flattened = scope == "unit" and getattr(parameter, "_fsdp_flattened", False)
    return ParameterMessage(
        labelled.name,
        labelled.has_given_name,
        tuple(parameter.shape),
        norm_indices.indices.tolist(),
        norm_indices.rows or flattened,
        labelled.copy_of,
        mesh_ranks(parameter),
    )


@dataclass(frozen=True, slots=True)
class Original:
    """The first of the copies of a parameter, in the order of the ranks: the one that counts."""

    rank: int
    ranks: set[int]
    """The ranks on which it counts: of a DTensor each holds another shard."""
    name: str
    shape: tuple[int, ...]
    keys: list[NormKey | None]
    """Its norm, or with ``rows`` one for each index of dimension 0, None for a row in no norm."""
    rows: bool

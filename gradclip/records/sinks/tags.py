"""The tags of a step's numbers: the names of the curves in TensorBoard and other loggers."""

from __future__ import annotations

from ..logged_step import LoggedStep

TOTAL, OF_PARAMETER = "grad_norm", "parameter_norm"
"""Prefixes of the tags of a clipper and of its parameters."""


def scalars(prefix: str, step: LoggedStep) -> list[tuple[str, float]]:
    """Return the tags and numbers of a step; a number that is None has none.

    Args:
        prefix: Prefix of the clipper's tags.
        step: The step.
    """
    values: list[tuple[str, float | None]] = [
        (f"{prefix}/pre", step.norm),
        (f"{prefix}/post", step.clipped_norm),
        (f"{prefix}/threshold", step.threshold),
        (f"{prefix}/clip_rate", step.clip_rate),
        (f"{prefix}/nonfinite_steps", step.nonfinite_steps),
        (f"{prefix}/skipped_steps", step.skipped_steps),
        (f"{prefix}/loss", step.loss),
        (f"{prefix}/micro_batch_clip_rate", step.micro_batch_clip_rate),
        (f"{prefix}/nonfinite_micro_batches", step.nonfinite_micro_batches),
    ]
    numbers = [(name, number) for name, number in values if number is not None]
    if step.parameter_norms:
        of_parameter = parameter_prefix(prefix)
        numbers += [(f"{of_parameter}/{name}", norm) for name, norm in step.parameter_norms.items()]
    return numbers


def parameter_prefix(prefix: str) -> str:
    """Return the prefix of the tags of parameter norms that goes with a prefix of a clipper.

    >>> parameter_prefix("grad_norm_2"), parameter_prefix("generator")
    ('parameter_norm_2', 'generator/parameter_norm')
    """
    if prefix.startswith(TOTAL):
        return prefix.replace(TOTAL, OF_PARAMETER, 1)
    return f"{prefix}/{OF_PARAMETER}"

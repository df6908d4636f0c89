"""The names under which the numbers of a step are curves."""

from __future__ import annotations

from ..logged_step import LoggedStep

TOTAL, OF_PARAMETER = "grad_norm", "parameter_norm"
"""What the tags of a clipper begin with, and those of its parameters."""


def scalars(prefix: str, step: LoggedStep) -> list[tuple[str, float]]:
    """Return the numbers of a step by name.

    Args:
        prefix: What the names begin with.
        step: The step.
    """
    named: list[tuple[str, float | None]] = [
        (f"{prefix}/pre", step.norm),
        (f"{prefix}/post", step.clipped_norm),
        (f"{prefix}/threshold", step.threshold),
        (f"{prefix}/clip_rate", step.clip_rate),
        (f"{prefix}/nonfinite_steps", step.nonfinite_steps),
        (f"{prefix}/skipped_steps", step.skipped_steps),
    ]
    numbers = [(name, number) for name, number in named if number is not None]
    if step.parameter_norms:
        of_parameter = parameter_prefix(prefix)
        numbers += [(f"{of_parameter}/{name}", norm) for name, norm in step.parameter_norms.items()]
    return numbers


def parameter_prefix(prefix: str) -> str:
    """Return what the names of the parameters' norms begin with: ``parameter_norm``, or as it is.

    >>> parameter_prefix("grad_norm_2"), parameter_prefix("generator")
    ('parameter_norm_2', 'generator/parameter_norm')
    """
    if prefix.startswith(TOTAL):
        return prefix.replace(TOTAL, OF_PARAMETER, 1)
    return f"{prefix}/{OF_PARAMETER}"

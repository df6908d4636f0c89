"""The tags of a step's numbers: the names of the curves in TensorBoard and other loggers."""

from __future__ import annotations

from ..logged_step import LoggedStep

TOTAL = "grad_norm"
"""Prefix of the tags of a clipper."""
QUANTITIES = {
    "pre": "norm",
    "post": "clipped_norm",
    "threshold": "threshold",
    "clip_rate": "clip_rate",
    "nonfinite_steps": "nonfinite_steps",
    "skipped_steps": "skipped_steps",
    "loss": "loss",
    "micro_batch_clip_rate": "micro_batch_clip_rate",
    "nonfinite_micro_batches": "nonfinite_micro_batches",
}
"""The tags of a clipper after their prefix, each with the field of a step that holds the number."""
INDEX = "step"
"""The tag of the index of a step, for loggers that need it as a number."""
PARAMETER_TAGS = {
    "parameter_norms": "parameter_norm",
    "weight_norms": "weight_norm",
    "update_ratios": "update_ratio",
}
"""Prefixes of the tags of its parameters, by the field of a step that holds the numbers."""


def scalars(prefix: str, step: LoggedStep) -> list[tuple[str, float]]:
    """Return the tags and numbers of a step; a number that is None has none.

    Args:
        prefix: Prefix of the clipper's tags.
        step: The step.
    """
    values = ((f"{prefix}/{tag}", getattr(step, field)) for tag, field in QUANTITIES.items())
    numbers: list[tuple[str, float]] = [pair for pair in values if pair[1] is not None]
    for field, tag in PARAMETER_TAGS.items():
        if by_name := getattr(step, field):
            start = parameter_prefix(prefix, tag)
            numbers += [(f"{start}/{name}", number) for name, number in by_name.items()]
    return numbers


def parameter_prefix(prefix: str, tag: str) -> str:
    """Return the prefix of the tags of parameters that goes with a prefix of a clipper.

    >>> parameter_prefix("grad_norm_2", "weight_norm"), parameter_prefix("generator", "weight_norm")
    ('weight_norm_2', 'generator/weight_norm')
    """
    if prefix.startswith(TOTAL):
        return prefix.replace(TOTAL, tag, 1)
    return f"{prefix}/{tag}"

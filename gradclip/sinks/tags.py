"""The names under which the numbers of a step are curves."""

from __future__ import annotations

from ..records import LoggedStep


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
    return [(name, number) for name, number in named if number is not None]

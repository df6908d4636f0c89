"""When a step is skipped, and when that is an error."""

from __future__ import annotations

import math

from torch import Tensor

from .coefficients import must_skip
from .engines.base import host_may_read
from .errors import AttachError, NonFiniteGradientError, SkipLimitError
from .records import ClipRecord
from .settings import Settings
from .step_gradients import StepGradients
from .thresholds import Threshold


def verdict(
    settings: Settings, gradients: StepGradients, norms: Tensor, thresholds: Tensor
) -> bool | Tensor:
    """Tell whether the step is to be skipped.

    No host sync, unless the policy is to raise.

    Args:
        settings: The policies.
        gradients: The gradients; not written.
        norms: Shape (k,), as measured.
        thresholds: Shape (k,).

    Returns:
        A bool, or where only the device knows, a tensor: 0-d, bool.
    """
    if not (settings.skips or settings.raises):
        return False
    exceeding = settings.exceed == "skip"
    skip = must_skip(
        gradients.norms_if_bounded(norms) if exceeding else norms,
        thresholds,
        nonfinite=settings.nonfinite in ("skip", "raise"),
        exceeding=exceeding,
    )
    if gradients.overflow is not None:
        skip = skip & ~gradients.overflow
    return bool(skip) if settings.raises or host_may_read(skip) else skip


def check_capture(settings: Settings, threshold: Threshold) -> None:
    """Refuse to be captured in a CUDA graph, in which no Python runs, where that would go wrong.

    Raises:
        AttachError: A policy or a threshold needs the host at every step.
    """
    if settings.raises:
        raise AttachError(
            "nonfinite='raise' has to look at every norm, and a captured CUDA graph runs without "
            "the host: choose another policy, or call optimizer.step() outside the graph."
        )
    if not threshold.capturable:
        raise AttachError(
            f"{threshold!r} is asked anew at every step, and a captured CUDA graph runs without "
            "Python: give a threshold whose class says 'capturable = True', since it does the same "
            "at every step and writes its state in place; or call optimizer.step() outside."
        )


def nonfinite_error(record: ClipRecord, before: object) -> NonFiniteGradientError:
    """Return the error for a norm that is not finite, which names the parameters. Host sync.

    Args:
        record: The step.
        before: The norms just before, as they are shown.
    """
    norms = [norm for norm in record.norms.tolist() if not math.isfinite(norm)]
    found = f"{norms[0]}" if record.norms.numel() == 1 else f"not finite for {len(norms)} labels"
    culprits = record.parts and record.parts.nonfinite
    return NonFiniteGradientError(
        f"The norm of the gradients is {found} at step {record.step}, from these parameters: "
        f"{culprits}. The norms before: {before}. The step was not taken and the gradients are as "
        "they were. Lower the learning rate or look at that step's batch; nonfinite='zero' or "
        "'skip' would go on."
    )


def skip_limit_error(limit: int, step: int) -> SkipLimitError:
    """Return the error for too many skipped steps in a row.

    Args:
        limit: So many are too many.
        step: Index of the newest step.
    """
    return SkipLimitError(
        f"{limit} steps in a row were skipped, up to step {step}: parameters and gradients are as "
        "they were. Look at the norms (clipper.last, or the logs): raise the threshold or lower "
        "the learning rate, or give a larger skip_limit."
    )

"""Steps that are worth a sentence: a norm that is not finite, or far above those before it."""

from __future__ import annotations

import math

from ..errors import NonFiniteGradientError, SkipLimitError
from ..scopes.naming import joined
from .norm_history import DEVIATIONS, SHOWN, NormHistory
from .parameter_norms import ParameterNorms
from .record import ClipRecord

CARRIED = 0.9
"""Share of the power sum that the parameters shown have together, if they are not too many."""


def incident_of(
    step: int, norm: float, parameters: ParameterNorms | None, before: NormHistory
) -> str | None:
    """Return what there is to say of a step; None where it is like those before.

    Args:
        step: Its index.
        norm: Its total norm.
        parameters: The norms of its parameters, where they are known.
        before: The norms before it.
    """
    if not math.isfinite(norm):
        what = f"The norm was {norm} at step {step}"
        if parameters is not None:
            what += f", from {parameters.nonfinite or _nonfinite(parameters)}"
    elif before.is_spike(norm):
        line = before.median + DEVIATIONS * before.deviation()
        what = (
            f"The norm was {norm:.7g} at step {step}, above {line:.7g}, which is the median of the "
            f"last {len(before)} norms above 0, {before.median:.7g}, and {DEVIATIONS:g} median "
            "deviations"
        )
        if parameters:
            most = parameters.most(CARRIED, SHOWN).items()
            what += f"; most of it in {', '.join(f'{name} ({each:.4g})' for name, each in most)}"
    else:
        return None
    return f"{what}. The norms before: {before}."


def _nonfinite(parameters: ParameterNorms) -> str:
    """Name the parameters where only the device could have counted elements."""
    return joined([name for name, norm in parameters.items() if not math.isfinite(norm)])


def nonfinite_error(record: ClipRecord, before: object) -> NonFiniteGradientError:
    """Return the error for a norm that is not finite, which names the parameters. Host sync.

    Args:
        record: The step.
        before: The norms just before, as they are shown.
    """
    norms = [norm for norm in record.norms.tolist() if not math.isfinite(norm)]
    found = f"{norms[0]}" if record.norms.numel() == 1 else f"not finite for {len(norms)} labels"
    culprits = record.parameter_sums and record.parameter_sums.nonfinite
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

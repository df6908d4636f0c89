"""Sentences about steps whose norm or loss is not finite, or far above those before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ..errors import NonFiniteGradientError, SkipLimitError
from ..scopes.naming import listed_nonfinite
from . import loss_history
from .loss_history import LossHistory
from .norm_history import DEVIATIONS, SHOWN, NormHistory
from .parameter_norms import ParameterNorms, ParameterSums
from .record import ClipRecord, loss_on_host

VANISHING = 1e-5
"""Norm below which a normalised gradient is distorted: Muon divides by the norm plus 1e-7, and
computes in bfloat16."""
CARRIED = 0.9
"""Share of the power sum that the named parameters have together, if ``SHOWN`` of them do."""


def incident_of(
    step: int,
    norm: float,
    parameter_norms: Callable[[], ParameterNorms | None],
    before: NormHistory,
) -> str | None:
    """Return a sentence about a step that stands out; None for a usual step.

    Args:
        step: Index of the step.
        norm: Total norm of the step.
        parameter_norms: Returns the norms of the parameters, None if they are unknown.
        before: The norms before the step.
    """
    if not math.isfinite(norm):
        incident = f"The norm was {norm} at step {step}"
        if (parameters := parameter_norms()) is not None:
            incident += f", from {parameters.nonfinite or _nonfinite_names(parameters)}"
    elif before.is_spike(norm):
        line = before.median + DEVIATIONS * before.deviation()
        incident = (
            f"The norm was {norm:.7g} at step {step}, above {line:.7g}: the median of the last "
            f"{len(before)} norms above 0, {before.median:.7g}, plus {DEVIATIONS:g} median "
            "deviations"
        )
        if parameters := parameter_norms():
            largest = parameters.carrying(CARRIED, SHOWN).items()
            names = ", ".join(f"{name} ({value:.4g})" for name, value in largest)
            incident += f"; most of it in {names}"
    else:
        return None
    return f"{incident}. The norms before: {before}."


def loss_incident_of(step: int, loss: float, before: LossHistory) -> str | None:
    """Return a sentence about the loss of a step, if it stands out; None for a usual one.

    Args:
        step: Index of the step.
        loss: The loss.
        before: The losses before the step.
    """
    newest = "not known" if before.newest is None else f"{before.newest:.4g}"
    if not math.isfinite(loss):
        return f"The loss was {loss} at step {step}. The last finite loss before: {newest}."
    if not before.is_spike(loss):
        return None
    return (
        f"The loss went from {newest} to {loss:.4g} at step {step}, above {before.line():.4g}: the "
        f"mean of the last {len(before)} losses, {before.mean():.4g}, plus "
        f"{loss_history.DEVIATIONS:g} standard deviations."
    )


def vanishing_incident_of(
    step: int,
    coefficients: Sequence[float],
    parameter_norms: Callable[[], ParameterNorms | None],
    watched: dict[str, int],
) -> str | None:
    """Return a sentence about gradients that clipping has left nearly 0; None without any.

    Each parameter is named once, and no longer watched then.

    Args:
        step: Index of the step.
        coefficients: The coefficients of the k norms.
        parameter_norms: Returns the norms of the parameters before clipping, None if unknown.
        watched: The parameters whose optimizer normalises their gradient, with their norms.
    """
    if min(coefficients) >= 1 or (norms := parameter_norms()) is None:
        return None
    left = {
        name: norms[name] * coefficients[index]
        for name, index in watched.items()
        if name in norms and coefficients[index] < 1
    }
    vanishing = {name: norm for name, norm in left.items() if 0 < norm < VANISHING}
    if not vanishing:
        return None
    for name in vanishing:
        del watched[name]
    named = ", ".join(f"{name} ({norm:.2g})" for name, norm in [*vanishing.items()][:SHOWN])
    return (
        f"Clipping left gradients with norms below {VANISHING:g} at step {step}: {named}. Their "
        "optimizer does not depend on the scale of gradients, but divides by their norm plus about "
        "1e-7, so that their updates shrink: leave them out of the norm by max_norm=None in their "
        "parameter group, or use scope='group'."
    )


def _nonfinite_names(parameters: ParameterNorms) -> str:
    """Name the parameters that are not finite; only the device could have counted elements."""
    return listed_nonfinite([name for name, norm in parameters.items() if not math.isfinite(norm)])


def nonfinite_error(record: ClipRecord, before: object) -> NonFiniteGradientError:
    """Return the error for a norm that is not finite; it names the parameters. Host sync.

    Args:
        record: Record of the step.
        before: The norms just before, for the message.
    """
    names = record.parameter_sums and record.parameter_sums.nonfinite
    loss = loss_on_host(record.given_loss)
    of_loss = "" if loss is None else f" The loss was {loss:.4g}."
    return NonFiniteGradientError(
        f"The norm of the gradients is {_value_of(record.norms)} at step {record.step}, from these "
        f"parameters: {names}.{of_loss} The norms before: {before}. The step was not taken and the "
        "gradients are unchanged. Lower the learning rate or look at the batch of that step; "
        "nonfinite='zero' or 'skip' would go on."
    )


def nonfinite_micro_batch_error(
    norms: Tensor, step: int, sums: ParameterSums | None
) -> NonFiniteGradientError:
    """Return the error for a micro-batch whose norm is not finite. Host sync.

    Args:
        norms: Norms of the micro-batch, shape (k,).
        step: Index of the step that it belongs to.
        sums: The power sums of the parameters, which name those that are not finite.
    """
    names = sums and sums.nonfinite
    return NonFiniteGradientError(
        f"The norm of a micro-batch's gradients is {_value_of(norms)} before step {step}, from "
        f"these parameters: {names}. The gradients are those from before the micro-batch. Look at "
        "its inputs, or lower the learning rate; nonfinite='zero' or 'skip' would go on."
    )


def _value_of(norms: Tensor) -> str:
    """Describe norms of which some are not finite."""
    values = [norm for norm in norms.tolist() if not math.isfinite(norm)]
    return f"{values[0]}" if norms.numel() == 1 else f"not finite for {len(values)} labels"


def skip_limit_error(limit: int, step: int) -> SkipLimitError:
    """Return the error for too many skipped steps in a row.

    Args:
        limit: The ``skip_limit``.
        step: Index of the newest step.
    """
    return SkipLimitError(
        f"{limit} steps in a row were skipped, up to step {step}: parameters and gradients are "
        "unchanged. Look at the norms (clipper.last, or the logs): raise the threshold or lower "
        "the learning rate, or give a larger skip_limit."
    )

"""Steps that are worth a sentence: a norm that is not finite, or far above those before it."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque

from ..errors import NonFiniteGradientError, SkipLimitError
from ..scopes.naming import joined
from .parameter_norms import NormsByParameter
from .record import ClipRecord

WINDOW = 100
"""Finite norms that a norm is held against: those before it."""
FEWEST = 20
"""How many there have to be."""
DEVIATIONS = 10.0
"""Median deviations above their median from which a norm is a spike."""
ACCURACY = 1e-6
"""To which norms are right: one that is above others by less is not above them."""
SHOWN = 5
"""Norms before the step that are shown, and parameters that carry most of its own."""
CARRIED = 0.9
"""Share of the power sum that the parameters shown have together, if they are not too many."""


class NormHistory:
    """The norms before a step, and whether the next one is a spike.

    Norms of 0, of steps without gradients, tell nothing of what is usual, and are not among those
    that others are held against.
    """

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=SHOWN)
        self._window: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._window)

    def __str__(self) -> str:
        return ", ".join(f"{norm:.4g}" for norm in self._newest) or "not known"

    def add(self, norm: float) -> None:
        """Take over the norm of a step. Takes about a microsecond."""
        self._newest.append(norm)
        if not 0 < norm < math.inf:
            return
        if len(self._window) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._window.popleft())]
        self._window.append(norm)
        insort(self._sorted, norm)

    @property
    def median(self) -> float:
        """The median of the last finite norms; infinity where there are too few."""
        return _median(self._sorted) if len(self._sorted) >= FEWEST else math.inf

    def deviation(self) -> float:
        """Return the median of their distances from it."""
        median = self.median
        return _median(sorted(abs(norm - median) for norm in self._sorted))

    def is_spike(self, norm: float) -> bool:
        """Tell whether a finite norm is more than ten median deviations above the median.

        Told without the deviation where that many norms are nearer to the median than a tenth of
        the way to this one: two searches in place of 100 distances.
        """
        median = self.median
        if not norm > median * (1 + ACCURACY):
            return False
        near = (norm - median) / DEVIATIONS
        first, end = median - near, median + near
        nearer = bisect_left(self._sorted, end) - bisect_right(self._sorted, first)
        half = len(self._sorted) / 2
        if abs(nearer - half) > 1:
            return nearer > half
        return norm > median + DEVIATIONS * self.deviation()


def sentence(
    step: int, norm: float, parameters: NormsByParameter | None, before: NormHistory
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


def _nonfinite(parameters: NormsByParameter) -> str:
    """Name the parameters where only the device could have counted elements."""
    return joined([name for name, norm in parameters.items() if not math.isfinite(norm)])


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return ordered[middle - 1] / 2 + ordered[middle] / 2


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

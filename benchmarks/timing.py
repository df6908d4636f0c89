"""Timing of rivals side by side: interleaved, each call on freshly written gradients."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(
    rivals: Mapping[str, Callable[[], object]],
    prepare: Callable[[], None],
    seconds: float,
    calls: int = 1,
) -> dict[str, float]:
    """Return the median time of each rival in seconds a call.

    Args:
        rivals: What to time, by name. Each round calls all of them in turn, beginning with
            another one every round.
        prepare: Called before every timed call, outside the timed part.
        seconds: How long to go on; at least 5 rounds are made.
        calls: Calls whose mean is one measurement, for what is paid once in many calls.
    """
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 6 or time.perf_counter() < end:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_mean_of(calls, rivals[name], prepare))
        rounds += 1
    # The first round pays for what is allocated once.
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def _mean_of(calls: int, rival: Callable[[], object], prepare: Callable[[], None]) -> float:
    taken = 0.0
    for _ in range(calls):
        prepare()
        start = time.perf_counter()
        rival()
        taken += time.perf_counter() - start
    return taken / calls

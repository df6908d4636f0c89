"""Timing of rivals: interleaved calls, each after its preparation."""

from __future__ import annotations

import contextlib
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

Timer = Callable[[Callable[[], object], Callable[[], None]], float]
"""Returns the seconds that a call took, given the call and its preparation."""


def by_clock(call: Callable[[], object], prepare: Callable[[], None]) -> float:
    """Return the wall time of a call in seconds, after its preparation."""
    prepare()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def by_thread(call: Callable[[], object], prepare: Callable[[], None]) -> float:
    """Return the CPU time of this thread in a call in seconds, after its preparation."""
    prepare()
    start = time.thread_time()
    call()
    return time.thread_time() - start


def interleaved_medians(
    rivals: Mapping[str, Callable[[], object]],
    prepare: Callable[[], None],
    seconds: float,
    calls: int = 1,
    timer: Timer = by_clock,
) -> dict[str, float]:
    """Return the median time of each rival in seconds a call.

    Args:
        rivals: Calls to time, by name. Each round calls all of them in a random order, since a call
            finds its code cold after some rivals and warm after others.
        prepare: Called before every timed call, outside the timed part.
        seconds: Duration of all rounds together; at least 5 rounds are made.
        calls: Calls whose mean is one measurement, for costs that occur once in many calls.
        timer: Times one call.
    """
    times: dict[str, list[float]] = {name: [] for name in rivals}
    end = time.perf_counter() + seconds
    for done, names in enumerate(orders(rivals)):
        if done >= 6 and time.perf_counter() >= end:
            break
        for name in names:
            taken = sum(timer(rivals[name], prepare) for _ in range(calls))
            times[name].append(taken / calls)
    # The first round pays for one-time allocations.
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


def orders(names: Iterable[str]) -> Iterator[list[str]]:
    """Yield the names in random orders without end, the same ones in every process."""
    generator, names = random.Random(0), [*names]
    while True:
        yield generator.sample(names, len(names))


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in a block that takes longer. Works only in the main thread."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""Timing of rivals side by side: interleaved, each call on freshly written gradients."""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

Timer = Callable[[Callable[[], object], Callable[[], None]], float]
"""Given what to call and what to do before: the seconds that the call took."""


def by_clock(call: Callable[[], object], prepare: Callable[[], None]) -> float:
    """Time a call by the clock, in seconds, after preparing for it."""
    prepare()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def by_thread(call: Callable[[], object], prepare: Callable[[], None]) -> float:
    """Time a call by what this thread has computed, in seconds, after preparing for it."""
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
        rivals: What to time, by name. Each round calls all of them in turn, beginning with
            another one every round.
        prepare: Called before every timed call, outside the timed part.
        seconds: How long to go on; at least 5 rounds are made.
        calls: Calls whose mean is one measurement, for what is paid once in many calls.
        timer: How one call is timed.
    """
    names = list(rivals)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 6 or time.perf_counter() < end:
        first = rounds % len(names)
        for name in names[first:] + names[:first]:
            taken = sum(timer(rivals[name], prepare) for _ in range(calls))
            times[name].append(taken / calls)
        rounds += 1
    # The first round pays for what is allocated once.
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, with a TimeoutError; in the main thread only."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

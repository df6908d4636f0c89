"""Timing on a device by its clock and by the host's clock, and the bandwidth of its copies."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.common.timing import Timer, by_clock, interleaved_medians

COPIED = {"cuda": (1 << 30, 1 << 32), "cpu": (1 << 20,)}
"""Sizes in bytes of the copies that measure the bandwidth."""
CYCLES = 2.0e9
"""Approximate cycles of a device's clock in a second."""
LONGEST_SLEEP = 0.1


def synchronize(device: torch.device) -> None:
    """Wait until all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_and_host_medians(
    rivals: Mapping[str, Callable[[], object]],
    prepare: Callable[[], None],
    seconds: float,
    device: torch.device,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median time of each rival on the device, and until its call returns.

    Each measurement takes half of the seconds. On the CPU both are wall times.
    """

    def prepared() -> None:
        prepare()
        synchronize(device)

    on_host = interleaved_medians(rivals, prepared, seconds / 2)
    timer: Timer = by_clock
    if device.type == "cuda":
        asleep = min(2 * max(on_host.values()) + 1e-3, LONGEST_SLEEP)
        timer = functools.partial(by_events, asleep=asleep)
    return interleaved_medians(rivals, prepare, seconds / 2, timer=timer), on_host


def by_events(
    call: Callable[[], object], prepare: Callable[[], None], asleep: float = 1e-3
) -> float:
    """Return the time of a call in seconds by the device's clock, after its preparation.

    The device sleeps first. When it wakes, all work of the call waits in its queue, so that no gap
    between two kernels is due to a slow host.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prepare()
    torch.cuda._sleep(int(asleep * CYCLES))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def by_clock_to_the_end(
    call: Callable[[], object], prepare: Callable[[], None], device: torch.device
) -> float:
    """Return the wall time of a call in seconds, until the device has done its work."""
    prepare()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device, seconds: float) -> float:
    """Return the bytes per second, read and written, of the fastest of some large copies."""
    rates = []
    for size in COPIED[device.type]:
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        rivals = {"copy": functools.partial(target.copy_, source)}
        taken, _ = device_and_host_medians(rivals, lambda: None, seconds, device)
        rates.append(2 * size / taken["copy"])
    return max(rates)

"""How Triton kernels are launched: on which devices, with what options, within a captured graph.

With ``TRITON_INTERPRET=1`` in the environment, for tests, Triton runs the kernels on the host:
then they serve the CPU and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
from torch import Tensor

from ...errors import EngineUnavailableError
from ..cuda_graphs import capturing
from ..layout import LOW
from . import kernels

INTERPRETED = not isinstance(kernels.change, triton.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
"""The type of device that is served."""
OLDEST = (7, 0)
"""The oldest compute capability that Triton compiles for."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
AT_ONCE = 8
"""Addresses that one launch of `kernels.write_addresses` takes."""

_launched: set[tuple[object, ...]] = set()


def launch(
    name: str, device: torch.device, programs: int, *arguments: object, **constants: object
) -> None:
    """Launch a kernel; within a capture only one that was launched before, so that it is loaded.

    Args:
        name: Of the kernel.
        device: Where it runs.
        programs: How many programs of it.
        arguments: Tensors and numbers.
        constants: What it is compiled for.

    Raises:
        EngineUnavailableError: It would have to be compiled and loaded within a capture.
    """
    key = (name, device, *constants.values())
    if key not in _launched:
        if capturing():
            raise not_captured("by this norm, of this dtype, or in this way")
        _launched.add(key)
    with _on(device):
        getattr(kernels, name)[(programs,)](*arguments, **constants, **OPTIONS)


def written_by_kernels(device: torch.device, addresses: Sequence[int]) -> Tensor:
    """Write addresses into a table in a way that a captured graph repeats by itself."""
    # Beyond the end, and where nothing lies, nobody looks; small numbers would be other types.
    wide = [max(address, LOW) for address in addresses] + [LOW] * (-len(addresses) % AT_ONCE)
    table = torch.empty(len(wide), dtype=torch.int64, device=device)
    for first in range(0, len(wide), AT_ONCE):
        launch("write_addresses", device, 1, table, first, *wide[first : first + AT_ONCE])
    return table


def not_captured(gradients: str) -> EngineUnavailableError:
    """Return the error for what cannot be begun within a capture."""
    return EngineUnavailableError(
        f"Gradients were not clipped {gradients} before the CUDA graph was captured, and what is "
        "needed for it cannot be sent to the device within: take a few steps on a side stream "
        "first, as torch.cuda.graph asks for."
    )


def unsupported(device: torch.device) -> str | None:
    """Return why kernels cannot run on a device; None where they can."""
    if device.type != DEVICE:
        interpreter = " where TRITON_INTERPRET is set" if INTERPRETED else ""
        return (
            f"engine='triton' serves devices of type {DEVICE}{interpreter}, and there are "
            f"gradients on {device}: give engine='auto', which chooses for each device."
        )
    if _capability(device) < OLDEST:
        return (
            "engine='triton' needs compute capability {}.{} or newer, and {} has {}.{} as far as "
            "torch knows: give engine='auto', which takes torch operators there."
        ).format(*OLDEST, device, *_capability(device))
    failure = None if capturing() else _failure(device)
    if failure is None:
        return None
    return (
        f"engine='triton' does not run on {device}: {failure}. Triton needs a C compiler (Debian: "
        "apt-get install gcc) and a directory for its cache; or give engine='auto', which takes "
        "torch operators."
    )


@cache
def processors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    if INTERPRETED:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    if INTERPRETED:
        return OLDEST
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@cache
def _failure(device: torch.device) -> str | None:
    """Return why a kernel cannot be launched, None where one can.

    Tried with the one that is launched nowhere else but in a capture, within which none is loaded.
    """
    try:
        written_by_kernels(device, [LOW])
    except Exception as error:  # noqa: BLE001  # of compilers, drivers and caches
        return f"{type(error).__name__}: {error}"
    return None


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, where Triton launches."""
    if INTERPRETED or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)

"""Launches of Triton kernels: supported devices, compile options, and captured graphs.

With ``TRITON_INTERPRET=1`` in the environment, for tests, Triton runs the kernels on the host;
then they support the CPU and nothing else.
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
from ..layout import LOWEST_ADDRESS
from . import kernels

INTERPRETED = not isinstance(kernels.change, triton.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
"""The supported type of device."""
OLDEST = (7, 0)
"""The oldest compute capability that Triton compiles for."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Without fusion, which compilers apply where they like: the same gradients give the same bits."""
AT_ONCE = 8
"""Addresses that one launch of `kernels.write_addresses` takes."""

_launched: set[tuple[object, ...]] = set()
"""Kernels that are compiled and loaded, by name, device and constants: Triton's own cache cannot
be asked without compiling."""


def launch(
    name: str, device: torch.device, programs: int, *arguments: object, **constants: object
) -> None:
    """Launch a kernel; inside a capture only one that was launched before, so that it is loaded.

    Args:
        name: The kernel's name in `gradclip.engines.triton.kernels`.
        device: Where it runs.
        programs: How many programs run it.
        arguments: Tensors and numbers.
        constants: Values that it is compiled for.

    Raises:
        EngineUnavailableError: It would have to be compiled and loaded inside a capture.
    """
    key = (name, device, *constants.values())
    if key not in _launched:
        if capturing():
            raise not_captured("by this norm, of this dtype, or in this way")
        _launched.add(key)
    with _on(device):
        getattr(kernels, name)[(programs,)](*arguments, **constants, **OPTIONS)


def written_by_kernels(device: torch.device, addresses: Sequence[int]) -> Tensor:
    """Write addresses into a table by launches, which a captured graph repeats by itself."""
    # Triton compiles small integers as another type. No kernel reads the address of an empty
    # tensor or the padding, so any large number will do there.
    wide = [max(address, LOWEST_ADDRESS) for address in addresses]
    wide += [LOWEST_ADDRESS] * (-len(addresses) % AT_ONCE)
    table = torch.empty(len(wide), dtype=torch.int64, device=device)
    for first in range(0, len(wide), AT_ONCE):
        launch("write_addresses", device, 1, table, first, *wide[first : first + AT_ONCE])
    return table


def not_captured(gradients: str) -> EngineUnavailableError:
    """Return the error for work that cannot start inside a capture."""
    return EngineUnavailableError(
        f"Gradients were not clipped {gradients} before the CUDA graph was captured, and a capture "
        "allows neither uploads nor loading kernels: take a few steps on a side stream first, as "
        "torch.cuda.graph asks for."
    )


def unsupported(device: torch.device) -> str | None:
    """Return the error text for a device that the kernels do not support, else None."""
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


def processors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    if INTERPRETED:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


# Both cached, since they are asked several times a step.
@cache
def _capability(device: torch.device) -> tuple[int, int]:
    if INTERPRETED:
        return OLDEST
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@cache
def _failure(device: torch.device) -> str | None:
    """Return why a kernel cannot be launched, or None.

    The trial is the kernel that is otherwise launched only inside a capture, where it must be
    loaded already.
    """
    try:
        written_by_kernels(device, [LOWEST_ADDRESS])
    except Exception as error:  # noqa: BLE001  # of compilers, drivers and caches
        return f"{type(error).__name__}: {error}"
    return None


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, since Triton launches there."""
    if INTERPRETED or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)

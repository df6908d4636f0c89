"""Ways to clip gradients on a device to the norm `MAX_NORM`, each checked before it is timed."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import gradclip
from benchmarks.common.gradients import POOL, Gradients
from benchmarks.common.timing import deadline

MAX_NORM = 1.0
COMPILE_SECONDS = 45.0
PACKAGES = {
    "apex": ("apex.multi_tensor_apply", "amp_C"),
    "transformer engine": ("transformer_engine.pytorch.optimizers",) * 2,
}
"""Modules of the multi-tensor applier and of its kernels, by package."""

Step = Callable[[], object]


class DeviceGradients(Gradients):
    """Gradients on a device with a chosen norm, rewritten from a small pool.

    The pool has `POOL` buffers of the size of the largest gradient, whose beginning serves all.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        options: Any = {"dtype": dtype, "device": device}
        self.parameters = [nn.Parameter(torch.zeros(shape, **options)) for shape in shapes]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        sizes = [*map(math.prod, shapes)]
        self.elements = sum(sizes)
        self._buffers = [torch.empty(max(sizes), **options) for _ in range(POOL)]
        self._pool = itertools.cycle(
            [
                [buffer[:size].view(shape) for size, shape in zip(sizes, shapes, strict=True)]
                for buffer in self._buffers
            ]
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The gradients."""
        return [parameter.grad for parameter in self.parameters]

    def draw(self, norm: float) -> None:
        """Draw a new pool, for gradients of about this norm."""
        for buffer in self._buffers:
            buffer.normal_(std=norm / self.elements**0.5)
        self.rewrite()

    def rewrite(self) -> None:
        """Write the next gradients of the pool."""
        torch._foreach_copy_(self.tensors, next(self._pool))


def clipping_rivals(
    gradients: DeviceGradients, hook: Step, *, compiles: bool = True
) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the rivals that clip correctly, and the reason for each missing one.

    Args:
        gradients: The gradients to clip.
        hook: The step of an optimizer with a clipper.
        compiles: Whether to try torch.compile.
    """
    parameters = gradients.parameters
    makers: dict[str, Callable[[], Step]] = {
        "torch": lambda: lambda: nn.utils.clip_grad_norm_(parameters, MAX_NORM),
        **({"compiled": lambda: compiled(parameters)} if compiles else {}),
        **{name: lambda name=name: multi_tensor(name, parameters) for name in PACKAGES},
        "gradclip": lambda: lambda: gradclip.clip_grad_norm_(parameters, MAX_NORM),
        "hook": lambda: hook,
    }
    gradients.draw(2 * MAX_NORM)
    rivals, missing = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            gradients.rewrite()
            step()
            if not math.isclose(gradients.norm(), MAX_NORM, rel_tol=0.05):
                raise ValueError(f"clipped to {gradients.norm():.4f} instead of {MAX_NORM}")
            rivals[name] = step
        except ModuleNotFoundError as error:
            missing[name] = f"not installed ({error})"
        except Exception as error:  # noqa: BLE001  # the other rivals can still be measured
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return rivals, missing


def compiled(parameters: list[nn.Parameter]) -> Step:
    """Return torch's clipping compiled as one graph; without kernels where there is no CUDA."""
    torch.compiler.reset()
    step: Step = torch.compile(
        lambda: nn.utils.clip_grad_norm_(parameters, MAX_NORM),
        fullgraph=True,
        dynamic=False,
        backend="inductor" if parameters[0].is_cuda else "aot_eager",
    )
    with deadline(COMPILE_SECONDS):
        step()
    return step


def multi_tensor(package: str, parameters: list[nn.Parameter]) -> Step:
    """Return clipping by a package's kernels as in Megatron-LM, where the host reads the norm."""
    applier, kernels = map(importlib.import_module, PACKAGES[package])
    apply = applier.multi_tensor_applier
    flag = torch.zeros(1, dtype=torch.int32, device=parameters[0].device)

    def clip() -> None:
        tensors = [parameter.grad for parameter in parameters]
        norm, _ = apply(kernels.multi_tensor_l2norm, flag, [tensors], False)
        coefficient = MAX_NORM / (norm.item() + 1e-6)
        if coefficient < 1:
            apply(kernels.multi_tensor_scale, flag, [tensors, tensors], coefficient)

    return clip

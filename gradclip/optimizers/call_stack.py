"""A search of the call stack for the functions that are running when a hook is called.

The package's docstring says why each of them is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

RUN_STEP = Optimizer.profile_hook_step(lambda: None).__code__
"""The code of torch's wrapper around the ``step`` of every optimizer, which calls the hooks."""


def step_running(optimizer: Optimizer, *, outside: int = 0) -> bool:
    """Return whether a ``step`` of the optimizer is running.

    Args:
        optimizer: The optimizer.
        outside: How many of the innermost running steps, of any optimizer, do not count. A hook
            passes 1 to look outside of the step that calls it.
    """
    stepping = [args[0] for args in locals_of(RUN_STEP, "args")]
    return any(each is optimizer for each in stepping[outside:])


def count_running_steps(optimizer: Optimizer) -> int:
    """Return how many steps of the optimizer are running, each called by the one before."""
    return sum(args[0] is optimizer for args in locals_of(RUN_STEP, "args"))


def running_scaler() -> GradScaler | None:
    """Return the GradScaler whose ``step`` is running, if any."""
    return next(locals_of(GradScaler.step.__code__, "self"), None)


def making_state() -> bool:
    """Return whether torch's distributed checkpoint takes a step to make the optimizer's state.

    It sets all gradients to 0 for that step, which is none of the training's.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    return module is not None and any(
        True for _ in locals_of(module._init_optim_state.__code__, "optim")
    )


def locals_of(code: CodeType, name: str) -> Iterator[Any]:
    """Yield a local variable of every running call of a function, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            yield frame.f_locals[name]
        frame = frame.f_back

"""What is being called right now, outside a hook that has no other way to know."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer


def step_running(optimizer: Optimizer, *, outside: int = 0) -> bool:
    """Tell whether a ``step`` of the optimizer is on the stack.

    Args:
        optimizer: The optimizer.
        outside: How many of the innermost steps, of whatever optimizer, are not meant.
    """
    steps = [args[0] for args in locals_of(RUN_STEP, "args")]
    return any(stepped is optimizer for stepped in steps[outside:])


def running_scaler() -> GradScaler | None:
    """Return the GradScaler whose ``step`` is being called."""
    return next(locals_of(GradScaler.step.__code__, "self"), None)


def making_state() -> bool:
    """Tell whether torch's checkpoints are taking a step of gradients that they set to 0.

    Whatever state the optimizer needs is there after it; the model does not learn from it.
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


RUN_STEP = Optimizer.profile_hook_step(lambda: None).__code__
"""What calls hooks around every step of every optimizer."""

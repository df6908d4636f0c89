"""Functions that are one operator each in what ``torch.compile`` makes, and as they are elsewhere.

The compiler need not look into the native engine, nor could it: it sees what an operator is given,
what that writes, and what comes out. Gradients are handed over as they are, none is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..engines import norm_dtype
from ..engines.no_grad import untracked

P = ParamSpec("P")
R = TypeVar("R")

# Not torch.library.custom_op, by which all that may be written counts as written.
_LIBRARY = torch.library.Library("gradclip", "DEF")
_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):
    # Engines keep what they made, which must not lie in the memory of a graph of the compiler's.
    _TAGS.append(torch.Tag.cudagraph_unsafe)


def operator(
    schema: str, result: Callable[..., object]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function an operator, and switch gradient tracking off while it runs.

    Args:
        schema: The operator's name and types, with a ``!`` at what it writes.
        result: Stands for the function while code is compiled: returns a tensor of the same
            shape, dtype and device.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name, _, _ = schema.partition("(")
        _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, untracked(function), "CompositeExplicitAutograd")
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # no history
        torch.library.register_fake(f"gradclip::{name}", result, lib=_LIBRARY)
        return untracked(function, getattr(torch.ops.gradclip, name).default)

    return decorate


def norm_like(tensors: Sequence[Tensor], *_: Any) -> Tensor:
    """Return a tensor like the norm of all tensors together, of any value."""
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty((), dtype=norm_dtype(device), device=device)


def nothing(*_: Any) -> None:
    """Return what in-place functions return."""

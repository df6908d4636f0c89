"""The registration of a clipping function as one operator for ``torch.compile``.

The compiler cannot trace the native engine. It sees an operator by its schema: the arguments,
those that are written, and the result. Gradients are passed to it without a copy. Eager code calls
the plain function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..engines import norm_dtype
from ..engines.no_grad import no_grad

P = ParamSpec("P")
R = TypeVar("R")

# Not torch.library.custom_op: it raises the version of every argument that may be written, and
# gradients below their threshold must keep theirs.
_LIBRARY = torch.library.Library("gradclip", "DEF")
_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):
    # Engines cache tensors, which must not lie in the memory pool of the compiler's CUDA graphs.
    _TAGS.append(torch.Tag.cudagraph_unsafe)


def operator(
    schema: str, result: Callable[..., object]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that makes a function an operator and runs it without gradient tracking.

    Args:
        schema: Name and types of the operator in torch's schema language, which marks written
            arguments with ``!``.
        result: Replaces the function while code is compiled: takes the same arguments and returns a
            tensor of the same shape, dtype and device.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name, _, _ = schema.partition("(")
        _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, no_grad(function), "CompositeExplicitAutograd")
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # records no history
        torch.library.register_fake(f"gradclip::{name}", result, lib=_LIBRARY)
        return no_grad(function, getattr(torch.ops.gradclip, name).default)

    return decorate


def norm_like(tensors: Sequence[Tensor], *_: Any) -> Tensor:
    """Return an uninitialised tensor of the shape, dtype and device of the joint norm."""
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.empty((), dtype=norm_dtype(device), device=device)


def nothing(*_: Any) -> None:
    """Return None, the result of an in-place operator."""

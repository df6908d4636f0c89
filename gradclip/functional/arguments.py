"""What the functions accept: parameters or gradients, one tensor or several, read once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..engines.base import has_values
from ..errors import GradientError

TensorOrTensors = Tensor | Iterable[Tensor]


def listed_tensors(tensors: TensorOrTensors, depth: int = 3) -> list[Tensor]:
    """Return one tensor or several as a list, read once.

    Args:
        tensors: What a function was given.
        depth: How many calls up the user's line is, for the warning.

    Warns:
        UserWarning: An iterator yields nothing, as one that was read before.
    """
    if isinstance(tensors, Tensor):
        return [tensors]
    listed = list(tensors)
    if not listed and isinstance(tensors, Iterator):
        warnings.warn(
            f"Found a {type(tensors).__name__} that yields no tensor, perhaps because it was read "
            "before, and nothing is clipped: give a list, or call model.parameters() once more.",
            UserWarning,
            stacklevel=depth,
        )
    return listed


def listed_parameters(parameters: TensorOrTensors) -> list[Tensor]:
    """Return parameters as a list, read once.

    Raises:
        GradientError: The iterable holds something else than tensors.
    """
    listed = listed_tensors(parameters, depth=4)
    # Over the few types first: this also runs in compiled code, and for thousands of parameters.
    for kind in {*map(type, listed)}:
        if not issubclass(kind, Tensor) and not all(isinstance(p, Tensor) for p in listed):
            raise GradientError(
                f"Found a {kind.__name__} among the parameters: give tensors only, as "
                "model.parameters() does."
            )
    return listed


def listed_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters, an object that several share as often as it occurs.

    Raises:
        GradientError: None has a gradient, and they look like gradients themselves.
    """
    gradients = [g for p in parameters for g in [p.grad] if g is not None]
    if not gradients:
        _refuse_gradients(parameters)
    return gradients


def refuse_parameters(gradients: Sequence[Tensor]) -> None:
    """Refuse parameters where gradients are wanted: their values would be scaled.

    Raises:
        GradientError: A parameter that has a gradient.
    """
    if any(isinstance(g, nn.Parameter) and g.grad is not None for g in gradients):
        raise GradientError(
            "Found a parameter among the gradients, whose values would be scaled: give the "
            "gradients, [p.grad for p in parameters], or the parameters to clip_grad_norm_()."
        )


def _refuse_gradients(parameters: Sequence[Tensor]) -> None:
    """Refuse gradients where parameters are wanted: nothing would be clipped, silently."""
    others = [p for p in parameters if not _may_be_parameter(p)]
    # Zeros need no clipping. In compiled code the values are not there yet.
    if others and not torch.compiler.is_compiling() and any(map(_has_nonzero, others)):
        raise GradientError(
            f"Found no gradient: {len(others)} of the {len(parameters)} tensors are no parameters, "
            f"such as one of shape {tuple(others[0].shape)}. Give parameters, whose .grad is then "
            "clipped, or gradients to gradclip.clip_gradients_(gradients, max_norm)."
        )


def _may_be_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)


def _has_nonzero(tensor: Tensor) -> bool:
    """Return whether an element is not 0. Host sync."""
    return has_values(tensor) and bool(tensor.detach().to_dense().count_nonzero())

"""What is right: norms, coefficients and clipped gradients in float64, by hand."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

INF = math.inf


def wide(tensor: Tensor) -> Tensor:
    """Return the elements of a tensor, flat, in float64 or complex128; duplicates are summed."""
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64).flatten()


def norm_of(tensors: Iterable[Tensor], order: float = 2.0) -> float:
    """Return the norm of all tensors together, each object once; 0 for none."""
    distinct = {id(tensor): tensor for tensor in tensors}.values()
    elements = [wide(tensor).abs() for tensor in distinct if tensor.numel()]
    return torch.linalg.vector_norm(torch.cat(elements), order).item() if elements else 0.0


def gradient_norm(parameters: Iterable[Tensor], order: float = 2.0) -> float:
    """Return the norm of the gradients of parameters; those without one are passed over."""
    return norm_of([p.grad for p in parameters if p.grad is not None], order)


def coefficient_of(norm: float, threshold: float) -> float:
    """Return ``min(1, threshold / norm)``, the formula of Pascanu, Mikolov and Bengio (2013)."""
    return threshold / norm if norm > threshold else 1.0


def clipped(tensors: Iterable[Tensor], threshold: float, order: float = 2.0) -> list[Tensor]:
    """Return float64 copies of tensors, scaled so that their joint norm is at most a threshold."""
    listed = [*tensors]
    coefficient = coefficient_of(norm_of(listed, order), threshold)
    return [wide(tensor).reshape(tensor.shape) * coefficient for tensor in listed]


def parameter_with(gradient: Tensor | None, *, value: Tensor | float = 0.0) -> nn.Parameter:
    """Return a parameter that has this very gradient."""
    shape, dtype = ((), torch.float32) if gradient is None else (gradient.shape, gradient.dtype)
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype) + value)
    parameter.grad = gradient
    return parameter


def norms_and_ratios(
    before: dict[str, Tensor], after: dict[str, Tensor], order: float = 2.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the norms of tensors and of their differences from later ones, as shares."""
    norms = {name: norm_of([tensor], order) for name, tensor in before.items()}
    changes = {name: norm_of([after[name] - tensor], order) for name, tensor in before.items()}
    return norms, {name: changes[name] / norm for name, norm in norms.items() if norm}


def bits_of(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor's elements, so that NaN equals itself and 0 is not -0."""
    copy = tensor.detach().flatten().clone(memory_format=torch.contiguous_format)
    return copy.view(torch.uint8).cpu().numpy().tobytes()


def bits_in(value: Any) -> Any:
    """Return what equals only exactly the same: the bits of every tensor in a structure."""
    if isinstance(value, dict):
        return {key: bits_in(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [bits_in(each) for each in value]
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    if value.is_sparse:
        return bits_in([value._indices(), value._values(), value.is_coalesced()])
    return value.dtype, value.shape, None if value.is_meta else bits_of(value)

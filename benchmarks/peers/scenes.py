"""Parameters that are trained with a way to clip, on gradients that are made up.

What a step leaves of its gradients is compared, in float64, with what it should be: one common
factor, and the norm `MAX_NORM`; for rules that learn, the norm that the same rule leaves of plain
gradients in float64; for AGC its formula for each unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from benchmarks.peers.ways import MAX_NORM, Way

SHAPES = [(16, 8), (16,), (4, 16)]
COUNT = sum(map(math.prod, SHAPES))
USUAL = (0.4, 0.6)
"""The range of the norms of usual steps."""
STEPS = 130
"""Enough for every package to begin to clip."""
EVALUATIONS = 3
TOLERANCES = {torch.float16: 1e-2}
LEARNED = 0.25
"""How far apart norms may be that a rule leaves twice: evaluations may count as steps."""
UNIT_FACTOR, UNIT_LEAST = 0.01, 1e-3


class Repeating(torch.optim.SGD):
    """Evaluates its closure several times in a step, and keeps the gradients that it is given."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Evaluate, and write nothing."""
        self.given = []
        for _ in range(EVALUATIONS):
            with torch.enable_grad():
                closure()
            self.given.append([flat([p.grad]) for p in self.param_groups[0]["params"]])


class Control:
    """A rule that is given the same gradients as another, as one vector of float64.

    Args:
        way: The rule.
        count: How many elements.
    """

    def __init__(self, way: Way, count: int) -> None:
        self._parameter = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        self._clipping = way.make([torch.optim.SGD([self._parameter], lr=0.0)], None)

    def left(self, gradient: Tensor) -> float:
        """Return the norm that it leaves."""
        self._parameter.grad = gradient.clone()
        self._clipping.clip()
        return float(flat([self._parameter.grad]).norm())


class Scene:
    """A training.

    Args:
        way: How to clip.
        dtype: That of parameters and gradients.
        groups: Indices of the parameters of each optimizer; by default all are those of one.
        sparse: Whether the first gradient is sparse.
        scaler: What scales the gradients.
        make: Makes an optimizer.
    """

    def __init__(
        self,
        way: Way,
        dtype: torch.dtype = torch.float32,
        groups: Sequence[Sequence[int]] = ((0, 1, 2),),
        *,
        sparse: bool = False,
        scaler: GradScaler | None = None,
        make: Callable[..., Any] = torch.optim.SGD,
    ) -> None:
        self.way, self.dtype, self.sparse, self.scaler = way, dtype, sparse, scaler
        self.random = torch.Generator().manual_seed(0)
        self.parameters = [nn.Parameter((self._draw(s) * 0.05).to(dtype)) for s in SHAPES]
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        # No step of the usual ones moves anything.
        chosen = [[self.parameters[index] for index in group] for group in groups]
        self.optimizers = [make(each, lr=0.0) for each in chosen]
        self.clipping = way.make(self.optimizers, scaler)
        attached = self.clipping.attach(self.optimizers)
        self.by_hand = attached is None
        self.stepped = self.optimizers if attached is None else attached
        self.control = (
            Control(way, COUNT * (1 + self.dtype.is_complex)) if way.kind == "adaptive" else None
        )
        self.wanted = MAX_NORM

    def warm_up(self) -> Scene:
        """Take the usual steps."""
        for _ in range(STEPS):
            self.write(self.usual())
            self.step()
        return self

    def usual(self) -> float:
        """Draw a usual norm."""
        low, high = USUAL
        return low + (high - low) * torch.rand((), generator=self.random).item()

    def write(self, norm: float) -> None:
        """Write gradients of about that norm, and keep what they and the parameters are."""
        drawn = [self._draw(shape) for shape in SHAPES]
        factor = norm / flat(drawn).norm().item()
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        for index, (parameter, each) in enumerate(zip(self.parameters, drawn, strict=True)):
            gradient = (each * (factor * scale)).to(self.dtype)
            parameter.grad = repeated_rows(gradient) if self.sparse and index == 0 else gradient
        self.before = flat(self.gradients()) / scale
        self.weights = [parameter.detach().clone() for parameter in self.parameters]

    def gradients(self) -> list[Any]:
        """Return the gradients that are there."""
        return [parameter.grad for parameter in self.parameters]

    def restore(self) -> None:
        """Give parameters the values of the start."""
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.data.copy_(start)

    def step(self, *, unscale: bool = False) -> None:
        """Clip, and take a step with every optimizer."""
        self._expect()
        if self.scaler and unscale:
            self.scaler.unscale_(self.stepped[0])
        if self.by_hand:
            self.clipping.clip()
        for optimizer in self.stepped:
            if self.scaler:
                self.scaler.step(optimizer)
            else:
                optimizer.step()
        if self.scaler:
            self.scaler.update()

    def step_with(self, closure: Callable[[], Any]) -> None:
        """Take a step with a closure."""

        def clipped() -> Any:
            loss = closure()
            if self.by_hand:
                self.clipping.clip()
            return loss

        for optimizer in self.stepped:
            optimizer.step(clipped)
        self._expect()

    def move(self) -> None:
        """Let steps move parameters from now on."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1.0

    def moved(self) -> Tensor:
        """Return what the last step took from the parameters."""
        return flat(self.weights) - flat(self.parameters)

    def judged(self, after: Tensor | None = None) -> str:
        """Return "right", or what is wrong with what is left of the gradients."""
        after = flat(self.gradients()) if after is None else after
        tolerance = TOLERANCES.get(self.dtype, 1e-3)
        lost = int((~after.isfinite()).sum())
        if lost:
            return f"{lost} of {after.numel()} elements not finite"
        if not after.any():
            return "all gradients 0"
        if self.way.kind == "unit":
            return self._judged_units(after, tolerance)
        share = (self.before @ after) / (self.before @ self.before)
        left = after.norm().item()
        told = f"norm {left:.3g} instead of {self.wanted:.3g}"
        if torch.linalg.vector_norm(after - share * self.before) > tolerance * left:
            return f"direction changed, {told}"
        if math.isclose(left, self.wanted, rel_tol=LEARNED if self.control else tolerance):
            return "right"
        return "not clipped" if math.isclose(share, 1.0, rel_tol=tolerance) else told

    def _judged_units(self, after: Tensor, tolerance: float) -> str:
        wanted, place = [], 0
        for weight in self.weights:
            wide = torch.view_as_real(weight) if weight.is_complex() else weight
            gradient = self.before[place : place + wide.numel()].view(wide.shape)
            place += wide.numel()
            wanted.append(clipped_units(gradient, wide.double(), rows=weight.dim() > 1))
        right = flat(wanted)
        if torch.linalg.vector_norm(after - right) <= tolerance * right.norm():
            return "right"
        if torch.allclose(after, self.before, rtol=tolerance, atol=0):
            return "not clipped"
        return f"norm {after.norm():.3g} instead of {right.norm():.3g}"

    def _expect(self) -> None:
        if self.control is not None:
            self.wanted = self.control.left(self.before)

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        """Draw elements of a magnitude between 1/2 and 1."""
        dtype = torch.complex128 if self.dtype.is_complex else torch.float64
        sign: Tensor = torch.randn(shape, generator=self.random, dtype=dtype).sgn()
        return sign * (1 + torch.rand(shape, generator=self.random, dtype=torch.float64)) / 2


def flat(tensors: Sequence[Any]) -> Tensor:
    """Return all elements in one vector of float64."""
    parts = []
    for tensor in tensors:
        dense = tensor.detach()
        dense = dense if dense.layout is torch.strided else dense.to_dense()
        wide = torch.view_as_real(dense) if dense.is_complex() else dense
        parts.append(wide.double().flatten())
    return torch.cat(parts)


def repeated_rows(gradient: Tensor) -> Tensor:
    """Return it sparse, with every row in two parts that are to be added."""
    rows = torch.arange(len(gradient)).repeat(2)
    parts = torch.cat([gradient * 0.75, gradient * 0.25])
    return torch.sparse_coo_tensor(rows[None], parts, tuple(gradient.shape))


def clipped_units(gradient: Tensor, weight: Tensor, *, rows: bool) -> Tensor:
    """Return the gradient as AGC clips it: rows, or all of it, by the norm of the weights."""
    dims = tuple(range(1 if rows else 0, weight.dim()))
    norms = [torch.linalg.vector_norm(each, dim=dims, keepdim=True) for each in (gradient, weight)]
    limit = UNIT_FACTOR * norms[1].clamp(min=UNIT_LEAST)
    coefficients: Tensor = (limit / norms[0]).clamp(max=1.0)
    return gradient * coefficients

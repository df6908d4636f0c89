"""Trainings on generated gradients with a way to clip, and the verdict on its clipping.

The clipped gradients are compared with the right ones in float64. They must have one common factor
and the norm `MAX_NORM`; for a rule that learns, the norm that the same rule leaves of plain float64
gradients; for AGC, the result of its formula for each unit.
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
"""Range of the norms of usual steps."""
STEPS = 130
"""Steps after which every package clips."""
EVALUATIONS = 3
TOLERANCES = {torch.float16: 1e-2}
LEARNED = 0.25
"""Tolerance for the norm that a rule leaves: it may count evaluations as steps."""
UNIT_FACTOR, UNIT_LEAST = 0.01, 1e-3


class Repeating(torch.optim.SGD):
    """An optimizer that evaluates its closure several times a step and records the gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Evaluate the closure without an update."""
        self.given = []
        for _ in range(EVALUATIONS):
            with torch.enable_grad():
                closure()
            self.given.append([flat([p.grad]) for p in self.param_groups[0]["params"]])


class Control:
    """A rule that clips the same gradients as another one, as one float64 vector.

    Args:
        way: The rule.
        count: Number of elements.
    """

    def __init__(self, way: Way, count: int) -> None:
        self._parameter = nn.Parameter(torch.zeros(count, dtype=torch.float64))
        self._clipping = way.make([torch.optim.SGD([self._parameter], lr=0.0)], None)

    def left(self, gradient: Tensor) -> float:
        """Return the norm of a gradient after clipping."""
        self._parameter.grad = gradient.clone()
        self._clipping.clip()
        return float(flat([self._parameter.grad]).norm())


class Scene:
    """A training.

    Args:
        way: The way to clip.
        dtype: Dtype of parameters and gradients.
        groups: Indices of the parameters of each optimizer; by default one optimizer has all.
        sparse: Whether the first gradient is sparse.
        scaler: The scaler of the gradients, if any.
        make: Returns an optimizer.
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
        # A learning rate of 0: usual steps move no parameter.
        parameters = [[self.parameters[index] for index in group] for group in groups]
        self.optimizers = [make(several, lr=0.0) for several in parameters]
        self.clipping = way.make(self.optimizers, scaler)
        attached = self.clipping.attach(self.optimizers)
        self.by_hand = attached is None
        self.stepped = self.optimizers if attached is None else attached
        self.control = (
            Control(way, COUNT * (1 + self.dtype.is_complex)) if way.kind == "adaptive" else None
        )
        self.wanted = MAX_NORM

    def warm_up(self) -> Scene:
        """Take the usual steps and return the scene."""
        for _ in range(STEPS):
            self.write(self.usual())
            self.step()
        return self

    def usual(self) -> float:
        """Return a random norm of a usual step."""
        low, high = USUAL
        return low + (high - low) * torch.rand((), generator=self.random).item()

    def write(self, norm: float) -> None:
        """Write gradients of about this norm, and record them and the parameters."""
        drawn = [self._draw(shape) for shape in SHAPES]
        factor = norm / flat(drawn).norm().item()
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        for index, (parameter, each) in enumerate(zip(self.parameters, drawn, strict=True)):
            gradient = (each * (factor * scale)).to(self.dtype)
            parameter.grad = repeated_rows(gradient) if self.sparse and index == 0 else gradient
        self.before = flat(self.gradients()) / scale
        self.weights = [parameter.detach().clone() for parameter in self.parameters]

    def gradients(self) -> list[Any]:
        """Return the current gradients."""
        return [parameter.grad for parameter in self.parameters]

    def restore(self) -> None:
        """Restore the initial parameters."""
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.data.copy_(start)

    def step(self, *, unscale: bool = False) -> None:
        """Clip and take a step with every optimizer."""
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
        """Return the update of the last step, subtracted from the parameters."""
        return flat(self.weights) - flat(self.parameters)

    def judged(self, after: Tensor | None = None) -> str:
        """Return "right", or the fault of the clipped gradients."""
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
        difference = f"norm {left:.3g} instead of {self.wanted:.3g}"
        if torch.linalg.vector_norm(after - share * self.before) > tolerance * left:
            return f"direction changed, {difference}"
        if math.isclose(left, self.wanted, rel_tol=LEARNED if self.control else tolerance):
            return "right"
        return "not clipped" if math.isclose(share, 1.0, rel_tol=tolerance) else difference

    def _judged_units(self, after: Tensor, tolerance: float) -> str:
        wanted, begin = [], 0
        for weight in self.weights:
            wide = torch.view_as_real(weight) if weight.is_complex() else weight
            gradient = self.before[begin : begin + wide.numel()].view(wide.shape)
            begin += wide.numel()
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
        """Return random elements with a magnitude between 1/2 and 1."""
        dtype = torch.complex128 if self.dtype.is_complex else torch.float64
        sign: Tensor = torch.randn(shape, generator=self.random, dtype=dtype).sgn()
        return sign * (1 + torch.rand(shape, generator=self.random, dtype=torch.float64)) / 2


def flat(tensors: Sequence[Any]) -> Tensor:
    """Return all elements in one float64 vector; complex ones as two."""
    vectors = []
    for tensor in tensors:
        dense = tensor.detach()
        dense = dense if dense.layout is torch.strided else dense.to_dense()
        wide = torch.view_as_real(dense) if dense.is_complex() else dense
        vectors.append(wide.double().flatten())
    return torch.cat(vectors)


def repeated_rows(gradient: Tensor) -> Tensor:
    """Return a sparse gradient in which every row is the sum of two entries."""
    rows = torch.arange(len(gradient)).repeat(2)
    entries = torch.cat([gradient * 0.75, gradient * 0.25])
    return torch.sparse_coo_tensor(rows[None], entries, tuple(gradient.shape))


def clipped_units(gradient: Tensor, weight: Tensor, *, rows: bool) -> Tensor:
    """Return the gradient clipped by AGC: each row, or all of it, by the norm of its weights."""
    dims = tuple(range(1 if rows else 0, weight.dim()))
    norms = [torch.linalg.vector_norm(each, dim=dims, keepdim=True) for each in (gradient, weight)]
    thresholds = UNIT_FACTOR * norms[1].clamp(min=UNIT_LEAST)
    coefficients: Tensor = (thresholds / norms[0]).clamp(max=1.0)
    return gradient * coefficients

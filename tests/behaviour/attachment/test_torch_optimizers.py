"""Every optimizer of torch.optim in all its forms, against the same steps clipped by hand."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradclip import GradientClipper
from tests.support.reference import gradient_norm

KINDS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
}
FORMS = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "fused capturable": {"fused": True, "capturable": True},
}
OPTIONS = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "RMSprop": {"momentum": 0.5},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "Adagrad": {"lr": 0.05},
    "ASGD": {"lr": 0.05, "t0": 10},
    "SparseAdam": {"lr": 0.01},
}
MATRICES_ONLY = ("Muon",)
SPARSE = ("SparseAdam", "SGD", "Adagrad")
"""What takes sparse gradients, SparseAdam nothing else."""
SIGNS_ONLY = ("Rprop",)
"""Whose parameters clipping cannot change, as they go by the signs of the gradients."""
THRESHOLD = 1.0
SCALES = (0.2, 1.0, 3.0, 12.0)
"""By what the losses are multiplied, in turn: some gradients are too long and some are not."""
CALLS = ("step()", "step(closure)", "step(closure=closure)")


@dataclass(frozen=True, eq=False)
class OptimizerCase:
    name: str
    form: str = "plain"
    sparse: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.name} {self.form}{' sparse' if self.sparse else ''}"

    def parameters(self) -> list[nn.Parameter]:
        if self.sparse:
            shapes: list[tuple[int, ...]] = [(10, 4)]
        elif self.name in MATRICES_ONLY:
            shapes = [(6, 5), (5, 3)]
        else:
            shapes = [(6, 5), (5, 3), (3,)]
        generator = torch.Generator().manual_seed(7)
        return [
            nn.Parameter(torch.randn(shape, generator=generator, dtype=self.dtype) * 0.5)
            for shape in shapes
        ]

    def optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        kind = KINDS[self.name]
        accepted = inspect.signature(kind).parameters
        form = {key: value for key, value in FORMS[self.form].items() if key in accepted}
        return kind(parameters, **OPTIONS.get(self.name, {}), **self.options, **form)


@cache
def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    both = torch.randn(8, 9, generator=generator, dtype=dtype)
    return both[:, :6], both[:, 6:]


@cache
def tokens(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 10, (12,), generator=generator)  # 12 of 10: some come twice


class OptimizerRun:
    """A training whose gradients are clipped by hand, by a clipper, or not at all."""

    def __init__(self, case: OptimizerCase, *, by_hand: float = math.inf) -> None:
        self.case, self.by_hand = case, by_hand
        self.parameters = case.parameters()
        self.optimizer = case.optimizer(self.parameters)
        self.norms: list[float] = []
        """In float64, of every evaluation of a step, before any clipping."""

    def take(self, step: int, call: str = "step()", spoil: Callable[[], None] | None = None) -> Any:
        self.norms = []

        def closure() -> Tensor:
            loss = self._backward(step)
            if spoil is not None:
                spoil()
            self.norms.append(gradient_norm(self.parameters))
            scale_by_hand(self.parameters, self.norms[-1], self.by_hand)
            return loss

        if call == "step()":
            closure()
            return self.optimizer.step()
        if call == "step(closure)":
            return self.optimizer.step(closure)
        return self.optimizer.step(closure=closure)

    def _backward(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        if self.case.sparse:
            [table] = self.parameters
            found = nn.functional.embedding(tokens(step), table, sparse=True)
            loss = (found - 0.3).square().mean() * 4
        else:
            inner, outer, *bias = self.parameters
            inputs, wanted = batch(step, self.case.dtype)
            found = sum(bias, (inputs @ inner).tanh() @ outer)
            loss = (found - wanted).square().mean()
        loss = loss * SCALES[step % len(SCALES)]
        loss.backward()
        return loss

    def become(self, other: OptimizerRun) -> None:
        for parameter, its in zip(self.parameters, other.parameters, strict=True):
            parameter.data.copy_(its.data)
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))

    def values(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters])

    def gradients(self) -> Tensor:
        return torch.cat([parameter.grad.to_dense().flatten() for parameter in self.parameters])


def scale_by_hand(parameters: list[nn.Parameter], norm: float, threshold: float) -> None:
    if norm > threshold:
        for parameter in parameters:
            gradient = parameter.grad
            parameter.grad = (gradient.double() * (threshold / norm)).to(gradient.dtype)


def works(case: OptimizerCase) -> bool:
    """Return whether torch has a form on the CPU, where some need to be compiled."""
    run = OptimizerRun(case)
    try:
        run.take(0)
        run.take(1)
    except (AssertionError, RuntimeError):
        return False
    return True


def forms_of(name: str) -> Iterator[OptimizerCase]:
    accepted = inspect.signature(KINDS[name]).parameters.keys()
    return (
        OptimizerCase(name, form) for form, options in FORMS.items() if options.keys() <= accepted
    )


DENSE = [name for name in KINDS if name not in ("LBFGS", "SparseAdam")]
SPECIAL = [case for name in DENSE for case in forms_of(name) if case.form != "plain"]
CASES = [
    *(OptimizerCase(name) for name in DENSE),  # not tried before: if one fails, its test shall
    *filter(works, SPECIAL),
    *(OptimizerCase(name, sparse=True) for name in SPARSE),
]
SEARCHES = (None, "strong_wolfe")


def assert_near(found: Any, expected: Any, case: OptimizerCase, *, looser: float = 1.0) -> None:
    rtol, atol = 1e-5 * looser, 1e-7 * looser
    if case.name == "Muon":
        # It orthogonalizes in bfloat16, of which one rounding can fall to the other side.
        rtol, atol = 1e-3 * looser, 1e-5 * looser
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def differ(found: Any, expected: Any, case: OptimizerCase) -> bool:
    """Tell whether a difference is far beyond what `assert_close` would bear."""
    try:
        assert_near(found, expected, case, looser=10)
    except AssertionError:
        return True
    return False


def exact_bits(value: Any) -> Any:
    """What only equals exactly the same: the bits of every tensor, NaN included."""
    if isinstance(value, dict):
        return {key: exact_bits(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [exact_bits(each) for each in value]
    if isinstance(value, Tensor):
        if value.is_sparse:
            return (
                "sparse",
                exact_bits(value._indices()),
                exact_bits(value._values()),
                value.is_coalesced(),
            )
        return value.dtype, value.shape, value.detach().contiguous().numpy().tobytes()
    return type(value), value


def snapshot(run: OptimizerRun) -> Any:
    gradients = [parameter.grad for parameter in run.parameters]
    return exact_bits([run.parameters, run.optimizer.state_dict(), gradients])


def test_all_optimizers_and_forms_are_here():
    found = {form: {case.name for case in CASES if case.form == form} for form in FORMS}
    assert len(KINDS) >= 13
    assert found["plain"] == set(KINDS) - {"LBFGS"}
    assert found["foreach"] >= {"Adadelta", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD"}
    assert found["fused"] >= {"Adam", "AdamW", "SGD", "Adagrad"}
    for case in CASES:
        group = case.optimizer(case.parameters()).param_groups[0]
        assert all(group[k] == v for k, v in FORMS[case.form].items() if k in group)
    assert {case.form for case in SPECIAL if case not in CASES} <= {"capturable"}


@cache
def history_of(case: OptimizerCase, by_hand: float) -> tuple[list[tuple[Tensor, Tensor]], Any]:
    """Take 20 steps without gradclip; return gradients and values of each, and the last state."""
    run, history = OptimizerRun(case, by_hand=by_hand), []
    for step in range(20):
        run.take(step)
        history.append((run.gradients(), run.values()))
    return history, states(run)


def states(run: OptimizerRun) -> dict[int, dict[str, Any]]:
    """The optimizer's state without None, which cannot be close to anything."""
    state = run.optimizer.state_dict()["state"]
    return {n: {k: v for k, v in s.items() if v is not None} for n, s in state.items()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_steps(case, call):
    ours = OptimizerRun(case)
    clipper = GradientClipper(ours.optimizer, THRESHOLD)
    expected, expected_state = history_of(case, THRESHOLD)
    clipped = 0
    for step, (gradients, values) in enumerate(expected):
        loss = ours.take(step, call)
        [norm] = ours.norms
        assert (loss is None) == (call == "step()")
        assert clipper.last.step == step
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
        assert gradient_norm(ours.parameters) == pytest.approx(min(norm, THRESHOLD), rel=1e-6)
        assert_near(ours.gradients(), gradients, case)
        assert_near(ours.values(), values, case)
        clipped += norm > THRESHOLD
    assert 4 <= clipped <= 16
    assert clipper.clip_rate() == clipped / 20
    assert_near(states(ours), expected_state, case)
    unclipped = history_of(case, math.inf)[0][-1][1]
    assert differ(ours.values(), unclipped, case) is (case.name not in SIGNS_ONLY)


# float64, and by hand each step begins where ours does: from differences of gradients LBFGS
# estimates curvature, so that what is rounded grows tenfold in a step.
@pytest.mark.parametrize("call", CALLS[1:])
@pytest.mark.parametrize("search", SEARCHES)
def test_every_evaluation_of_lbfgs(search, call):
    options = {"lr": 0.1, "max_iter": 4, "line_search_fn": search}
    case = OptimizerCase("LBFGS", options=options, dtype=torch.float64)
    ours, theirs, free = (
        OptimizerRun(case),
        OptimizerRun(case, by_hand=THRESHOLD),
        OptimizerRun(case),
    )
    clipper = GradientClipper(ours.optimizer, THRESHOLD)
    clipped = []
    for step in range(20):
        theirs.become(ours)
        loss = ours.take(step, call)
        assert loss.item() == pytest.approx(theirs.take(step, call).item(), rel=1e-9)
        free.take(step, call)
        assert len(ours.norms) > 1
        assert ours.norms == pytest.approx(theirs.norms, rel=1e-7)
        assert clipper.last.norm.item() == pytest.approx(ours.norms[-1], rel=1e-12)
        torch.testing.assert_close(ours.gradients(), theirs.gradients(), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(ours.values(), theirs.values(), rtol=1e-7, atol=1e-9)
        clipped += [norm > THRESHOLD for norm in ours.norms]
    assert 0.1 < sum(clipped) / len(clipped) < 0.9
    assert clipper.steps == 20
    assert differ(ours.values(), free.values(), case)


POLICIES = {"nonfinite": (1e4, {"nonfinite": "skip"}), "exceed": (1e4, {"exceed": "skip"})}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_skipped_step_leaves_everything(case, policy, call):
    threshold, options = POLICIES[policy]
    ours, without = OptimizerRun(case), OptimizerRun(case)
    clipper = GradientClipper(ours.optimizer, threshold, **options)
    before: list[Any] = []
    objects: list[Tensor] = []

    def spoil() -> None:
        gradient = ours.parameters[0].grad
        values = gradient._values() if gradient.is_sparse else gradient
        values[0, 0] = math.nan if policy == "nonfinite" else 1e9
        before.append(snapshot(ours))
        objects[:] = [parameter.grad for parameter in ours.parameters]

    for step in range(5):
        if step in (0, 3):  # the first, before there is any state, and one in the middle
            loss = ours.take(step, call, spoil)
            assert snapshot(ours) == before.pop()
            assert all(p.grad is each for p, each in zip(ours.parameters, objects, strict=True))
            assert (loss is None) == (call == "step()")
            assert clipper.last.step == step
        else:
            earlier = exact_bits(ours.parameters)
            ours.take(step, call)
            without.take(step, call)
            assert exact_bits(ours.parameters) != earlier
        assert (clipper.skipped, clipper.steps) == (1 + (step >= 3), step + 1)
    assert not before
    # What follows is what follows without the skipped steps.
    assert snapshot(ours) == snapshot(without)

"""Every optimizer of torch.optim in all its forms, against the same steps clipped by hand."""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradclip import GradientClipper
from tests.support.clippers import CALLS, step_by
from tests.support.reference import bits_in
from tests.support.twins import (
    clip_by_hand,
    gradients_of,
    joint_norm,
    layers,
    layers_loss,
    parameters_of,
    values_of,
)

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
SPARSE = ("SparseAdam", "SGD", "Adagrad")
"""What takes sparse gradients, SparseAdam nothing else."""
SCALES = (0.2, 1.0, 3.0, 12.0)
"""By what the losses are multiplied, in turn: some gradients are too long and some are not."""


@dataclass(frozen=True, eq=False)
class OptimizerCase:
    name: str
    form: str = "plain"
    sparse: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.name} {self.form}{' sparse' if self.sparse else ''}"

    @property
    def accepted(self) -> set[str]:
        return {*inspect.signature(KINDS[self.name]).parameters}

    def optimizer(self) -> Optimizer:
        matrices_only = self.name == "Muon"
        parameters = layers(2 if matrices_only else 3, self.dtype)
        form = {key: value for key, value in FORMS[self.form].items() if key in self.accepted}
        options = {**OPTIONS.get(self.name, {}), **self.options, **form}
        return KINDS[self.name](parameters[:1] if self.sparse else parameters, **options)

    def loss(self, step: int, parameters: list[nn.Parameter]) -> Tensor:
        factor = SCALES[step % len(SCALES)]
        if not self.sparse:
            return layers_loss(step, parameters, factor)
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 6, (12,), generator=generator)  # 12 of 6: some come twice
        found = nn.functional.embedding(tokens, parameters[0], sparse=True)
        return (found - 0.3).square().mean() * 4 * factor

    def take(
        self,
        optimizer: Optimizer,
        step: int,
        call: str = "step()",
        change: Callable[[Optimizer], Any] = lambda optimizer: None,
    ) -> tuple[Any, list[float]]:
        """Take a step; return its loss, and the norms of all evaluations before a change."""
        norms = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(step, parameters_of(optimizer))
            loss.backward()
            norms.append(joint_norm(optimizer))
            change(optimizer)
            return loss

        return step_by(optimizer, call, closure), norms


def works(case: OptimizerCase) -> bool:
    """Return whether torch has a form on the CPU, where some need to be compiled."""
    optimizer = case.optimizer()
    try:
        case.take(optimizer, 0)
        case.take(optimizer, 1)
    except (AssertionError, RuntimeError):
        return False
    return True


DENSE = [name for name in KINDS if name not in ("LBFGS", "SparseAdam")]
ALL = [OptimizerCase(name, form) for name in DENSE for form in FORMS]
SPECIAL = [c for c in ALL if c.form != "plain" and FORMS[c.form].keys() <= c.accepted]
CASES = [
    *(OptimizerCase(name) for name in DENSE),  # not tried before: if one fails, its test shall
    *filter(works, SPECIAL),
    *(OptimizerCase(name, sparse=True) for name in SPARSE),
]


def assert_near(found: Any, expected: Any, case: OptimizerCase, *, looser: float = 1.0) -> None:
    # Muon orthogonalizes in bfloat16, of which one rounding can fall to the other side. RMSprop's
    # momentum sums gradients over their roots, up to 10 each, which may cancel.
    tolerances = {"Muon": (1e-3, 1e-5), "RMSprop": (1e-5, 4e-6)}
    rtol, atol = tolerances.get(case.name, (1e-5, 1e-7))
    torch.testing.assert_close(found, expected, rtol=rtol * looser, atol=atol * looser)


def differ(one: Optimizer, other: Optimizer, case: OptimizerCase) -> bool:
    """Tell whether parameters differ far beyond what `assert_near` would bear."""
    try:
        assert_near(values_of(one), values_of(other), case, looser=10)
    except AssertionError:
        return True
    return False


def everything(optimizer: Optimizer) -> Any:
    gradients = [parameter.grad for parameter in parameters_of(optimizer)]
    return bits_in([values_of(optimizer), optimizer.state_dict(), gradients])


def states(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The optimizer's state without None, which cannot be close to anything."""
    state = optimizer.state_dict()["state"]
    return {n: {k: v for k, v in s.items() if v is not None} for n, s in state.items()}


def test_all_optimizers_and_forms_are_here():
    found = {form: {case.name for case in CASES if case.form == form} for form in FORMS}
    assert len(KINDS) >= 13
    assert found["plain"] == set(KINDS) - {"LBFGS"}
    assert found["foreach"] >= {"Adadelta", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD"}
    assert found["fused"] >= {"Adam", "AdamW", "SGD", "Adagrad"}
    for case in CASES:
        group = case.optimizer().param_groups[0]
        assert all(group[k] == v for k, v in FORMS[case.form].items() if k in group)
    assert {case.form for case in SPECIAL if case not in CASES} <= {"capturable"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_steps(case, call):
    ours, theirs, free = (case.optimizer() for _ in range(3))
    clipper, clipped = GradientClipper(ours, 1.0), 0
    for step in range(20):
        loss, [norm] = case.take(ours, step, call)
        case.take(theirs, step, change=clip_by_hand)
        case.take(free, step)
        assert (loss is None) == (call == "step()")
        assert clipper.last.step == step
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
        assert joint_norm(ours) == pytest.approx(min(norm, 1.0), rel=1e-6)
        assert_near(gradients_of(ours), gradients_of(theirs), case)
        assert_near(values_of(ours), values_of(theirs), case)
        clipped += norm > 1.0
    assert 4 <= clipped <= 16
    assert clipper.clip_rate() == clipped / 20
    assert_near(states(ours), states(theirs), case)
    assert differ(ours, free, case) is (case.name != "Rprop")  # which goes by the signs alone


def decided(norms: list[float]) -> int:
    """Return how many evaluations of a step come before one that rounding decides.

    A line search that finds nothing halves its bracket down to the last digit, and the next
    direction comes from the difference of two gradients that are then the same but for rounding.
    """
    still = (
        place for place in range(1, len(norms)) if math.isclose(norms[place - 1], norms[place])
    )
    return next(still, len(norms))


# float64, and by hand each step begins where ours does: from differences of gradients LBFGS
# estimates curvature, so that what is rounded grows tenfold in a step.
@pytest.mark.filterwarnings("ignore:The gradients of LBFGS were clipped")
@pytest.mark.parametrize("call", CALLS[1:])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_every_evaluation_of_lbfgs(search, call):
    options = {"lr": 0.1, "max_iter": 4, "line_search_fn": search}
    case = OptimizerCase("LBFGS", options=options, dtype=torch.float64)
    ours, theirs, free = (case.optimizer() for _ in range(3))
    clipper, clipped, whole = GradientClipper(ours, 1.0), [], 0
    for step in range(20):
        for parameter, value in zip(parameters_of(theirs), values_of(ours), strict=True):
            parameter.data.copy_(value)
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        loss, norms = case.take(ours, step, call)
        needed, needed_norms = case.take(theirs, step, call, clip_by_hand)
        case.take(free, step, call)
        assert loss.item() == pytest.approx(needed.item(), rel=1e-9)
        assert len(norms) > 1
        count = decided(norms)
        assert norms[:count] == pytest.approx(needed_norms[:count], rel=1e-7)
        assert clipper.last.norm.item() == pytest.approx(norms[-1], rel=1e-12)
        clipped += [norm > 1.0 for norm in norms]
        if count < len(norms):
            continue
        found, needed = ([gradients_of(each), values_of(each)] for each in (ours, theirs))
        torch.testing.assert_close(found, needed, rtol=1e-7, atol=1e-9)
        whole += 1
    assert whole >= 5
    assert 0.1 < sum(clipped) / len(clipped) < 0.9
    assert clipper.steps == 20
    assert differ(ours, free, case)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("policy", ["nonfinite", "exceed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_skipped_step_leaves_everything(case, policy, call):
    ours, without, before, objects = case.optimizer(), case.optimizer(), [], []
    clipper = GradientClipper(ours, 1e4, **{policy: "skip"})

    def spoil(_: Optimizer) -> None:
        gradient = parameters_of(ours)[0].grad
        values = gradient._values() if gradient.is_sparse else gradient
        values[0, 0] = math.nan if policy == "nonfinite" else 1e9
        before.append(everything(ours))
        objects[:] = [parameter.grad for parameter in parameters_of(ours)]

    for step in range(5):
        if step in (0, 3):  # the first, before there is any state, and one in the middle
            loss, _ = case.take(ours, step, call, spoil)
            assert everything(ours) == before.pop()
            assert [id(p.grad) for p in parameters_of(ours)] == [*map(id, objects)]
            assert (loss is None) == (call == "step()")
            assert clipper.last.step == step
        else:
            earlier = bits_in(values_of(ours))
            case.take(ours, step, call)
            case.take(without, step, call)
            assert bits_in(values_of(ours)) != earlier
        assert (clipper.skipped, clipper.steps) == (1 + (step >= 3), step + 1)
    # What follows is what follows without the skipped steps.
    assert everything(ours) == everything(without)

"""What raises in a step, a kernel's launch or a closure, leaves it untaken, and all as it was."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradclip import GradientClipper, MemorySink
from gradclip.engines import _ENGINES, _load_triton
from gradclip.engines.operators import host_writing
from gradclip.thresholds import Percentile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process tests the Triton kernels, on the CPU, and nothing else."""
ON_CUDA = " on cuda"
OPTIONS = {
    "scale": {},
    "parameter": {"scope": "parameter"},
    "unit": {"scope": "unit"},
    "skip": {"exceed": "skip", "nonfinite": "skip"},
    "raise": {"nonfinite": "raise"},
    "observe": {"exceed": "observe"},
    "1-norm": {"norm_type": 1.0},
    "infinity norm": {"norm_type": math.inf},
}


class LaunchError(RuntimeError):
    """As of a device that runs no kernel any more."""


KERNELS = (
    [pytest.param("triton", marks=pytest.mark.interpreted)]
    if INTERPRETED
    else ["native", pytest.param("triton" + ON_CUDA, marks=pytest.mark.cuda)]
)
ENGINES = [*([] if INTERPRETED else KERNELS), "operators", "reference"]
"""Interpreted kernels are numpy's matter, not that of torch's operators."""
with_kernels = pytest.mark.parametrize("engine", KERNELS, indirect=True)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param.split()[0]
    if name == "native" and name not in _ENGINES:
        pytest.skip("the native engine was not built")
    # Of what is not there NumPy, which interprets kernels, warns where a device is silent.
    with (
        torch.device("cuda" if request.param.endswith(ON_CUDA) else "cpu"),
        np.errstate(all="ignore"),
    ):
        yield name


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OPTIONS[request.param]


class Run:
    """Parameters under momentum that have gradients to step with, longer than any threshold."""

    def __init__(self, engine: str, dtypes: Any = (torch.float32,), **options: Any) -> None:
        self.weights = [nn.Parameter(torch.ones(3, 64, dtype=dtype)) for dtype in dtypes]
        self.optimizer = torch.optim.SGD(self.weights, lr=0.1, momentum=0.9)
        rule, self.sink = Percentile(50, window=5), MemorySink()
        options = {"log": self.sink, "engine": engine, **options}
        self.clipper = GradientClipper(self.optimizer, rule, **options)
        for length in (1.0, 2.0):
            self.new_gradients(length)
            self.optimizer.step()
        self.new_gradients(5.0)

    def new_gradients(self, length: float) -> None:
        for place, weight in enumerate(self.weights):
            weight.grad = torch.full_like(weight, length * (place + 1))

    def seen(self) -> str:
        """Return what there is of it, gradients and all states included, to the bit."""
        tensors: list[Any] = []
        for weight in self.weights:
            momentum = self.optimizer.state[weight].get("momentum_buffer")
            tensors += [each.tolist() for each in (weight, weight.grad, momentum)]
        state, newest = self.clipper.state_dict(), self.clipper.last.step
        rule = state.pop("threshold")
        learned = [rule[name].tolist() for name in ("window", "counts")]
        return repr((tensors, state, learned, len(self.sink.steps), newest))


class Faults(TorchDispatchMode):
    """Raises at one of the operators that the clipper runs before a step.

    Args:
        at: At which, from 0.
    """

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at, self._count = at, 0
        self.raised = self.over = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.over:
            self._count += 1
            if self._count > self._at:
                self.over = self.raised = True
                raise LaunchError(str(function))
        return function(*args, **(kwargs or {}))

    @contextmanager
    def before_a_step(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        def end(*_: object) -> None:
            self.over = True

        hook = optimizer.register_step_pre_hook(end)
        with self:
            yield
        hook.remove()


class Launches:
    """Kernels of which one cannot be launched.

    Args:
        launch: Launches one, by whatever arguments.
        at: Which fails, from 0.
    """

    def __init__(self, launch: Callable[..., Any], at: int) -> None:
        self._launch, self._at, self._count = launch, at, 0
        self.raised = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._count += 1
        if self._count == self._at + 1:
            self.raised = True
            raise LaunchError
        return self._launch(*arguments, **options)


def check_retaken(run: Run, whole: Run, before: str) -> None:
    """Check that a step that raised left all as it was, and that it can be taken again."""
    assert run.seen() == before
    run.optimizer.step()
    assert run.seen() == whole.seen()


def stepped(engine: str, **options: Any) -> Run:
    """Return a run whose step nothing has disturbed."""
    run = Run(engine, **options)
    run.optimizer.step()
    return run


def test_an_operator_that_fails_leaves_all_as_it_was(engine: str, options: Any) -> None:
    """Whichever of those that the clipper runs it is."""
    in_parts = engine == "reference" and options == OPTIONS["unit"]  # writes unit by unit
    whole = stepped(engine, **options)
    for at in itertools.count():
        run = Run(engine, **options)
        before, faults = run.seen(), Faults(at)
        with faults.before_a_step(run.optimizer):
            try:
                run.optimizer.step()
            except LaunchError:
                assert faults.raised
        if not faults.raised:
            break
        if in_parts:
            run.new_gradients(5.0)
        check_retaken(run, whole, before)
    assert at > 2
    assert run.seen() == whole.seen()


class Library:
    """The library of the native engine, whose functions are launches of a kind."""

    def __init__(self, library: Any, at: int) -> None:
        self.launches = Launches(lambda verb, *given: getattr(library, verb)(*given), at)

    def __getattr__(self, verb: str) -> Callable[..., int]:
        return lambda *arguments: self.launches(verb, *arguments)


@pytest.fixture
def launches(engine: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Launches]:
    """Let one launch of a kernel fail, of those that come."""
    if engine == "native":
        library = _ENGINES["native"]._library

        def of_library(at: int) -> Launches:
            failing = Library(library, at)
            monkeypatch.setattr(_ENGINES["native"], "_library", failing)
            return failing.launches

        return of_library
    _load_triton()
    from gradclip.engines.triton import engine as triton
    from gradclip.engines.triton import launching

    def of_triton(at: int) -> Launches:
        launches = Launches(launching.launch, at)
        monkeypatch.setattr(triton, "launch", launches)
        return launches

    return of_triton


def launched(run: Run, launches: Callable[[int], Launches], at: int) -> bool:
    """Take a step of which one launch fails; tell whether there were as many."""
    failing = launches(at)
    try:
        run.optimizer.step()
    except LaunchError:
        assert failing.raised
    return failing.raised


@with_kernels
def test_a_launch_that_fails_leaves_all_as_it_was(
    engine: str, options: Any, launches: Callable[[int], Launches]
) -> None:
    whole = stepped(engine, **options)
    for at in itertools.count():
        run = Run(engine, **options)
        before = run.seen()
        if not launched(run, launches, at):
            break
        check_retaken(run, whole, before)
    assert at >= 1


MIXED = (torch.float32, torch.float64, torch.bfloat16)


@with_kernels
@pytest.mark.parametrize(
    ("dtypes", "options"),
    [(MIXED, {}), ((torch.float32,), {"max_value": 0.1})],
    ids=["several dtypes", "bounded and scaled"],
)
def test_a_launch_that_fails_among_several_leaves_the_optimizer_as_it_was(
    engine: str, launches: Callable[[int], Launches], dtypes: Any, options: Any
) -> None:
    """Parameters, their optimizer's state and the clipper's; here the gradients are made anew."""
    whole = stepped(engine, dtypes=dtypes, **options)
    for at in itertools.count():
        run = Run(engine, dtypes, **options)
        before = run.seen()
        if not launched(run, launches, at):
            break
        run.new_gradients(5.0)
        check_retaken(run, whole, before)
    assert at >= 2


@pytest.mark.slow
def test_the_same_of_triton_on_the_host() -> None:
    """Where its kernels are interpreted, which takes a process of its own."""
    if find_spec("triton") is None:
        pytest.skip("there is no Triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreted"]
    done = subprocess.run(
        [*command, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


# Several optimizers


def test_a_launch_that_fails_at_the_first_of_two_optimizers_leaves_both_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begun() -> tuple[list[nn.Parameter], list[torch.optim.Optimizer], GradientClipper]:
        weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizers = [torch.optim.SGD([weights[0]], lr=0.1), torch.optim.Adam([weights[1]], lr=0.1)]
        clipper = GradientClipper(optimizers, 1.0, engine="operators")
        for weight in weights:
            weight.grad = torch.full_like(weight, 3.0)
        return weights, optimizers, clipper

    weights, optimizers, clipper = begun()
    failing = Launches(host_writing.scale_, 0)
    with monkeypatch.context() as patch:
        patch.setattr(host_writing, "scale_", failing)
        with pytest.raises(LaunchError):
            clipper.step()
    for weight in weights:
        assert torch.equal(weight, torch.ones(3))
        assert torch.equal(weight.grad, torch.full((3,), 3.0))
    assert not optimizers[1].state
    assert (clipper.steps, clipper.last) == (0, None)
    clipper.step()
    others, _, whole = begun()
    whole.step()
    assert [weight.tolist() for weight in weights] == [weight.tolist() for weight in others]
    assert (clipper.steps, clipper.last.norm) == (1, whole.last.norm)


# Closures


class ClosureError(RuntimeError):
    """As of a batch that cannot be read."""


class Closing:
    """A quadratic loss, of which one evaluation fails.

    Args:
        kind: Makes the optimizer.
        clipped: Whether a clipper is attached, with a threshold that is never met.
    """

    def __init__(self, kind: Callable[..., torch.optim.Optimizer], clipped: bool = True) -> None:
        self.weight = nn.Parameter(torch.tensor([3.0, -2.0, 0.5]))
        self.optimizer = kind([self.weight], lr=0.1)
        self.clipper = GradientClipper(self.optimizer, 1e6) if clipped else None
        self.fails: tuple[int, str] | None = None
        self._evaluations = 0
        self.optimizer.step(self.closure)

    def closure(self) -> torch.Tensor:
        self._evaluations += 1
        self.optimizer.zero_grad()
        if self.fails == (self._evaluations, "before"):
            raise ClosureError
        loss = (self.weight**4).sum()
        loss.backward()
        if self.fails == (self._evaluations, "after"):
            raise ClosureError
        return loss

    def fail(self, evaluation: int, when: str) -> None:
        """Take a step of which one evaluation fails, before its gradients are there or after."""
        self._evaluations, self.fails = 0, (evaluation, when)
        with pytest.raises(ClosureError):
            self.optimizer.step(self.closure)
        self.fails = None

    def seen(self) -> str:
        state = self.optimizer.state[self.weight]
        return repr((self.weight.tolist(), self.weight.grad, [*state.items()]))


KINDS = {
    "SGD": lambda held, lr: torch.optim.SGD(held, lr=lr, momentum=0.9),
    "Adam": torch.optim.Adam,
    "LBFGS": lambda held, lr: torch.optim.LBFGS(held, lr=lr, max_iter=4),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_a_closure_that_raises_leaves_the_optimizer_unstepped(kind: str, when: str) -> None:
    run, whole = Closing(KINDS[kind]), Closing(KINDS[kind])
    weights, state = run.weight.tolist(), repr(run.optimizer.state_dict())
    counts, newest = run.clipper.state_dict(), run.clipper.last
    run.fail(1, when)
    assert run.weight.tolist() == weights
    assert repr(run.optimizer.state_dict()) == state
    assert run.clipper.state_dict() == counts
    assert run.clipper.last is newest
    for each in (run, whole):
        each.optimizer.step(each.closure)
    assert run.seen() == whole.seen()
    assert run.clipper.state_dict() == whole.clipper.state_dict()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("evaluation", [1, 2, 4])
def test_an_evaluation_that_raises_leaves_what_it_would_without_a_clipper(
    evaluation: int, when: str
) -> None:
    """An optimizer that evaluates often has moved its parameters by then, which is its own way."""
    run, alone = Closing(KINDS["LBFGS"]), Closing(KINDS["LBFGS"], clipped=False)
    counts, newest = run.clipper.state_dict(), run.clipper.last
    for each in (run, alone):
        each.fail(evaluation, when)
    assert run.seen() == alone.seen()
    assert run.clipper.state_dict() == counts
    assert run.clipper.last is newest
    for each in (run, alone):
        each.optimizer.step(each.closure)
    assert run.seen() == alone.seen()
    assert run.clipper.steps == 2


def test_a_launch_that_fails_after_an_evaluation_leaves_the_optimizer_unstepped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Closing(KINDS["SGD"])
    weights, state = run.weight.tolist(), repr(run.optimizer.state_dict())
    engine = type(_ENGINES["native"] if "native" in _ENGINES else _ENGINES["operators"])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "norm", Launches(engine.norm, 0))
        with pytest.raises(LaunchError):
            run.optimizer.step(run.closure)
    assert run.weight.tolist() == weights
    assert repr(run.optimizer.state_dict()) == state
    assert run.clipper.steps == 1
    run.optimizer.step(run.closure)
    assert run.clipper.steps == 2

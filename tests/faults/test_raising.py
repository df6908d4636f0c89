"""An operator, a launch or a closure that raises in a step leaves everything as it was."""

import math
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradclip import GradientClipper, MemorySink
from gradclip.thresholds import Percentile
from tests.support.engines import REGISTRY, load_triton

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
KERNELS = (
    [pytest.param("triton", marks=pytest.mark.interpreted)]
    if INTERPRETED
    else ["native", pytest.param("triton" + ON_CUDA, marks=pytest.mark.cuda)]
)
ENGINES = [*([] if INTERPRETED else KERNELS), "operators", "reference"]
"""Interpreted kernels are numpy's matter, not that of torch's operators."""
with_kernels = pytest.mark.parametrize("engine_name", KERNELS, indirect=True)
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class LaunchError(RuntimeError):
    """As of a device that runs no kernel any more."""


@pytest.fixture(params=ENGINES)
def engine_name(request):
    name = request.param.split()[0]
    if name == "native" and name not in REGISTRY:
        pytest.skip("the native engine was not built")
    # NumPy, which interprets kernels, warns of absent values where a device is silent.
    with (
        torch.device("cuda" if request.param.endswith(ON_CUDA) else "cpu"),
        np.errstate(all="ignore"),
    ):
        yield name


class SteppedRun:
    """Parameters under momentum that have gradients to step with, longer than any threshold."""

    def __init__(self, engine, dtypes=(torch.float32,), **options):
        self.weights = [nn.Parameter(torch.ones(3, 64, dtype=dtype)) for dtype in dtypes]
        self.optimizer = torch.optim.SGD(self.weights, lr=0.1, momentum=0.9)
        self.sink = MemorySink()
        options = {"log": self.sink, "engine": engine, **options}
        self.clipper = GradientClipper(self.optimizer, Percentile(50, window=5), **options)
        for length in (1.0, 2.0):
            self.make_gradients(length)
            self.optimizer.step()
        self.make_gradients()
        self.before = self.seen()

    def make_gradients(self, length=5.0):
        for number, weight in enumerate(self.weights, 1):
            weight.grad = torch.full_like(weight, length * number)

    def seen(self):
        """Return all that there is of it, gradients and all states included, to the bit."""
        tensors = []
        for weight in self.weights:
            momentum = self.optimizer.state[weight].get("momentum_buffer")
            tensors += [tensor.tolist() for tensor in (weight, weight.grad, momentum)]
        state, newest = self.clipper.state_dict(), self.clipper.last.step
        rule = state.pop("threshold")
        learned = [rule[name].tolist() for name in ("window", "counts")]
        return repr((tensors, state, learned, len(self.sink.steps), newest))


def check_each_fault(engine, fault, *, renews=False, **options):
    """Let one fault after the other stop a step, which is then taken again; return their number.

    Args:
        engine: Name of the engine.
        fault: Makes the context, of a run and a number, in which so many calls succeed; it gives an
            object that knows whether it ``raised``.
        renews: Whether some gradients may be written already, so that they are made again.
        options: Of the run.
    """
    whole = SteppedRun(engine, **options)
    whole.optimizer.step()
    at, raised = -1, True
    while raised:
        at += 1
        run = SteppedRun(engine, **options)
        with fault(run, at) as failing:
            try:
                run.optimizer.step()
            except LaunchError:
                assert failing.raised
        raised = failing.raised
        if raised:
            if renews:
                run.make_gradients()
            assert run.seen() == run.before
            run.optimizer.step()
        assert run.seen() == whole.seen()
    return at


class Operators(TorchDispatchMode):
    """Raises at one of the operators that run before a step."""

    def __init__(self, at):
        super().__init__()
        self._left, self.raised, self._over = at, False, False

    def end(self, *_):
        self._over = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self._over:
            self._left -= 1
            if self._left < 0:
                self._over = self.raised = True
                raise LaunchError(str(function))
        return function(*args, **(kwargs or {}))


@contextmanager
def failing_operator(run, at):
    operators = Operators(at)
    hook = run.optimizer.register_step_pre_hook(operators.end)
    with operators:
        yield operators
    hook.remove()


@with_options
def test_operator_that_fails(engine_name, options):
    """Whichever of those that the clipper runs it is."""
    in_parts = engine_name == "reference" and options == OPTIONS["unit"]  # writes unit by unit
    assert check_each_fault(engine_name, failing_operator, renews=in_parts, **options) > 2


class Launches:
    """A function that launches kernels, of which one cannot be launched."""

    def __init__(self, launch, at):
        self._launch, self._left, self.raised = launch, at, False

    def __call__(self, *arguments, **options):
        self._left -= 1
        if self._left == -1:
            self.raised = True
            raise LaunchError
        return self._launch(*arguments, **options)


class Library:
    """The library of the native engine, whose functions are launches of a kind."""

    def __init__(self, library, at):
        self.launches = Launches(lambda verb, *given: getattr(library, verb)(*given), at)

    def __getattr__(self, verb):
        return lambda *arguments: self.launches(verb, *arguments)


@contextmanager
def failing_launch(run, at):
    name = run.clipper.engine
    with pytest.MonkeyPatch.context() as patch:
        if name == "native":
            failing = Library(REGISTRY["native"]._library, at)
            patch.setattr(REGISTRY["native"], "_library", failing)
            yield failing.launches
        else:
            load_triton()
            launch = sys.modules["gradclip.engines.triton.launching"].launch
            failing = Launches(launch, at)
            patch.setattr("gradclip.engines.triton.engine.launch", failing)
            yield failing


@with_kernels
@with_options
def test_launch_that_fails(engine_name, options):
    assert check_each_fault(engine_name, failing_launch, **options) >= 1


@with_kernels
@pytest.mark.parametrize(
    "options",
    [{"dtypes": (torch.float32, torch.float64, torch.bfloat16)}, {"max_value": 0.1}],
    ids=["several dtypes", "bounded and scaled"],
)
def test_launch_that_fails_among_several(engine_name, options):
    """All but the gradients is as it was; here they are made anew."""
    assert check_each_fault(engine_name, failing_launch, renews=True, **options) >= 2


@pytest.mark.slow
def test_launches_of_triton_on_the_host():
    """Its kernels are interpreted there, which takes a process of its own."""
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


def test_launch_that_fails_at_the_first_of_two_optimizers(monkeypatch):
    """Both are as they were, and can be stepped again."""
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weights[0]], lr=0.1), torch.optim.Adam([weights[1]], lr=0.1)]
    clipper = GradientClipper(optimizers, 1.0, engine="operators")
    for weight in weights:
        weight.grad = torch.full_like(weight, 3.0)
    with monkeypatch.context() as patch:
        patch.setattr(type(REGISTRY["operators"]), "scale_", Launches(None, 0))
        with pytest.raises(LaunchError):
            clipper.step()
    for weight in weights:
        assert torch.equal(weight, torch.ones(3))
        assert torch.equal(weight.grad, torch.full((3,), 3.0))
    assert not optimizers[1].state
    assert (clipper.steps, clipper.last) == (0, None)
    clipper.step()
    assert (clipper.steps, clipper.last.norm.item()) == (1, pytest.approx(54**0.5))
    assert torch.allclose(weights[0], 1 - 0.1 * torch.full((3,), 6**-0.5))
    assert torch.allclose(weights[1], torch.full((3,), 0.9))


class ClosureError(RuntimeError):
    """As of a batch that cannot be read."""


KINDS = {
    "SGD": lambda held, lr: torch.optim.SGD(held, lr=lr, momentum=0.9),
    "Adam": torch.optim.Adam,
    "LBFGS": lambda held, lr: torch.optim.LBFGS(held, lr=lr, max_iter=4),
}


class Closing:
    """A quartic loss under an optimizer, with a threshold that is never met, or without clipper."""

    def __init__(self, kind, clipped=True):
        self.weight = nn.Parameter(torch.tensor([3.0, -2.0, 0.5]))
        self.optimizer = KINDS[kind]([self.weight], lr=0.1)
        self.clipper = GradientClipper(self.optimizer, 1e6) if clipped else None
        self.fails, self._evaluations = None, 0
        self.step()

    def step(self):
        self._evaluations = 0
        self.optimizer.step(self._closure)

    def _closure(self):
        self._evaluations += 1
        self.optimizer.zero_grad()
        if self.fails == (self._evaluations, "before"):
            raise ClosureError
        loss = (self.weight**4).sum()
        loss.backward()
        if self.fails == (self._evaluations, "after"):
            raise ClosureError
        return loss

    def seen(self):
        state = self.optimizer.state[self.weight]
        return repr((self.weight.tolist(), self.weight.grad, [*state.items()]))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kind", "evaluation"), [("SGD", 1), ("Adam", 1), ("LBFGS", 1), ("LBFGS", 2), ("LBFGS", 4)]
)
def test_closure_that_raises(kind, evaluation, when):
    """All is as without a clipper, and the step does not count.

    One that raises before its gradients are there or after leaves most optimizers unstepped; LBFGS
    has moved its parameters by its second evaluation.
    """
    run, alone = Closing(kind), Closing(kind, clipped=False)
    counts = run.clipper.state_dict(), run.clipper.last
    for each in (run, alone):
        each.fails = (evaluation, when)
        with pytest.raises(ClosureError):
            each.step()
        each.fails = None
    assert run.seen() == alone.seen()
    assert (run.clipper.state_dict(), run.clipper.last) == counts
    for each in (run, alone):
        each.step()
    assert run.seen() == alone.seen()
    assert run.clipper.steps == 2


def test_launch_that_fails_after_an_evaluation(monkeypatch):
    """The optimizer is unstepped."""
    run = Closing("SGD")
    before = repr((run.weight.tolist(), run.optimizer.state_dict()))
    engine = type(REGISTRY.get("native") or REGISTRY["operators"])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "norm", Launches(engine.norm, 0))
        with pytest.raises(LaunchError):
            run.step()
    assert repr((run.weight.tolist(), run.optimizer.state_dict())) == before
    assert run.clipper.steps == 1
    run.step()
    assert run.clipper.steps == 2

"""An operator, a launch or a closure that raises in a step leaves everything as it was."""

import math
import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradclip import GradientClipper, MemorySink
from gradclip.thresholds import Percentile
from tests.support.clippers import OPTIONS
from tests.support.engines import REGISTRY, load_triton
from tests.support.reference import bits_in, parameter_with

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process tests the Triton kernels, on the CPU, and nothing else."""
ON_CUDA = " on cuda"
SETTINGS = {name: given for name, given in OPTIONS.items() if "max_value" not in given}
SETTINGS["raise"] = {"nonfinite": "raise"}
SEVERAL = {
    "several dtypes": {"dtypes": (torch.float32, torch.float64, torch.bfloat16)},
    "bounded and scaled": {"max_value": 0.1},
}
"""Options of runs whose step launches several kernels that write."""
LAUNCHED = {**SETTINGS, "within a closure": {"closure": True}, **SEVERAL}
KERNELS = (
    [pytest.param("triton", marks=pytest.mark.interpreted)]
    if INTERPRETED
    else ["native", pytest.param("triton" + ON_CUDA, marks=pytest.mark.cuda)]
)
ENGINES = [*([] if INTERPRETED else KERNELS), "operators", "reference"]
"""Interpreted kernels are numpy's matter, not that of torch's operators."""
with_kernels = pytest.mark.parametrize("engine_name", KERNELS, indirect=True)


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

    def __init__(self, engine, dtypes=(torch.float32,), closure=False, **options):
        self.weights = [nn.Parameter(torch.ones(3, 64, dtype=dtype)) for dtype in dtypes]
        self.optimizer = torch.optim.SGD(self.weights, lr=0.1, momentum=0.9)
        self.sink, rule = MemorySink(), Percentile(50, window=5)
        options |= {"log": self.sink, "engine": engine}
        self.clipper = GradientClipper(self.optimizer, rule, **options)
        self._closure = self.make_gradients if closure else None
        for length in (1.0, 2.0):
            self.make_gradients(length)
            self.optimizer.step()
        self.make_gradients()
        self.before = self.seen()

    def step(self):
        self.optimizer.step(self._closure)

    def make_gradients(self, length=5.0):
        for number, weight in enumerate(self.weights, 1):
            weight.grad = torch.full_like(weight, length * number)

    def seen(self):
        """Return all that there is of it, gradients and all states included, to the bit."""
        states = self.clipper.state_dict(), self.optimizer.state_dict()
        gradients = [weight.grad for weight in self.weights]
        return bits_in(
            (*states, self.weights, gradients, len(self.sink.steps), self.clipper.last.step)
        )


def check_each_fault(engine, fault, *, renews=False, **options):
    """Let one fault after the other stop a step, which is then taken again; return their number.

    ``fault`` makes a context in which so many calls succeed; ``renews`` says that some gradients
    may be written already, so that they are made again.
    """
    whole = SteppedRun(engine, **options)
    whole.step()
    at, raised = -1, True
    while raised:
        at += 1
        run = SteppedRun(engine, **options)
        with fault(run, at) as failing, suppress(LaunchError):
            run.step()
        if raised := failing.raised:
            if renews:
                run.make_gradients()
            assert run.seen() == run.before
            run.step()
        assert run.seen() == whole.seen()
    return at


class Calls:
    """Calls of a function, of which one fails."""

    def __init__(self, function, at):
        self._function, self._left, self.raised = function, at, False

    def __call__(self, *arguments, **options):
        self._left -= 1
        if self._left == -1:
            self.raised = True
            raise LaunchError
        return self._function(*arguments, **options)


class Operators(TorchDispatchMode):
    """Counts the operators that run before a step among the calls."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.over = calls, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not (self.over or self.calls.raised):
            self.calls()
        return function(*args, **(kwargs or {}))


@contextmanager
def failing_operator(run, at):
    operators = Operators(Calls(int, at))
    hook = run.optimizer.register_step_pre_hook(lambda *_: setattr(operators, "over", True))
    with operators:
        yield operators.calls
    hook.remove()


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_operator_that_fails(engine_name, options):
    """Whichever of those that the clipper runs it is."""
    in_parts = engine_name == "reference" and "unit" in options.values()  # writes unit by unit
    assert check_each_fault(engine_name, failing_operator, renews=in_parts, **options) > 2


class Library:
    """The library of the native engine, whose functions are calls of a kind."""

    def __init__(self, library, at):
        self.calls = Calls(lambda verb, *given: getattr(library, verb)(*given), at)

    def __getattr__(self, verb):
        return lambda *arguments: self.calls(verb, *arguments)


@contextmanager
def failing_launch(run, at):
    with pytest.MonkeyPatch.context() as patch:
        if run.clipper.engine == "native":
            library = Library(REGISTRY["native"]._library, at)
            patch.setattr(REGISTRY["native"], "_library", library)
            yield library.calls
        else:
            load_triton()
            calls = Calls(sys.modules["gradclip.engines.triton.launching"].launch, at)
            patch.setattr("gradclip.engines.triton.engine.launch", calls)
            yield calls


@with_kernels
@pytest.mark.parametrize("options", LAUNCHED.values(), ids=LAUNCHED)
def test_launch_that_fails(engine_name, options):
    """Of several launches some may have written gradients, which are made anew; no more."""
    several = options in SEVERAL.values()
    faults = check_each_fault(engine_name, failing_launch, renews=several, **options)
    assert faults >= 1 + several


@pytest.mark.slow
def test_launches_of_triton_on_the_host():
    """Its kernels are interpreted there, which takes a process of its own."""
    if find_spec("triton") is None:
        pytest.skip("there is no Triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreted"]
    options = {"capture_output": True, "text": True, "timeout": 300}
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, __file__], env=environment, **options)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def test_launch_that_fails_at_the_first_of_two_optimizers(monkeypatch):
    """Both are as they were, and can be stepped again."""
    weights = [parameter_with(torch.full((3,), 3.0), value=1.0) for _ in range(2)]
    optimizers = [torch.optim.SGD([weights[0]], lr=0.1), torch.optim.Adam([weights[1]], lr=0.1)]
    clipper = GradientClipper(optimizers, 1.0, engine="operators")
    with monkeypatch.context() as patch:
        patch.setattr(type(REGISTRY["operators"]), "scale_", Calls(None, 0))
        with pytest.raises(LaunchError):
            clipper.step()
    assert [(w.tolist(), w.grad.tolist()) for w in weights] == [([1.0] * 3, [3.0] * 3)] * 2
    assert (clipper.steps, clipper.last, len(optimizers[1].state)) == (0, None, 0)
    clipper.step()
    assert (clipper.steps, clipper.last.norm.item()) == (1, pytest.approx(54**0.5))
    assert weights[0].tolist() == pytest.approx([1 - 0.1 * 6**-0.5] * 3)
    assert weights[1].tolist() == pytest.approx([0.9] * 3)


KINDS = {
    "SGD": lambda held, lr: torch.optim.SGD(held, lr=lr, momentum=0.9),
    "Adam": torch.optim.Adam,
    "LBFGS": lambda held, lr: torch.optim.LBFGS(held, lr=lr, max_iter=4),
}


class Closing:
    """A quartic loss under an optimizer whose clipper, if there is one, never clips."""

    def __init__(self, kind, clipped=True):
        self.weight = nn.Parameter(torch.tensor([3.0, -2.0, 0.5]))
        self.optimizer = KINDS[kind]([self.weight], lr=0.1)
        self.clipper = GradientClipper(self.optimizer, 1e6) if clipped else None
        self.step()

    def step(self, fails_at=math.inf):
        """Step; one of two calls in each evaluation, before and after the gradients, may fail."""
        call = Calls(int, fails_at)

        def closure():
            self.optimizer.zero_grad()
            call()
            loss = (self.weight**4).sum()
            loss.backward()
            call()
            return loss

        self.optimizer.step(closure)

    def seen(self):
        return bits_in((self.weight, self.weight.grad, self.optimizer.state_dict()))


@pytest.mark.parametrize(
    ("kind", "call"),
    [*[(kind, call) for kind in KINDS for call in (0, 1)], *[("LBFGS", n) for n in (2, 3, 6, 7)]],
)
def test_closure_that_raises(kind, call):
    """All is as without a clipper, and the step does not count.

    Most optimizers are left unstepped; LBFGS has moved its parameters by its second evaluation.
    """
    run, alone = Closing(kind), Closing(kind, clipped=False)
    counts = run.clipper.state_dict(), run.clipper.last
    for each in (run, alone):
        with pytest.raises(LaunchError):
            each.step(call)
    assert run.seen() == alone.seen()
    assert (run.clipper.state_dict(), run.clipper.last) == counts
    run.step()
    alone.step()
    assert run.seen() == alone.seen()
    assert run.clipper.steps == 2

"""Settings that every test shares, and the rule that no test is skipped unnoticed."""

from __future__ import annotations

import gc
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradclip import engines, thresholds
from gradclip.engines.operators import device
from gradclip.engines.operators.engine import OperatorsEngine

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")

settings.register_profile("gradclip", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("gradclip")

OPTIONS = {
    "as it comes": {},
    "observe": {"exceed": "observe"},
    "skip what exceeds": {"exceed": "skip"},
    "skip what is not finite": {"nonfinite": "skip"},
    "skip with a limit": {"nonfinite": "skip", "skip_limit": 3},
    "propagate": {"nonfinite": "propagate"},
    "bounded": {"max_value": 0.1},
    "bounded, skip": {"max_value": 0.1, "exceed": "skip"},
    "bounded, observe": {"max_value": 0.1, "exceed": "observe"},
    "1-norm": {"norm_type": 1.0},
    "infinity norm": {"norm_type": math.inf},
    "parameter": {"scope": "parameter"},
    "unit": {"scope": "unit"},
}
RULES = {
    "fixed": lambda: 0.5,
    "none": lambda: None,
    "schedule": lambda: lambda step: 0.5,
    "percentile": lambda: thresholds.Percentile(50, window=5),
    "z-score": lambda: thresholds.ZScore(0.5, warmup=2),
    "median": lambda: thresholds.MedianDeviation(1.0, window=5, warmup=2),
    "mean": lambda: thresholds.MeanDeviation(0.5, window=5, warmup=2),
    "average": lambda: thresholds.MovingAverage(0.9, warmup=2),
    "growth": lambda: thresholds.GrowthLimit(0.9),
    "weights": lambda: thresholds.RelativeToWeights(0.1),
}

_unexplained: list[str] = []


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device at once: it is thousands of tests."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        skip = pytest.mark.skip(reason="there is no CUDA device")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.fullmatch(pattern, reason) for pattern in _allowed_reasons()):
            _unexplained.append(f"{report.nodeid}: {reason}")


@cache
def _allowed_reasons() -> list[str]:
    lines = ALLOWED_SKIPS.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for skip in _unexplained:
        terminalreporter.write_line(f"skipped for a reason not in {ALLOWED_SKIPS.name}: {skip}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a test that is skipped for a reason nobody has written down is a failure."""
    if os.environ.get("CI") and _unexplained and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


class Training:
    """An optimizer whose gradients have the norms they are told to have."""

    def __init__(self) -> None:
        self._parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self._parameter], lr=0.0)

    def take(self, *norms: float) -> None:
        """Take one step with each norm."""
        for norm in norms:
            self._parameter.grad = torch.tensor([0.0, norm], dtype=torch.float64)
            self.optimizer.step()


@pytest.fixture
def training() -> type[Training]:
    return Training


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a clipper, those of every policy that does not wait for a device."""
    return OPTIONS[request.param]


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Any:
    """What a clipper takes for ``max_norm``, a new one at each call."""
    return RULES[request.param]


class Tape(TorchDispatchMode):
    """Runs operators and, at every replay, runs them again on the same memory.

    That is what a CUDA graph does with kernels: no Python runs, and nothing can be read. Reading a
    value raises here, at the first run already.
    """

    READING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function.overloadpacket not in self.READING, "the host would wait for a value"
        made = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, made in self._calls:
                for old, new in zip(
                    tree_leaves(made), tree_leaves(function(*args, **kwargs)), strict=True
                ):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.fixture
def tape(like_a_device: None) -> Iterator[Tape]:
    gc.disable()  # clippers of other tests read their records when they are collected
    yield Tape()
    gc.enable()


@pytest.fixture
def like_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU be treated as a device whose values the host does not know."""

    class DeviceEngine(OperatorsEngine):
        def power_sums(self, tensors, order, *, rows=False):
            return device.power_sums(tensors, order, rows=rows)

        def norm(self, tensors, order, *, scalar=False):
            norm = device.norm(tensors, order)
            return norm.squeeze(0) if scalar else norm

        def norm_and_sums(self, tensors, order):
            return device.norm_and_sums(tensors, order)

        def scale_(self, tensors, coefficients, *, rows=False):
            device.scale_(tensors, coefficients, rows=rows)

        def clamp_(self, tensors, bounds, *, rows=False):
            device.clamp_(tensors, bounds, rows=rows)

    monkeypatch.setattr(engines, "_BEST", {"cpu": DeviceEngine()})
    for module in _modules_with("host_may_read"):
        monkeypatch.setattr(module, "host_may_read", lambda tensor: False)


def _modules_with(name: str) -> list[ModuleType]:
    """Return the package's modules in which a name is known."""
    ours = [module for key, module in [*sys.modules.items()] if key.startswith("gradclip.")]
    return [module for module in ours if name in vars(module)]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[int, object]:
    """What is kept for graphs that are captured."""
    monkeypatch.setattr("gradclip.engines.cuda_graphs._KEPT", kept := {})
    return kept


@pytest.fixture
def captured(
    monkeypatch: pytest.MonkeyPatch, kept: dict[int, object]
) -> Callable[[], AbstractContextManager[None]]:
    """Say within a block that steps are captured in a CUDA graph, of which there may be records."""
    monkeypatch.setattr("gradclip.records.recorder.may_be_captured", lambda record: True)

    @contextmanager
    def capture() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module in _modules_with("capturing"):
                patch.setattr(module, "capturing", lambda: True)
            yield

    return capture

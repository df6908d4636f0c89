"""A device in place of CUDA: the CPU, whose values the host may not read, and captured graphs."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from gradclip import engines
from gradclip.engines.operators import device
from gradclip.engines.operators.engine import OperatorsEngine


class DeviceEngine(OperatorsEngine):
    """The engine of torch operators as off the CPU, also for tensors of the CPU."""

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


class Tape(TorchDispatchMode):
    """Runs operators and, at every replay, runs them again on the same memory.

    That is what a CUDA graph does with kernels: no Python runs, and nothing can be read. Reading a
    value raises here, at the first run already.
    """

    READING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal)

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
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
    monkeypatch.setattr(engines, "_BEST", {"cpu": DeviceEngine()})
    take_the_device_route(monkeypatch)


def take_the_device_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no step read a value where it need not, as on a CUDA device."""
    for module in _modules_with("host_may_read"):
        monkeypatch.setattr(module, "host_may_read", lambda tensor: False)


@pytest.fixture
def device_route(monkeypatch: pytest.MonkeyPatch) -> None:
    take_the_device_route(monkeypatch)


@pytest.fixture(params=["host", "device"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of a step: with and, as on a CUDA device, without reading values."""
    if request.param == "device":
        take_the_device_route(monkeypatch)
    return request.param


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


class CountedOperators(TorchDispatchMode):
    """Counts the torch operators of a step, without those of the launches of `LikeCuda`.

    Views and allocations launch nothing, and are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, views = str(function), [one.alias_info for one in function._schema.arguments]
        is_view = any(view is not None and not view.is_write for view in views)
        # The profiler's are of torch's own wrapper of every step.
        if function.namespace != "profiler" and not is_view and not name.startswith("aten.empty"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class LikeCuda:
    """The CPU as a CUDA device: Triton serves it, no value is read, and answers arrive at once.

    A launch runs no kernel. That of a measurement writes `norm`, whatever the gradients are.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if engines._load_triton() is not None:
            pytest.skip("there is no Triton")
        from gradclip.engines.triton import engine, launching, requests
        from gradclip.thresholds import warm_up

        self.norm = 1.0
        self.launches: list[str] = []
        take_the_device_route(monkeypatch)
        monkeypatch.setattr(launching, "DEVICE", "cpu")
        monkeypatch.setattr(launching, "_capability", lambda device: launching.OLDEST)
        monkeypatch.setattr(launching, "_failure", lambda device: None)
        monkeypatch.setattr(requests, "processors", lambda device: 1)
        monkeypatch.setattr(requests, "INTERPRETED", True)  # there is no stream to ask for
        monkeypatch.setattr(engine, "launch", self._launch)
        monkeypatch.setattr(engines, "_BEST", {"cpu": engine.TritonEngine()})
        monkeypatch.setattr(warm_up, "ANSWERS", "cpu")
        monkeypatch.setattr(warm_up, "Answer", ArrivedAnswer)

    def _launch(self, name: str, device: torch.device, programs: int, *arguments, **constants):
        self.launches.append(name)
        if name == "power_sums":
            _, _, _, sums, _, _, norm = arguments
            with _disable_current_modes():
                for measured in (sums, norm):
                    if measured is not None:
                        measured.fill_(self.norm)


class ArrivedAnswer:
    """A flag that has arrived on the host as soon as it was sent."""

    def __init__(self, flag: torch.Tensor) -> None:
        with _disable_current_modes():
            self._flag = bool(flag)

    def arrived(self) -> bool:
        return True

    def value(self) -> bool:
        return self._flag


@pytest.fixture
def like_cuda(monkeypatch: pytest.MonkeyPatch) -> LikeCuda:
    return LikeCuda(monkeypatch)

"""What holds in every test of a framework."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

PACKAGES = {
    "*lightning*": ("lightning", "pytorch_lightning"),
    "*transformers*": ("transformers",),
    "*accelerate*": ("accelerate",),
}
collect_ignore_glob = [files for files, names in PACKAGES.items() if not all(map(find_spec, names))]


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Train on one thread, and inherit nothing that Accelerate keeps for the process."""
    if kept := sys.modules.get("accelerate.state"):
        for state in (kept.AcceleratorState, kept.GradientState, kept.PartialState):
            state._reset_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> Any:
    """Lightning by each of its names."""
    return sys.modules[request.param]

"""What importing the package brings: its names, and nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gradclip


def test_the_public_names_are_exactly_these() -> None:
    assert gradclip.__all__ == [
        "ArgumentError",
        "AttachError",
        "CallableSink",
        "ClipRecord",
        "EngineUnavailableError",
        "GradClipError",
        "GradientClipper",
        "GradientError",
        "JsonlSink",
        "LoggedStep",
        "MemorySink",
        "NonFiniteGradientError",
        "Ranks",
        "Scope",
        "Sink",
        "SkipLimitError",
        "StateError",
        "TensorBoardSink",
        "Threshold",
        "TimeNorms",
        "__version__",
        "clip_backward",
        "clip_grad_norm_",
        "clip_grad_units_",
        "clip_grad_value_",
        "clip_gradients_",
        "clip_grads_with_norm_",
        "get_total_norm",
        "thresholds",
        "through_time",
    ]
    for name in gradclip.__all__:
        assert getattr(gradclip, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'clip_grad_nrom_'"):
        _ = gradclip.clip_grad_nrom_


IMPORTS = """
import sys
import torch
before = set(sys.modules)
import gradclip
print(*sorted(set(sys.modules) - before))

parameter = torch.nn.Parameter(torch.ones(2))
parameter.grad = torch.ones(2)
optimizer = torch.optim.SGD([parameter], lr=0.1)
optimizer.step()  # torch imports more at its first
before = set(sys.modules)
clipper = gradclip.GradientClipper(optimizer, 1.0)
optimizer.step()
clipper.close()
print(*sorted(set(sys.modules) - before))
"""


def test_importing_and_clipping_import_nothing_heavy() -> None:
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, timeout=120, check=True, capture_output=True, text=True)
    at_import, at_work = (line.split() for line in done.stdout.splitlines())
    assert "gradclip.clipper" in at_import
    heavy = ("tensorboard", "triton", "torch.distributed.tensor", "torch.utils.tensorboard")
    for imported in (at_import, at_work):
        assert [
            name for name in imported if f"{name}.".startswith(tuple(f"{h}." for h in heavy))
        ] == []

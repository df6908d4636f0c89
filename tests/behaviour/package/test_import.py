"""What importing the package brings: its names, and nothing heavy."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert dir(gradclip) == gradclip.__all__
    for name in gradclip.__all__:
        assert getattr(gradclip, name) is not None


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse(Path(gradclip.__file__).read_text())
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert typed == {*gradclip.__all__} - {"__version__"}


def test_a_star_import_brings_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from gradclip import *", names)
    assert {*gradclip.__all__} <= {*names}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'clip_grad_nrom_'"):
        _ = gradclip.clip_grad_nrom_


@pytest.mark.parametrize(
    "statement",
    [
        "import gradclip, gradclip.errors, gradclip.cli; dir(gradclip)",
        "from gradclip.cli import main; main(['--help'])",
        "from gradclip.cli import main; main(['--version'])",
        "from gradclip.cli import main; main(['report', '--help'])",
        "from gradclip.cli import main; assert main(['report', RUN]) == 0",
        "from gradclip.cli import main; assert main(['report', RUN, '--json']) == 0",
    ],
)
def test_torch_is_imported_when_something_asks_for_it(statement: str, tmp_path: Path) -> None:
    run = tmp_path / "run.jsonl"
    clipper = gradclip.GradientClipper(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]), 1.0, log=gradclip.JsonlSink(run)
    )
    clipper.step()
    clipper.close()
    script = f"import sys; RUN = {str(run)!r}; {statement}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True, capture_output=True)


@pytest.mark.parametrize(
    "expression",
    [
        "gradclip.thresholds.ZScore()",
        "gradclip.errors.ArgumentError",
        "gradclip.GradientClipper",
        "gradclip.clipper.GradientClipper",
        "gradclip.integrations",
    ],
)
def test_what_is_asked_for_is_imported(expression: str) -> None:
    script = f"import gradclip; {expression}"
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)


@pytest.mark.parametrize(
    "made",
    [
        "gradclip.thresholds.ZScore()",
        "gradclip.Scope('unit')",
        "gradclip.Ranks(replicated='a')",
        "gradclip.ArgumentError('what')",
        "gradclip.clip_grad_norm_",
    ],
)
def test_pickles_load_where_nothing_was_imported(made: str, tmp_path: Path) -> None:
    file = tmp_path / "made.pickle"
    file.write_bytes(pickle.dumps(eval(made)))
    script = f"import pickle; pickle.load(open({str(file)!r}, 'rb'))"
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)


@pytest.mark.parametrize(
    "name", ["records.ClipRecord", "records.LoggedStep", "scopes.Scope", "ranks.Ranks"]
)
def test_pickles_of_0_1_0_name_classes_that_are_found(name: str) -> None:
    module, cls = name.split(".")
    script = f"import pickle; pickle.loads(b'cgradclip.{module}\\n{cls}\\n.')"
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)


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
    assert at_import == ["gradclip"]
    heavy = ("tensorboard", "triton", "torch.distributed.tensor", "torch.utils.tensorboard")
    for imported in (at_import, at_work):
        assert [
            name for name in imported if f"{name}.".startswith(tuple(f"{h}." for h in heavy))
        ] == []

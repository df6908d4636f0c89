"""What importing the package brings: its names, and nothing heavy."""

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import gradclip
from tests.support.report import log_norms

NAMES = """
    ArgumentError AttachError CallableSink ClipRecord EngineUnavailableError GradClipError
    GradientClipper GradientError JsonlSink LoggedStep MemorySink NonFiniteGradientError Ranks
    Scope Sink SkipLimitError StateError TensorBoardSink Threshold TimeNorms __version__
    clip_backward clip_grad_norm_ clip_grad_units_ clip_grad_value_ clip_gradients
    clip_gradients_ clip_grads_with_norm_ get_total_norm show thresholds through_time
"""


def output_of(script: str) -> str:
    """Return what a script prints in a fresh interpreter."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, timeout=120, check=True, capture_output=True, text=True).stdout


def test_the_public_names_are_exactly_these() -> None:
    """Also for dir(), a star import and type checkers."""
    assert gradclip.__all__ == NAMES.split()
    assert dir(gradclip) == gradclip.__all__
    names: dict[str, object] = {}
    exec("from gradclip import *", names)
    assert {*gradclip.__all__} <= {*names}
    tree = ast.parse(Path(gradclip.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    typed = {alias.name for node in imports for alias in node.names}
    assert typed == {*gradclip.__all__} - {"__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'clip_grad_nrom_'"):
        _ = gradclip.clip_grad_nrom_


@pytest.mark.parametrize(
    "statement",
    [
        "import gradclip, gradclip.errors, gradclip.cli; dir(gradclip)",
        "main(['--help'])",
        "main(['--version'])",
        "main(['report', '--help'])",
        "assert main(['report', RUN]) == 0",
        "assert main(['report', RUN, '--json']) == 0",
    ],
)
def test_torch_is_imported_when_something_asks_for_it(statement: str, tmp_path: Path) -> None:
    run = str(log_norms(tmp_path / "run.jsonl", [1.0]))
    imported = "atexit.register(lambda: print('torch' in sys.modules))"  # main() may exit
    start = f"import atexit, sys; RUN = {run!r}; {imported}; from gradclip.cli import main; "
    assert output_of(start + statement).endswith("False\n")


@pytest.mark.parametrize("name", ["thresholds.ZScore", "clipper.GradientClipper", "integrations"])
def test_what_is_asked_for_is_imported(name: str) -> None:
    output_of(f"import gradclip; gradclip.{name}; gradclip.GradientClipper")


OBJECTS = [gradclip.thresholds.ZScore(), gradclip.Scope("unit"), gradclip.Ranks(replicated="a")]
OBJECTS += [gradclip.ArgumentError("what"), gradclip.clip_grad_norm_]
OLD = ("records\nClipRecord", "records\nLoggedStep", "scopes\nScope", "ranks\nRanks")  # of 0.1.0
PICKLES = [*map(pickle.dumps, OBJECTS), *(f"cgradclip.{name}\n.".encode() for name in OLD)]
LOADING = """
import pickle, sys
for data in {}:
    for name in [name for name in sys.modules if name.startswith("gradclip")]:
        del sys.modules[name]
    pickle.loads(data)
"""


def test_pickles_load_where_nothing_was_imported() -> None:
    output_of(LOADING.format(PICKLES))


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
    at_import, at_work = (line.split() for line in output_of(IMPORTS).splitlines())
    assert at_import == ["gradclip"]
    heavy = ("tensorboard", "triton", "torch.distributed.tensor", "torch.utils.tensorboard")
    prefixes = tuple(f"{name}." for name in heavy)
    assert [name for name in at_import + at_work if f"{name}.".startswith(prefixes)] == []

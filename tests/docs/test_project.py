"""What the project's files say of themselves: versions, requirements, licences, workflows."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import gradclip
from tests.support.docs import PAGES, ROOT

WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
INSTALLING = PAGES["docs/installing.md"]


def required_by(name: str) -> set[str]:
    """Return the names of what a package needs without its extras, on this platform."""
    try:
        needed = map(Requirement, requires(name) or ())
    except PackageNotFoundError:
        return set()
    here = {"extra": ""}
    return {
        requirement.name.lower().replace("_", "-")
        for requirement in needed
        if requirement.marker is None or requirement.marker.evaluate(here)
    }


def test_the_version_is_the_same_everywhere():
    """In the package, for those who cite it, and on top of the changelog."""
    citation = (ROOT / "CITATION.cff").read_text()
    [newest, *_] = re.findall(r"^## \[(.+)\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [gradclip.__version__]
    assert newest == gradclip.__version__


def test_the_requirements_are_torch_and_tensorboard():
    assert required_by("gradclip") == {"torch", "tensorboard"}


def test_the_licence_of_everything_that_is_installed_is_listed():
    needed, missing = {"torch", "tensorboard"}, set()
    while needed:
        name = needed.pop()
        if name.startswith("nvidia-") or name in missing:
            continue
        missing.add(name)
        needed |= required_by(name)
    listed = set(re.findall(r"\| ([a-z][a-z0-9-]+)", INSTALLING.partition("## Licences")[2]))
    assert missing - listed == set()


def test_every_extra_is_described():
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    names = set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))
    developers = {"dev", "docs", "integrations", "release"}
    assert set(re.findall(r"`gradclip\[(\w+)\]`", INSTALLING)) == names - developers


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_few_rights_and_pinned_actions(workflow):
    """`zizmor` and `actionlint` look at more."""
    text = workflow.read_text()
    assert "\npermissions: {}\n" in text
    used = re.findall(r"uses: (.+)", text)
    assert used
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+|\./\.github/workflows/.+", action)


def test_makefile_targets_that_workflows_call_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for workflow in WORKFLOWS:
        for called in re.findall(r"run: make (.+)", workflow.read_text()):
            assert {*called.split()} <= {*targets}


def test_the_library_knows_neither_torch_nor_python():
    """Therefore it is tied to no version of them. An extension of torch's knows both."""
    library = Path(gradclip.__file__).with_name("engines") / "native/_native.so"
    if not library.exists():
        pytest.skip("the native engine was not built")
    known = re.compile(rb"libtorch|libc10|libpython|\0_?Py[A-Z_]\w*\0")
    assert known.findall(library.read_bytes()) == []
    assert len(known.findall(Path(torch._C.__file__).read_bytes())) > 1


@pytest.mark.parametrize("target", ["demo", "test", "bench"])
def test_make_makes_a_venv_with_the_versions_of_the_constraints(target, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "--dry-run", f"PYTHON={sys.executable}", target]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    made = done.stdout.index(f"{sys.executable} -m venv .venv")
    installed = done.stdout.index("-m pip install --quiet --constraint constraints.txt --editable")
    assert 0 <= made < installed

"""The snippets of README and docs/ run, and the evidence that they name for claims exists."""

import ast
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import gradclip
from tests.support.docs import (
    CODE,
    EVIDENCE,
    FRAMEWORKS,
    HEADING,
    PAGES,
    PROSE,
    ROOT,
    SNIPPETS,
    commands_in,
    sections_of,
)

PLAIN = [code for code in SNIPPETS if not FRAMEWORKS.search(code)]


@contextmanager
def alone_in_a_group():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("snippet", PLAIN, ids=lambda code: code.split("\n")[0])
def test_the_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = nn.Sequential(OrderedDict(body=nn.Linear(3, 2), head=nn.Linear(2, 1)))
    stage = nn.ModuleDict({"embed": nn.Embedding(3, 2)})
    across_ranks = "ranks=" in snippet
    names = {
        "stage": stage,
        "gradclip": gradclip,
        "GradientClipper": gradclip.GradientClipper,
        "model": model,
        "optimizer": torch.optim.SGD((stage if across_ranks else model).parameters(), lr=0.1),
        "data": [torch.ones(2, 3)] * 3,
        "loss": lambda model, batch: model(batch).sum(),
    }
    with alone_in_a_group() if across_ranks else nullcontext():
        exec(snippet, names)
    if "clipper" in names:
        names["clipper"].close()
    if snippet == PLAIN[0]:
        assert list((tmp_path / "runs/a").iterdir())


def test_the_options_are_those_of_the_clipper():
    [options, *_] = CODE.findall(PAGES["docs/rules.md"])
    shown = set(re.findall(r"^    (\w+)=", options, flags=re.MULTILINE))
    assert shown <= set(inspect.signature(gradclip.GradientClipper).parameters)


@cache
def names_of_tests(path: Path) -> list[str]:
    """Return the names of the tests in a file or a folder, as pytest collects them."""
    files = path.rglob("test_*.py") if path.is_dir() else [path]
    trees = [ast.parse(file.read_text()) for file in files if file.name.startswith("test_")]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if node.name.startswith("test_")]


def missing_part(pointer: str) -> str | None:
    """Return the part of a command that does not exist; None if all of it does."""
    words = shlex.split(pointer)
    if words[0].startswith("tests"):
        words = ["python", "-m", "pytest", *words]
    while "=" in words[0]:
        del words[0]
    match words:
        case ["python", "-m", "pytest", path, *options]:
            names = names_of_tests(ROOT / path) if (ROOT / path).exists() else []
            match options:
                case [] if names:
                    return None
                case ["-k", word] if any(word in name for name in names):
                    return None
            return f"test in {path}"
        case ["python", "-m", module, *_]:
            file = ROOT / f"{module.replace('.', '/')}.py"
            return None if file.exists() and "__main__" in file.read_text() else f"module {module}"
        case ["make", target]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return None if target in targets else f"target {target}"
        case ["python", script, *_] | [script]:
            return None if (ROOT / script).is_file() else f"script {script}"
    return "command"


@pytest.mark.parametrize("command", sorted({*commands_in("\n".join(PROSE.values()))}))
def test_a_command_for_a_claim_exists(command):
    assert missing_part(command) is None


def test_a_wrong_command_is_found():
    for options in ("-k nothing_of_the_kind", "-m snippets"):
        assert missing_part(f"tests/docs/test_readme.py {options}")
    for wrong in ("tests/conftest.py", "python -m benchmarks.common.shapes", "make no", ".ci/no"):
        assert missing_part(wrong)


@pytest.mark.parametrize("page", PROSE)
def test_every_section_and_bullet_has_evidence(page):
    """A promise without a test is a defect of the page."""
    sections = sections_of(re.sub(r"^# .*$", "", PROSE[page], flags=re.MULTILINE))
    assert [n for n, text in sections.items() if text.strip() and not commands_in(text)] == []
    bullets = re.findall(r"^- .*(?:\n  .*)*", PROSE[page], flags=re.MULTILINE)
    assert [bullet for bullet in bullets if not commands_in(bullet)] == []
    # A comment in another spelling would be checked by nobody.
    assert PROSE[page].count("<!--") == len(EVIDENCE.findall(PROSE[page]))


@pytest.mark.parametrize("page", PROSE)
def test_links_lead_somewhere(page):
    headings = [re.sub(r"[^\w -]", "", name).lower() for name in HEADING.findall(PROSE[page])]
    anchors = {name.replace(" ", "-") for name in headings}
    for link in re.findall(r"\]\(([^)]+)\)", PROSE[page]):
        if link.startswith("#"):
            assert link[1:] in anchors
        elif not link.startswith("https://"):
            assert (ROOT / page).parent.joinpath(link).is_file(), link


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


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


def test_the_oldest_versions_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    [torch_version] = re.findall(r'"torch>=([\d.]+)"', text)
    [python_version] = re.findall(r'^requires-python = ">=([\d.]+)"', text, re.MULTILINE)
    section = " ".join(sections_of(PROSE["README.md"])["Versions"].split())
    assert f"from torch {torch_version} and Python {python_version} on" in section
    [tested] = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"with torch {tested} on" in section

"""Each promise of the docs and of public docstrings names evidence that exists."""

import re
import shlex
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.evidence import evidence_page
from tests.support.claims import EVIDENCE, all_claims, claims_in, claims_of_docstring, commands_in
from tests.support.collection import collected_by
from tests.support.docs import PROSE, ROOT, sections_of
from tests.support.public_names import documented

COMMANDS = sorted({command for claim in all_claims() for command in claim.commands})
OPTIONAL = {
    "tests/integrations": ("lightning", "transformers", "accelerate"),
    "tests/release": ("lief",),
}
"""Folders of tests that are collected only where these packages are installed."""
OBJECTS = {each.path: each for each in documented()}


def pointer_in(command: str) -> str | None:
    """Return the arguments that a command gives to pytest; None if it runs something else."""
    arguments = re.sub(r"^(\w+=\S+ )*python -m pytest ", "", command)
    return arguments if arguments.startswith("tests") else None


@cache
def names_below(path: Path) -> str:
    """Return the text of a file of tests, or of those in a folder, with their paths."""
    files = path.rglob("test_*.py") if path.is_dir() else [path]
    tests = [file for file in files if file.is_file() and file.name.startswith("test_")]
    return "\n".join(f"{file}\n{file.read_text()}" for file in tests)


def missing_part(command: str) -> str | None:
    """Return the part of a command that does not exist; None if all of it does."""
    match shlex.split(pointer_in(command) or command):
        case [path] | [path, "-k", _] if path.startswith("tests"):
            names = names_below(ROOT / path)
            words = {*re.findall(r"\w+", command.partition(" -k ")[2])} - {"and", "or", "not"}
            return None if names and all(w in names for w in words) else f"test in {path}"
        case ["python", "-m", module, *_]:
            file = ROOT / f"{module.replace('.', '/')}.py"
            return None if file.exists() and "__main__" in file.read_text() else f"module {module}"
        case ["make", target]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return None if target in targets else f"target {target}"
        case ["python", script, *_] | [script]:
            return None if (ROOT / script).is_file() else f"script {script}"
    return "command"


def promises(name: str) -> bool:
    """Return whether a docstring needs evidence.

    Each class and function does, and each method and property with more than a first line, unless
    it only refers to the method that it overrides.
    """
    _, docstring, is_member = OBJECTS[name]
    return not is_member or ("\n" in docstring and not docstring.startswith("See `"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_for_a_claim_exists(command):
    assert missing_part(command) is None


@pytest.mark.slow
def test_each_pointer_collects_tests():
    absent = tuple(path for path, names in OPTIONAL.items() if not all(map(find_spec, names)))
    pointers = {pointer for command in COMMANDS if (pointer := pointer_in(command))}
    counts = collected_by([each for each in sorted(pointers) if not each.startswith(absent)])
    assert [pointer for pointer, count in counts.items() if not count] == []


@pytest.mark.slow
def test_tests_are_counted_as_pytest_selects_them():
    """The name of the file counts for ``-k``, too: so says its help."""
    here = "tests/docs/test_claims.py"
    counts = {
        here: len([name for name in globals() if name.startswith("test_")]),
        f"{here} -k nothing_of_the_kind": 0,
        f"{here} -k 'selects_them and not claims'": 0,
        f"{here} -k 'selects_them or nothing_of_the_kind'": 1,
    }
    found = collected_by([*counts])
    assert found.pop(here) >= counts.pop(here)
    assert found == counts


def test_a_wrong_command_is_found():
    for wrong in (
        "tests/docs -k nothing_" + "such",
        "tests/nowhere",
        "tests/conftest.py",
        "tests/docs/test_claims.py -m slow",
    ):
        assert missing_part(wrong)
    for wrong in ("python -m benchmarks.common.shapes", "make no", ".ci/no"):
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


@pytest.mark.parametrize("name", [name for name in OBJECTS if promises(name)])
def test_a_public_docstring_has_evidence(name):
    docstring = OBJECTS[name].docstring
    assert commands_in(docstring)
    assert docstring.count("<!--") == len(EVIDENCE.findall(docstring))


def test_a_claim_is_the_text_before_its_comment():
    text = """One,
[two](x.md).<!-- test: a; b --><!-- test: c --> Three: <!-- test: d -->

- Four.<!-- test: e -->
- Five.

<!-- test: f -->

| g | h |
|---|---|
| i | j |
| k | l |

<!-- test: m -->
"""
    assert claims_in(text) == [
        ("One, two.", ["a", "b", "c"]),
        ("Three:", ["d"]),
        ("Four.", ["e"]),
        ("Five.", ["f"]),
        ("Table: i, k", ["m"]),
    ]


def test_a_claim_of_a_docstring_is_its_paragraph_or_its_first_sentence():
    text = "One.\n\nTwo,\nthree.\n<!-- test: a -->\n\nArgs:\n    x: Four.\n\n<!-- test: b -->"
    claims = claims_of_docstring("name", text)
    assert [(claim.text, claim.commands) for claim in claims] == [
        ("Two, three.", ["a"]),
        ("One.", ["b"]),
    ]


def test_the_page_of_evidence_has_all_claims():
    page = evidence_page(lambda path: path, "https://somewhere")
    assert len(re.findall("^- ", page, re.MULTILINE)) == len(all_claims())
    assert [claim for claim in all_claims() if f"- {claim.text}  \n" not in page] == []

"""The tests themselves: private names stay in a few places, and no helper is written twice."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PUBLIC = ("thresholds", "errors", "integrations", "cli")
"""Modules of the package that users import by name."""
PRIVATE_PLACES = ("internals", "contracts", "support")
FILES = sorted(path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py"))


def private_imports(tree: ast.AST) -> Iterator[str]:
    """Yield the private modules of the package that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            first, _, rest = name.partition(".")
            if first == "gradclip" and is_private(rest):
                yield name


def is_private(name: str) -> bool:
    room = name.partition(".")[0]
    folder = TESTS.parent / "gradclip" / room
    is_module = folder.is_dir() or folder.with_suffix(".py").exists()
    return bool(room) and is_module and room not in PUBLIC


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.split("/")[0] not in PRIVATE_PLACES]
)
def test_private_imports_stay_in_internals_and_contracts(file):
    """A test of behaviour imports what a user imports."""
    assert [*private_imports(ast.parse((TESTS / file).read_text()))] == []


def test_no_helper_is_defined_in_two_files():
    """A helper that two files use lives in support/."""
    homes = defaultdict(list)
    for file in FILES:
        for node in ast.parse((TESTS / file).read_text()).body:
            is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith(("test_", "Test")):
                homes[node.name].append(file)
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}

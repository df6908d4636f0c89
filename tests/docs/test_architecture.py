"""docs/architecture.md shows the folders of the package and what each imports."""

import ast
import re

import pytest

from tests.support.docs import PAGES, ROOT

PACKAGE = ROOT / "gradclip"
FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
FILES = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
ROWS = dict(
    re.findall(r"^\| \[`([\w.]+)`\].* \| (.+) \|$", PAGES["docs/architecture.md"], re.MULTILINE)
)
"""The cell of imports by folder, and the last cell of the table of engines by engine."""
BOX = re.compile(r'<g class="room">\s*<rect x="\d+" y="(\d+)".*?/>\s*<text [^>]*>([\w.]+)</text>')
HEIGHTS = {name: int(y) for y, name in BOX.findall((ROOT / "docs/architecture.svg").read_text())}
"""The distance of each box from the top."""


def said_imports(folder: str) -> set[str]:
    """Return the folders and modules that a folder says it imports; a test of its own checks it."""
    words = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text())) or ""
    [said] = re.findall(r"^Imports: ((?:.|\n)*?)[.;]", words, re.MULTILINE)
    return {*re.findall(r"\w+", said)}


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_the_table_has_the_said_imports_each_folder(folder):
    assert {*ROWS[folder].split(", ")} == said_imports(folder)


def test_the_table_and_the_picture_have_every_folder():
    engines = {path.parent.name for path in (PACKAGE / "engines").glob("*/__init__.py")}
    assert {*ROWS} == FOLDERS | {"clipper.py"} | engines | {"reference"}
    assert {*HEIGHTS} == FOLDERS | FILES


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_the_picture_has_what_a_folder_imports_on_lower_floors(folder):
    for imported in said_imports(folder):
        box = imported if imported in HEIGHTS else f"{imported}.py"
        assert HEIGHTS[box] > HEIGHTS[folder]

"""The rooms of the package: floors, circles, interfaces, and what each room says of itself."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import gradclip

PACKAGE = Path(gradclip.__file__).parent
FLOORS = "errors checks engines thresholds scopes ranks records gradients optimizers functional "
FLOORS = (FLOORS + "clipper integrations report view cli").split()
"""The rooms from below: each imports those before it alone."""
LOWER = {"report": {"errors", "records"}, "view": {"errors", "report"}}
"""Rooms that import less than what lies below them: a report and its page need no torch."""
DOORS = {
    ("records.sinks.memory", "report"),
    ("view.show", "clipper"),
    ("view.show", "records"),
}
"""Other imports, made when a function is called: `MemorySink.plot` draws what a report draws, and
`show` knows the objects that it was given, whose modules are imported then."""
ENTRIES = {*FLOORS, "__init__", "__main__", "py"}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


class Import(NamedTuple):
    """A module of the package, and what one of its statements imports from the package."""

    importer: str
    imported: str
    """A module, or the package of a room for names that its ``__init__`` defines."""


def module_name(path: Path) -> str:
    """Return the dotted name below the package; a room's ``__init__`` has that of the room."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Yield what runs; statements for type checkers alone tie nothing together."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from relative_imports(node)


def imports_of(path: Path) -> Iterator[Import]:
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in relative_imports(ast.parse(path.read_text())):
        start = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        for alias in node.names:
            parts = [*filter(None, [*start, alias.name])]
            file = PACKAGE.joinpath(*parts)
            is_name = not (file.with_suffix(".py").exists() or (file / "__init__.py").exists())
            yield Import(module_name(path), ".".join(parts[: len(parts) - is_name]))


IMPORTS = [each for path in sorted(PACKAGE.rglob("*.py")) for each in imports_of(path)]


def room_of(module: str) -> str:
    return module.split(".")[0]


ACROSS = [
    each
    for each in IMPORTS
    if {*each}.isdisjoint(("", "__main__")) and room_of(each.importer) != room_of(each.imported)
]
"""Those from one room into another; ``__init__`` offers names of all rooms."""


def test_the_package_has_these_entries_alone():
    found = {path.name.split(".")[0] for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert found <= ENTRIES


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_rooms_below_it_alone(room):
    below = LOWER.get(room, {*FLOORS[: FLOORS.index(room)]})
    imported = {(i, room_of(imported)) for i, imported in ACROSS if room_of(i) == room}
    assert {(i, lower) for i, lower in imported - DOORS if lower not in below} == set()


def test_no_modules_import_each_other_in_a_circle():
    tied = defaultdict(set)
    for importer, imported in IMPORTS:
        if (importer, room_of(imported)) not in DOORS and importer != imported:
            tied[importer].add(imported)
    TopologicalSorter(tied).prepare()  # raises a CycleError that shows the circle


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_offers_who_calls_it_and_what_it_imports(room):
    offered = {*getattr(__import__(f"gradclip.{room}", fromlist=["__all__"]), "__all__", ())}
    modules = {each.imported for each in ACROSS if room_of(each.imported) == room} - {room}
    asked = {module.split(".")[1] for module in modules}
    assert asked <= offered
    assert not any(name.startswith("_") for name in asked)
    words = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    [said_callers] = re.findall(r"^Called by: ((?:.|\n)*?)\.$", words, re.M)
    [said_imports] = re.findall(r"^Imports: ((?:.|\n)*?)\.$", words, re.M)
    callers = {room_of(each.importer) for each in ACROSS if room_of(each.imported) == room}
    imported = {room_of(each.imported) for each in ACROSS if room_of(each.importer) == room}
    assert {*re.findall(r"\w+", said_callers)} & {*FLOORS} == callers
    assert {*re.findall(r"\w+", said_imports)} & {*FLOORS} == imported

"""The public names of the package and their docstrings, read without importing any of it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "gradclip"
MODULES = ("", "thresholds", "integrations.lightning", "integrations.transformers")
"""Modules whose ``__all__`` users import from; a name of two of them is that of the first."""
Definition = ast.ClassDef | ast.FunctionDef


class Documented(NamedTuple):
    """A public object, or a public member of one."""

    path: str
    """As a user writes it, such as ``gradclip.GradientClipper.step``."""
    docstring: str
    is_member: bool


@cache
def tree_of(module: str) -> ast.Module:
    """Return the syntax tree of a module, by its name below the package."""
    file = PACKAGE.joinpath(*filter(None, module.split(".")))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    return ast.parse(file.read_text())


def exported(module: str) -> list[str]:
    """Return ``__all__`` without the version and modules."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
            return [name for name in names if name not in ("__version__", "thresholds")]
    raise AssertionError(f"{module} has no __all__")


def definition_of(name: str, module: str) -> Definition:
    """Return the class or function behind a name, following imports."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, Definition) and node.name == name:
            return node
    package = module.split(".") if (PACKAGE / module.replace(".", "/")).is_dir() else []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            parts = [*package[: len(package) + 1 - node.level], *(node.module or "").split(".")]
            return definition_of(name, ".".join(filter(None, parts)))
    raise AssertionError(f"{name} is nowhere in gradclip.{module}")


def public_paths() -> dict[str, str]:
    """Return the module of each public class and function by its path."""
    paths, known = {}, set()
    for module in MODULES:
        for name in exported(module):
            if module.startswith("integrations") or name not in known:
                paths[".".join(filter(None, ("gradclip", module, name)))] = module
                known.add(name)
    return paths


def documented() -> Iterator[Documented]:
    """Yield the public classes and functions, and the public methods and properties of classes."""
    for path, module in public_paths().items():
        node = definition_of(path.rpartition(".")[2], module)
        yield Documented(path, ast.get_docstring(node) or "", is_member=False)
        methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
        for method in methods if isinstance(node, ast.ClassDef) else ():
            is_setter = any(".setter" in ast.unparse(each) for each in method.decorator_list)
            if not (method.name.startswith("_") or is_setter):
                docstring = ast.get_docstring(method) or ""
                yield Documented(f"{path}.{method.name}", docstring, is_member=True)

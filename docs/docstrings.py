"""Docstrings as the site shows them: an extension of Griffe, which reads them for mkdocstrings.

The evidence behind claims is left out, and a public name in single backquotes becomes a link.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EVIDENCE = re.compile(r"\s*<!-- test: .+? -->", re.DOTALL)
REFERENCE = re.compile(r"(?<![`\w\[])`([A-Za-z_][\w.]*)`(?!`)")


class Docstrings(griffe.Extension):
    """Rewrites the docstring of each object once the package is read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all docstrings of the package."""
        del kwargs
        public = {name: f"{pkg.name}.{name}" for name in exported(pkg)}
        thresholds = pkg["thresholds"]
        public |= {name: f"{thresholds.path}.{name}" for name in exported(thresholds)}
        public["Threshold"] = f"{pkg.name}.Threshold"
        rewrite(pkg, public)


def exported(module: griffe.Module) -> list[str]:
    """Return the names of classes and functions in ``__all__``."""
    names = [str(name) for name in module.exports or ()]
    return [name for name in names if not name.startswith("_") and name != "thresholds"]


def rewrite(parent: griffe.Module | griffe.Class, public: dict[str, str]) -> None:
    """Rewrite the docstrings of an object and of its members."""
    for member in parent.members.values():
        if member.is_alias:
            continue
        if member.docstring is not None:
            member.docstring.value = shown(member.docstring.value, member, public)
        if isinstance(member, griffe.Module | griffe.Class):
            rewrite(member, public)


def shown(text: str, member: griffe.Object, public: dict[str, str]) -> str:
    """Return a docstring without evidence and with links."""
    owner = next((each for each in (member, member.parent) if each and each.is_class), None)

    def linked(reference: re.Match[str]) -> str:
        name = reference[1]
        target = name.removeprefix("gradclip.").removeprefix("thresholds.")
        if owner is not None and name in owner.members:
            target = inherited(owner.members[name]) or f"{owner.name}.{name}"
        first, dot, rest = target.partition(".")
        is_itself = member.name in (name, first) and not rest
        if first in public and not is_itself:
            return f"[`{name}`][{public[first]}{dot}{rest}]"
        return reference[0]

    return REFERENCE.sub(linked, EVIDENCE.sub("", text))


def inherited(member: griffe.Object | griffe.Alias) -> str | None:
    """Return the method that a docstring refers to, as "See `Sink.write`" does."""
    text = member.docstring.value if member.docstring else ""
    reference = re.match(r"See `([\w.]+)`|See \[`([\w.]+)`\]", text)
    return reference and (reference[1] or reference[2])

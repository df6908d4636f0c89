"""The page's files: its modules joined to one script, and its style sheet."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parent / "page"
MODULES = [
    *("arrays", "source", "scales", "elements", "styles", "runs", "chart", "curves"),
    *("heat_map", "distribution", "advice", "incidents", "run_table", "number_table", "page"),
]
"""The modules of the page; each imports those before it alone."""
OFFERED = ("show", "showEmbedded", "ServedSource")
"""What the joined script exports."""
_IMPORT = re.compile(r'^import (\{.+?\}) from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?function\*? |class |const )(\w+)", re.MULTILINE)


@cache
def script() -> str:
    """Return the page's modules as one ES module that imports nothing.

    Each module becomes a function that is called at once and returns what it exports.
    """
    offers: dict[str, str] = {}
    parts = []
    for module in MODULES:
        source = _IMPORT.sub(r"const \1 = $\2;", (PAGE / f"{module}.js").read_text("utf-8"))
        names = [match[2] for match in _EXPORT.finditer(source)]
        offers.update(dict.fromkeys(names, module))
        body = _EXPORT.sub(r"\1\2", source)
        parts.append(
            f"const ${module} = (() => {{\n{body}\nreturn {{ {', '.join(names)} }};\n}})();"
        )
    exports = [f"export const {name} = ${offers[name]}.{name};" for name in OFFERED]
    return "\n".join([*parts, *exports, ""])


@cache
def style() -> str:
    """Return the page's style sheet."""
    return (PAGE / "page.css").read_text("utf-8")

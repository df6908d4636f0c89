"""README and docs/: the pages, their snippets and their prose."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
"""The text of each page by its path."""
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = [code for text in PAGES.values() for code in CODE.findall(text)]
FRAMEWORKS = re.compile("lightning|transformers|accelerate|wandb")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
PROSE = {path: FENCE.sub("", text) for path, text in PAGES.items()}
HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
"""A name whose docstring is shown at this place of a page."""


def sections_of(text: str) -> dict[str, str]:
    """Return the text below each heading, up to the next one."""
    first, *rest = HEADING.split(text)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}


def anchor_of(heading: str) -> str:
    """Return the fragment of an address that leads to a heading on GitHub."""
    return re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")


def anchors_of(page: str) -> set[str]:
    """Return all fragments that lead somewhere in a page: headings and names of the API."""
    headings = {anchor_of(heading) for heading in HEADING.findall(PROSE[page])}
    return headings | {*DIRECTIVE.findall(PROSE[page])}


def run_example(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run an example; return its output. It ends well and without a warning."""
    cleaning_up = "ignore:Implicitly cleaning up:ResourceWarning"
    command = [sys.executable, "-W", "error", "-W", cleaning_up, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout

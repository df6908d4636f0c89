"""The README: its snippets, its prose, and the tests and commands that it names for its claims."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
FRAMEWORKS = re.compile("lightning|transformers|accelerate")
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)
BRACKETS = re.compile(r"\[(`[^`]*`(?:,\s+`[^`]*`)*)\](?!\()")


def pointers_in(text: str) -> list[str]:
    """Return the tests and commands in square brackets."""
    return [code for codes in BRACKETS.findall(text) for code in re.findall("`([^`]*)`", codes)]


def sections_of(text: str) -> dict[str, str]:
    """Return the text below each heading, up to the next one."""
    first, *rest = HEADING.split(text)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}

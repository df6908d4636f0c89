"""README and docs/: their snippets, their prose, and the commands that show their claims."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
"""The text of each page by its path."""
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SNIPPETS = [code for text in PAGES.values() for code in CODE.findall(text)]
FRAMEWORKS = re.compile("lightning|transformers|accelerate|wandb")
PROSE = {
    path: re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for path, text in PAGES.items()
}
HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)
EVIDENCE = re.compile(r"<!-- test: (.+?) -->", re.DOTALL)
"""The comment behind a claim, which names the tests and commands that show it."""


def run_example(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run an example; return its output. It ends well and without a warning."""
    cleaning_up = "ignore:Implicitly cleaning up:ResourceWarning"
    command = [sys.executable, "-W", "error", "-W", cleaning_up, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def commands_in(text: str) -> list[str]:
    """Return the tests and commands that show the claims of a text."""
    return [
        " ".join(command.split())
        for commands in EVIDENCE.findall(text)
        for command in commands.split(";")
    ]


def sections_of(text: str) -> dict[str, str]:
    """Return the text below each heading, up to the next one."""
    first, *rest = HEADING.split(text)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}


def claims_in(text: str) -> list[tuple[str, list[str]]]:
    """Return each claim of a text, without links and line breaks, with what shows it."""
    claims = []
    for block in re.split(r"\n\s*\n|^#.*\n|^(?=- )", text, flags=re.MULTILINE):
        spoken = ""
        for part in re.split(r"(<!-- test: .+? -->)", block, flags=re.DOTALL):
            if commands := commands_in(part):
                if claim := re.sub(r"^\W*[.,;:]\s+|^- ", "", spoken).strip():
                    claims.append((claim, commands))
                else:  # more of what shows the claim before
                    claims[-1][1].extend(commands)
                spoken = ""
            else:
                spoken += re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", " ".join(part.split()))
    return claims


def evidence_page() -> str:
    """Return the page that lists the claims of README and docs/ with the tests that show them."""
    tables = []
    for path, text in PROSE.items():
        rows = [
            f"| {claim.replace('|', chr(92) + '|')} | {'<br>'.join(f'`{c}`' for c in commands)} |"
            for claim, commands in claims_in(text)
        ]
        if rows:
            tables.append(
                "\n".join([f"## {path}", "", "| claim | shown by |", "| --- | --- |", *rows])
            )
    return "# Evidence\n\n" + "\n\n".join(tables) + "\n"

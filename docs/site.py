"""The source of the site, in build/docs: the pages of docs/ and some from outside.

``make site`` writes it. The README is the first page of the site; the changelog, the results of
benchmarks and the evidence are pages as well. A link to another file of the repository leads to its
place on GitHub.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

from docs.evidence import evidence_page
from tests.support.claims import EVIDENCE

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build/docs"
REPOSITORY = "https://github.com/gradclip/gradclip/blob/main"
KINDS = {".md", ".png", ".svg", ".css"}
FOLDERS = {"docs": ".", "benchmarks/results": "results"}
"""The places of folders in the site."""
BADGE = re.compile(r"^\[!\[.+\]\(https://.+\n", re.MULTILINE)
"""A picture that a browser would fetch from elsewhere."""
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def places() -> dict[str, str]:
    """Return the place in the site of each page and picture, by its path in the repository."""
    found = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
    for folder, place in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in KINDS:
                below = path.relative_to(ROOT / folder).as_posix()
                found[path.relative_to(ROOT).as_posix()] = posixpath.normpath(f"{place}/{below}")
    return found


def rendered(source: str, place: str, where: dict[str, str]) -> str:
    """Return a page without evidence and badges, its links leading to where their targets are."""

    def followed(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        address = f"{REPOSITORY}/{path}"
        if path in where:
            address = posixpath.relpath(where[path], posixpath.dirname(place) or ".")
        return f"]({address}{link[2] or ''})"

    shown = BADGE.sub("", EVIDENCE.sub("", (ROOT / source).read_text()))
    return LINK.sub(followed, shown)


def main() -> None:
    """Write all pages and pictures anew."""
    shutil.rmtree(SITE, ignore_errors=True)
    where = places()
    for source, place in where.items():
        SITE.joinpath(place).parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".md"):
            SITE.joinpath(place).write_text(rendered(source, place, where))
        else:
            shutil.copy(ROOT / source, SITE / place)
    SITE.joinpath("evidence.md").write_text(evidence_page(where.__getitem__, REPOSITORY))


if __name__ == "__main__":
    main()

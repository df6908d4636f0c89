"""Links of the pages and of the other texts lead to files and headings that exist."""

import re

import pytest

from tests.support.docs import FENCE, PAGES, PROSE, ROOT, anchors_of

OTHERS = {
    name: FENCE.sub("", (ROOT / name).read_text())
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
}
TEXTS = {**PROSE, **OTHERS}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = (ROOT / page).parent.joinpath(file) if file else ROOT / page
            assert target.is_file(), link
            path = target.resolve().relative_to(ROOT).as_posix()
            assert not anchor or path not in PAGES or anchor in anchors_of(path), link

"""Links of README and docs/ lead to files and headings that exist."""

import re

import pytest

from tests.support.docs import PAGES, PROSE, ROOT, anchors_of


@pytest.mark.parametrize("page", PROSE)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", PROSE[page]):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = (ROOT / page).parent.joinpath(file) if file else ROOT / page
            assert target.is_file(), link
            path = target.resolve().relative_to(ROOT).as_posix()
            assert not anchor or path not in PAGES or anchor in anchors_of(path), link

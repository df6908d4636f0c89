"""The site: every page is in its navigation, and every public name on one page of the API."""

import re
from collections import Counter

import pytest

from docs.site import places, rendered
from gradclip.cli import main
from tests.support.docs import DIRECTIVE, PAGES, ROOT
from tests.support.public_names import public_paths

CONFIGURATION = (ROOT / "zensical.toml").read_text()
API = {path: text for path, text in PAGES.items() if path.startswith("docs/api/")}
COMMAND_LINE = API["docs/api/command_line.md"]


def test_every_page_is_in_the_navigation_once():
    navigation = CONFIGURATION.partition("\nnav = [")[2].partition("\n]\n")[0]
    shown = Counter(re.findall(r'"([\w/]+\.md)"', navigation))
    pages = {place for place in places().values() if place.endswith(".md")}
    assert shown == Counter({*pages, "evidence.md"})


def test_every_public_name_is_on_one_page_of_the_api():
    shown = Counter(name for text in API.values() for name in DIRECTIVE.findall(text))
    assert shown == Counter([*public_paths()])


def test_every_public_name_is_in_the_table_of_the_api():
    links = re.findall(
        r"^\| \[`([\w.]+)`\]\((.+)#([^)]+)\) \|", API["docs/api/index.md"], re.MULTILINE
    )
    assert sorted(anchor for _, _, anchor in links) == sorted(public_paths())
    for name, page, anchor in links:
        assert anchor.endswith(name)
        assert f"\n::: {anchor}\n" in API[f"docs/api/{page}"]


@pytest.mark.parametrize("command", ["report", "demo"])
def test_the_command_line_is_described(command, capsys):
    assert main([command, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    section = COMMAND_LINE.partition(f"\n## gradclip {command}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(.+)` \| (.+) \|$", section, re.MULTILINE)
    for argument, meaning in rows:
        assert f" {argument} {meaning}" in printed
    named = {argument.split()[0] for argument, _ in rows}
    assert named == {*re.findall(r"--[\w-]+", printed)} - {"--help"} | named & {"RUN"}


@pytest.mark.parametrize("link", re.findall(r'extra_css = \["(.+)"\]', CONFIGURATION))
def test_the_style_is_there(link):
    assert link in places().values()


def test_no_picture_is_fetched_from_elsewhere():
    where = places()
    pages = [rendered(*page, where) for page in where.items() if page[0].endswith(".md")]
    assert [page for page in pages if re.search(r"!\[[^]]*\]\(http|<img", page)] == []


def test_the_site_is_built_strictly():
    """A name or a link that leads nowhere fails the build."""
    recipe = (ROOT / "Makefile").read_text().partition("\nsite:")[2].partition("\n\n")[0]
    assert "zensical build --clean --strict" in recipe

"""The README: its length, and the versions that it names."""

import re

from tests.support.docs import PAGES, PROSE, ROOT, sections_of


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_the_oldest_versions_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    [torch_version] = re.findall(r'"torch>=([\d.]+)"', text)
    [python_version] = re.findall(r'^requires-python = ">=([\d.]+)"', text, re.MULTILINE)
    section = " ".join(sections_of(PROSE["README.md"])["Versions"].split())
    assert f"from torch {torch_version} and Python {python_version} on" in section
    [tested] = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"with torch {tested} on" in section

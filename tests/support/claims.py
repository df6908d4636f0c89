"""Claims of README, docs/ and public docstrings, with the tests and commands that show them."""

import re
from functools import cache
from typing import NamedTuple

from tests.support.docs import FENCE, HEADING, PAGES, PROSE
from tests.support.public_names import documented

EVIDENCE = re.compile(r"<!-- test: (.+?) -->", re.DOTALL)
"""The comment behind a claim, which names the tests and commands that show it."""
SUBJECT = re.compile(r"^```\w*\n(.+)\n```\n+(?=[a-z])", re.MULTILINE)
"""A line of code that is the subject of the sentence below it."""
BLOCK = re.compile(r"\n\s*\n|^(?=- |\d+\. )", re.MULTILINE)
SECTION = re.compile(r"^(Args|Returns|Raises|Warns|Examples):\n", re.MULTILINE)


class Claim(NamedTuple):
    """A sentence or a table of a page, or a part of a docstring."""

    place: str
    """The path of the page, or the name of the object."""
    section: str
    """The heading above it; empty at the top of a page and in docstrings."""
    text: str
    commands: list[str]


def split_commands(evidence: str) -> list[str]:
    """Return the commands that a comment names."""
    return [" ".join(command.split()) for command in evidence.split(";")]


def commands_in(text: str) -> list[str]:
    """Return the tests and commands that show the claims of a text."""
    return [command for evidence in EVIDENCE.findall(text) for command in split_commands(evidence)]


def spoken(text: str) -> str:
    """Return a claim on one line, without links and without its link to the claim before."""
    if text.lstrip().startswith("|"):
        text = table_or_row(text.strip())
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
    return re.sub(r"^(-|\d+\.) |^\W*[.,;:]\s+", "", text).strip()


def table_or_row(text: str) -> str:
    """Return the first column of a whole table, or the cells of the row at the end."""
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in text.split("\n")]
    if text.endswith("|"):
        return "Table: " + ", ".join(row[0].strip() for row in rows[2:])
    return ", ".join(filter(None, map(str.strip, rows[-1])))


def claims_in(text: str) -> list[tuple[str, list[str]]]:
    """Return each claim of a section with its commands.

    A claim is the text before a comment, back to the comment before it or to the beginning of the
    block. A comment that begins a block belongs to the block before.
    """
    claims: list[tuple[str, list[str]]] = []
    rest = ""
    for block in filter(str.strip, BLOCK.split(text)):
        *shown, last = EVIDENCE.split(block)
        for words, evidence in zip(shown[::2], shown[1::2], strict=True):
            if claim := spoken(words) or spoken(rest):
                claims.append((claim, split_commands(evidence)))
            else:
                claims[-1][1].extend(split_commands(evidence))
            rest = ""
        rest = last
    return claims


def claims_of_page(path: str) -> list[Claim]:
    """Return the claims of a page by its path."""
    text = FENCE.sub("", SUBJECT.sub(r"`\1` ", PAGES[path]))
    first, *rest = HEADING.split(re.sub(r"^# .*$", "", text, flags=re.MULTILINE))
    sections = [("", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [Claim(path, name, *claim) for name, text in sections for claim in claims_in(text)]


def claims_of_docstring(path: str, docstring: str) -> list[Claim]:
    """Return the claims of a public object: paragraphs with a comment behind them.

    A comment that is a paragraph of its own is for the first sentence.
    """
    paragraphs = SECTION.sub("", docstring).split("\n\n")
    summary = spoken(EVIDENCE.sub("", paragraphs[0]))
    return [
        Claim(path, "", spoken(EVIDENCE.sub("", paragraph)) or summary, commands)
        for paragraph in paragraphs
        if (commands := commands_in(paragraph))
    ]


@cache
def all_claims() -> tuple[Claim, ...]:
    """Return all claims of the pages, then those of docstrings."""
    pages = [claim for path in PROSE for claim in claims_of_page(path)]
    names = [c for each in documented() for c in claims_of_docstring(each.path, each.docstring)]
    return (*pages, *names)

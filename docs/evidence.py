"""The page of the site that lists the claims of the docs with the tests that show them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from itertools import groupby

from tests.support.claims import Claim, all_claims
from tests.support.docs import DIRECTIVE, PAGES, ROOT

BEGINNING = """---
search:
  exclude: true
---

# Evidence

Each promise of the docs has a test or a command that shows it. These are all of them, by page. A
command such as `tests/behaviour/numerics -k bits` runs with `python -m pytest` before it, in a
checkout of the repository.
"""
"""The site's search leaves the page out: it would repeat each sentence that another page has."""


def evidence_page(address_in_site: Callable[[str], str], repository: str) -> str:
    """Return the page.

    Args:
        address_in_site: Gives the address of a page in the site by its path in the repository.
        repository: Address of the files of the repository.
    """
    shown_on = {name: path for path, text in PAGES.items() for name in DIRECTIVE.findall(text)}
    lines = [BEGINNING]
    for place, claims in groupby(all_claims(), lambda claim: claim.place):
        if place in PAGES:
            [title] = re.findall(r"^# (.+)$", PAGES[place], re.MULTILINE)
            address = address_in_site(place)
        else:
            owner = next(name for name in shown_on if f"{place}.".startswith(f"{name}."))
            address = f"{address_in_site(shown_on[owner])}#{owner}"
            title = f"`{place}`"
        lines.append(f"\n## [{title}]({address})\n")
        for section, members in groupby(claims, lambda claim: claim.section):
            if section:
                lines.append(f"\n### [{section}]({address}#{anchor(section)})\n")
            lines += [line_of(claim, repository) for claim in members]
    return "\n".join(lines) + "\n"


def anchor(heading: str) -> str:
    """Return the identifier that the site gives to a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def line_of(claim: Claim, repository: str) -> str:
    """Return a claim and its commands as an item of a list."""
    commands = " · ".join(linked(command, repository) for command in claim.commands)
    return f"- {claim.text}  \n  {commands}"


def linked(command: str, repository: str) -> str:
    """Return a command, with a link to the file that it runs."""
    files = [word for word in shlex.split(command) if (ROOT / word).exists()]
    return f"[`{command}`]({repository}/{files[0]})" if files else f"`{command}`"

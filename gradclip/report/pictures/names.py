"""Names that fit into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

ELLIPSIS = "…"


def short_names(names: Sequence[str], most: int, mark: str) -> list[str]:
    """Return names of limited length, which differ where the names do.

    What all begin with is left out first, up to a mark; then the middle or one end of long ones.

    Args:
        names: At least one.
        most: Characters of each, at least 10.
        mark: What divides names into parts, a dot or slash.
    """
    if max(map(len, names)) <= most:
        return [*names]
    distinct = len({*names})
    begin = _common_begin(names, mark) if distinct > 1 else 0
    rest = [ELLIPSIS * bool(begin) + name[begin:] for name in names]
    for head in (most // 2, 0, most // 4, most - 1):
        short = [_shortened(name, most, head) for name in rest]
        if len({*short}) == distinct:
            return short
    numbers = {name: f"{place}: " for place, name in enumerate(dict.fromkeys(names), 1)}
    return [numbers[name] + _shortened(name, most - len(numbers[name]), 0) for name in names]


def _common_begin(names: Sequence[str], mark: str) -> int:
    """Return how many characters all begin with, up to the last mark among them."""
    low, high = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low.rfind(mark, 0, same) + 1


def _shortened(name: str, most: int, head: int) -> str:
    """Return a name with so many characters of its head and as many of its end as there is room."""
    if len(name) <= most:
        return name
    tail = most - len(ELLIPSIS) - head
    return name[:head] + ELLIPSIS + (name[-tail:] if tail else "")


def drawable(text: str) -> str:
    """Return a text in which what the picture's font lacks is written as Python would.

    That is line breaks and other control characters, too.
    """
    known = _known_characters()
    return "".join(
        each if ord(each) in known else each.encode("unicode_escape").decode() for each in text
    )


@cache
def _known_characters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    characters = get_font(findfont("DejaVu Sans")).get_charmap()
    return frozenset(code for code in characters if chr(code).isprintable())

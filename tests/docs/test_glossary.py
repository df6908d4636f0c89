"""The glossary of docs/concepts.md: words that the pages use, in order, one sentence each."""

import re

from tests.support.docs import PAGES, PROSE, ROOT, sections_of

ROWS = re.findall(
    r"^\| \*\*(.+)\*\* \| (.+) \|$",
    sections_of(PROSE["docs/concepts.md"])["Glossary"],
    re.MULTILINE,
)


def test_the_words_are_in_order():
    words = [word for word, _ in ROWS]
    assert len(words) > 30
    assert words == sorted(set(words), key=lambda word: word.replace("-", " "))


def test_each_word_has_one_sentence():
    assert [word for word, meaning in ROWS if not re.fullmatch(r"[A-Z].*\.", meaning)] == []
    assert [word for word, meaning in ROWS if re.search(r"\. [A-Z]", meaning)] == []


def test_each_word_is_used():
    """A word that neither another page nor the package uses needs no entry."""
    others = [text for page, text in PAGES.items() if page != "docs/concepts.md"]
    modules = [path.read_text() for path in (ROOT / "gradclip").rglob("*.py")]
    text = " ".join(" ".join([*others, *modules]).split()).lower().replace("-", " ")
    assert [word for word, _ in ROWS if word.replace("-", " ") not in text] == []

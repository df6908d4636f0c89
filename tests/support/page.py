"""The interactive page in a headless Chromium: opened, asked what it draws, and used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradclip.cli import main

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

_AWAITED = """
const done = arguments[arguments.length - 1];
(async () => {{ {script} }})().then(done, (error) => done({{ failed: String(error) }}));
"""

# All at once: a page that follows a training may replace an element meanwhile.
_TEXTS = """
return [...document.querySelectorAll(arguments[0])].map(
  (element) => element.checkVisibility() ? element.innerText.trim() : "");
"""


class Page:
    """A page that a browser shows.

    Args:
        browser: The browser.
    """

    def __init__(self, browser: Chrome) -> None:
        self.browser = browser

    def awaited(self, script: str, *arguments: Any) -> Any:
        """Run an asynchronous script and return what it returns."""
        found = self.browser.execute_async_script(_AWAITED.format(script=script), *arguments)
        assert not (isinstance(found, dict) and "failed" in found), found
        return found

    def settled(self) -> None:
        """Wait until all that the page asked for is drawn."""
        self.awaited("await gradclipPage.settled()")

    def show(self, first: float, last: float) -> None:
        """Show a range of steps."""
        self.awaited(
            "gradclipPage.show(arguments[0], arguments[1]); await gradclipPage.settled()",
            first,
            last,
        )

    def drawn(self) -> dict[str, Any]:
        """Return what the page draws: its range, its curves by columns of pixels, its map."""
        self.settled()
        return self.browser.execute_script("return gradclipPage.drawn()")

    def curve(self, name: str, run: int = 0) -> dict[str, list[Any]]:
        """Return a curve of a run as it is drawn."""
        return [each for each in self.drawn()["curves"] if each["name"] == name][run]

    def all(self, selector: str) -> list[WebElement]:
        """Return the elements of a selector."""
        return self.browser.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """Return the texts of the elements of a selector, "" for those that are hidden."""
        return self.browser.execute_script(_TEXTS, selector)

    def press(self, text: str) -> None:
        """Press the first button with a text."""
        [button, *_] = [each for each in self.all("button") if each.text == text]
        button.click()
        self.settled()

    def complaints(self) -> list[str]:
        """Return the messages of the browser's console."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


def page_file(runs: Iterable[Path], folder: Path) -> Path:
    """Write the page of some logs with ``gradclip report --html``."""
    file = folder / "page.html"
    assert main(["report", *map(str, runs), "--html", str(file)]) == 0
    return file

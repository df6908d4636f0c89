"""TensorBoard's charts in a headless Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome
    from selenium.webdriver.remote.webelement import WebElement

PROGRAMS = ("chromium", "chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",  # it refuses to run as root otherwise
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
    "--window-size=1400,900",
)

# Elements are inside shadow roots; a line has a vertex for each M and L of its path. Axes end
# before the largest values unless that is turned off; the first chart gets a logarithmic axis.
_ALL = """
const all = (selector, root = document) => [...root.querySelectorAll("*")].flatMap(element => [
  ...(element.matches(selector) ? [element] : []),
  ...(element.shadowRoot ? all(selector, element.shadowRoot) : []),
]);
"""
_ENLARGED = """
const cards = all("tf-custom-scalar-multi-line-chart-card");
const card = cards.find(card => card.title === arguments[0]);
for (const button of ["[icon=fullscreen]", ".toggle-matches-button"]) {
  all(button, card.shadowRoot)[0].click();
}
return card;
"""
_CHARTS = """
const ignore = all("paper-checkbox").find(each => each.textContent.includes("Ignore outliers"));
const logarithmic = all("[title='Toggle y-axis log scale']")[0];
if (ignore?.checked && logarithmic) [ignore, logarithmic].forEach(each => each.click());
return Object.fromEntries(all("tf-custom-scalar-multi-line-chart-card").map(card => {
  const plot = all("vz-line-chart2", card.shadowRoot)[0]?._chart?.linePlot;
  const paths = plot?.content()?.node().querySelectorAll("path") ?? [];
  return [card.title, Object.fromEntries((plot?.datasets() ?? []).map((curve, index) => [
    curve.metadata().name,
    [
      curve.data().map(point => [point.step, String(point.scalar)]),
      paths[index]?.getAttribute("stroke"),
      (paths[index]?.getAttribute("d") ?? "").split(/[ML]/).length - 1,
    ],
  ]))];
}));
"""


class Curve(NamedTuple):
    """A curve of a chart, and the line that is drawn of it."""

    points: list[tuple[int, float]]
    colour: str
    vertices: int


def missing() -> str | None:
    """Return what this machine lacks and how to get it, None if it has a browser."""
    lacks = " and no ".join(name for name in PROGRAMS if shutil.which(name) is None)
    return f"there is no {lacks}: apt-get install chromium chromium-driver" if lacks else None


def open_charts(browser: Chrome, address: str) -> None:
    """Show the charts of a TensorBoard."""
    browser.get("about:blank")  # or an address that differs after the # loads nothing
    browser.get(f"{address}#custom_scalars&_smoothingWeight=0")


def charts_in(browser: Chrome) -> dict[str, dict[str, Curve]]:
    """Return the charts with all values by title, in each the curves by name."""
    return {
        title: {
            name: Curve([(step, float(value)) for step, value in points], *line)
            for name, (points, *line) in curves.items()
        }
        for title, curves in browser.execute_script(_ALL + _CHARTS).items()
    }


def enlarged(browser: Chrome, title: str) -> WebElement:
    """Enlarge a chart, open its legend, and return its element."""
    return browser.execute_script(_ALL + _ENLARGED, title)


def requests_of(browser: Chrome) -> list[str]:
    """Return the addresses that pages asked for since this was last called."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


@contextmanager
def chromium() -> Iterator[Chrome]:
    """Start the browser that the system has; download nothing."""
    # Only here: who runs the other tests need not have it.
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which(PROGRAMS[0])
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which(PROGRAMS[1])))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """A browser that the tests of a module share."""
    with chromium() as shared:
        yield shared

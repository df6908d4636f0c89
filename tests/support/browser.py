"""TensorBoard's page in a headless Chromium: what it draws, and a picture of it."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

WAIT = 60.0
PROGRAMS = ("chromium", "chromedriver")
REMEDY = "apt-get install chromium chromium-driver"
FLAGS = (
    "--headless",
    "--no-sandbox",  # it refuses to run as root otherwise
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
)

# What the scripts below know: elements inside shadow roots, and the cards with the charts.
_PRELUDE = """
const all = (selector, root = document) => [...root.querySelectorAll("*")].flatMap(element => [
  ...(element.matches(selector) ? [element] : []),
  ...(element.shadowRoot ? all(selector, element.shadowRoot) : []),
]);
const cards = () => all("tf-custom-scalar-multi-line-chart-card");
const card = title => cards().find(card => card.title === title);
const chart = card => all("vz-line-chart2", card.shadowRoot)[0]?._chart;
"""

_CURVES = """
return Object.fromEntries(cards().map(card => [card.title, Object.fromEntries(
  (chart(card)?.linePlot.datasets() ?? []).map(curve => [
    curve.metadata().name,
    curve.data().map(point => [point.step, String(point.scalar)]),
  ])
)]));
"""

_LINES = """
const plot = chart(card(arguments[0])).linePlot;
const paths = [...plot.content().node().querySelectorAll("path")];
return Object.fromEntries(plot.datasets().map((curve, index) => [
  curve.metadata().name,
  [
    paths[index]?.getAttribute("stroke"),
    (paths[index]?.getAttribute("d") ?? "").split(/[ML]/).length - 1,
  ],
]));
"""

_PLACES = """
return all("tf-card-heading, .match-list-entry, .tick-label, svg", card(arguments[0]).shadowRoot)
  .map(part => [part.textContent.trim(), JSON.stringify(part.getBoundingClientRect())]);
"""

_NEXT_FRAME = "requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()));"

_PRESS = """
const found = card(arguments[0]) && all(arguments[1], card(arguments[0]).shadowRoot)[0];
found?.click();
return Boolean(found);
"""

_EVERY_VALUE = """
const ignore = all("paper-checkbox").find(each => each.textContent.includes("Ignore outliers"));
if (ignore?.checked) ignore.click();
return ignore && !ignore.checked;
"""

BUTTONS = ("[icon=fullscreen]", "[title='Toggle y-axis log scale']", ".toggle-matches-button")
"""Buttons of a chart: enlarge it, make its axis logarithmic, open its legend."""


def missing() -> str | None:
    """Return what this machine lacks and how to get it, None if it has a browser."""
    lacks = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"there is no {' and no '.join(lacks)}: {REMEDY}" if lacks else None


class Page:
    """A page of a browser."""

    def __init__(self, driver: Chrome) -> None:
        self._driver = driver

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns; it knows ``all(selector)``, inside shadow roots too."""
        return self._driver.execute_script(_PRELUDE + script, *arguments)

    def until(
        self, look: Callable[[], Any], want: Callable[[Any], object] = bool, what: str = ""
    ) -> Any:
        """Look until what is seen is as wanted, and return it."""
        end = time.monotonic() + WAIT
        while not want(seen := look()):
            if time.monotonic() > end:
                log = [entry["message"] for entry in self._driver.get_log("browser")]
                raise TimeoutError(
                    f"{what or 'what was wanted'} not within {WAIT} s; the last look at "
                    f"{self._driver.current_url} saw {str(seen)[:2000]}; its console has {log}"
                )
            time.sleep(0.1)
        return seen

    def curves(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """Return the charts by title, in each the curves by name, in each steps and values."""
        return {
            title: {
                name: [(step, float(value)) for step, value in points]
                for name, points in curves.items()
            }
            for title, curves in self.run(_CURVES).items()
        }

    def lines(self, title: str) -> dict[str, tuple[str, int]]:
        """Return colour and number of vertices of each line that is drawn in a chart."""
        return {name: tuple(line) for name, line in self.run(_LINES, title).items()}

    def show(self, address: str, title: str, names: set[str]) -> None:
        """Open the charts, enlarge one, and show it on a logarithmic axis, with its legend.

        Args:
            address: Where TensorBoard is.
            title: Of the chart.
            names: Of its curves, for which to wait.
        """
        self._driver.get("about:blank")  # or an address that differs after the # loads nothing
        self._driver.get(f"{address}#custom_scalars&_smoothingWeight=0")
        self.until(
            lambda: {name for name, points in self.curves().get(title, {}).items() if points},
            lambda seen: seen >= names,
            f"the curves {sorted(names)} of the chart {title!r}",
        )
        for button in BUTTONS:
            self.until(lambda button=button: self.run(_PRESS, title, button), what=button)
        # Otherwise the axis ends before the largest values.
        self.until(lambda: self.run(_EVERY_VALUE), what="the box for outliers")
        self.until(
            lambda: self.lines(title),
            lambda lines: all(vertices for _, vertices in lines.values()),
            f"the lines of the chart {title!r}",
        )
        looks: list[Any] = []

        def look() -> list[Any]:
            self._driver.execute_async_script(_NEXT_FRAME)
            looks.append((self.lines(title), self.run(_PLACES, title)))
            return looks[-5:]

        self.until(look, lambda last: len(last) == 5 and last.count(last[0]) == 5, "no movement")

    def picture(self, path: Path) -> None:
        """Write a PNG of the window."""
        taken = self._driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def chromium(width: int, height: int) -> Iterator[Page]:
    """Start the browser that the system has, with a window of this size; download nothing."""
    # Only here: who runs the other tests need not have it.
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which(PROGRAMS[0])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = Chrome(options=options, service=Service(shutil.which(PROGRAMS[1])))
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield Page(driver)
    finally:
        driver.quit()

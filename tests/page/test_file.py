"""The page in one file, in a browser: it draws what was logged, and asks for nothing."""

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver import ActionChains, Keys
from torch.utils.tensorboard import SummaryWriter

from tests.support.browser import missing, requests_of
from tests.support.curves import log_run
from tests.support.page import Page, page_file
from tests.support.report import log_line, log_norms, reported
from tests.support.runs import quiet
from tests.support.tensorboard import eventually

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

ARTEFACTS = Path(__file__).parents[2] / "build" / "artefacts"
HOSTILE = "<img src=x onerror=alert(1)>"
ENDING = "</script><script>alert(2)</script>"
STEPS = 6000

# Shares of coloured pixels in the lower edge of each chart, for the first and the second half of
# the steps, away from their border.
_MARKED = """
return [...document.querySelectorAll(".panel:not([hidden]) .overlay")].map((canvas) => {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const ratio = canvas.width / canvas.clientWidth;
  const [left, right] = [126 * ratio, canvas.width - 14 * ratio];
  const row = canvas.height - 26 * ratio;
  const share = (from, to) => {
    const width = Math.round((right - left) * (to - from));
    const { data } = context.getImageData(left + (right - left) * from, row, width, 1);
    return data.filter((value, index) => index % 4 === 3 && value > 0).length / width;
  };
  return [share(0.05, 0.45), share(0.55, 0.95)];
});
"""

# Number of pixels in the colour of norms before clipping, near a place among the steps.
_BLUE = """
const canvas = document.querySelector(".frame canvas");
const ratio = canvas.width / canvas.clientWidth;
const [left, width] = [(arguments[0] - 5) * ratio, 10 * ratio];
const { data } = canvas.getContext("2d").getImageData(left, 0, width, canvas.height);
let count = 0;
for (let index = 0; index < data.length; index += 4) {
  const [red, green, blue, alpha] = data.subarray(index, index + 4);
  const isBlue = red < 20 && Math.abs(green - 114) < 20 && Math.abs(blue - 178) < 20;
  if (isBlue && alpha > 200) count += 1;
}
return count / ratio ** 2;
"""

# Keeps the texts that are written on canvases from here on.
_WRITTEN = """
window.written = [];
const { fillText } = CanvasRenderingContext2D.prototype;
CanvasRenderingContext2D.prototype.fillText = function (text, ...place) {
  window.written.push(text);
  fillText.call(this, text, ...place);
};
"""


# Labels of the axis of norms: the texts that a second drawing writes to the left of the curves.
_LABELS = """
const labels = [];
const { fillText } = CanvasRenderingContext2D.prototype;
CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
  if (this.textAlign === "right" && this.canvas === document.querySelector(".frame canvas"))
    labels.push(text);
  return fillText.call(this, text, x, y);
};
dispatchEvent(new Event("beforeprint"));
dispatchEvent(new Event("afterprint"));
CanvasRenderingContext2D.prototype.fillText = fillText;
return labels;
"""


@pytest.fixture
def opened(browser, tmp_path):
    """Return a function that opens the page of some logs; it complained of nothing in the end."""

    def opened(*runs):
        requests_of(browser)
        file = page_file(runs, tmp_path)
        browser.get(file.as_uri())
        page = Page(browser)
        page.settled()
        return page

    yield opened
    assert Page(browser).complaints() == []


def spiky(count=STEPS):
    norms = quiet(count) * np.geomspace(4, 1, count)
    norms[[count // 3, count // 2]] = 50, 4e7
    return norms


def with_parameters(path, norms, names):
    """Write a log of steps with norms of parameters, each the same share of the total."""
    shares = np.arange(len(names), 0, -1.0)
    shares /= np.linalg.norm(shares)
    path.write_text(
        "\n".join(
            log_line(step, norm, parameter_norms=dict(zip(names, norm * shares, strict=True)))
            for step, norm in enumerate(norms.tolist())
        )
    )
    return path


def test_what_is_drawn_is_what_was_logged_at_every_zoom(opened, tmp_path):
    """Each column of pixels has the smallest and the largest value of its steps."""
    norms = spiky()
    broken = [100, 2500, 2501]
    logged = norms.copy()
    logged[broken] = math.nan
    page = opened(log_norms(tmp_path / "run.jsonl", logged, 2.0))
    for first, last in ((0, STEPS - 1), (1000, 3500), (1990, 2010), (2995, 3005)):
        page.show(first - 0.5, last + 0.5)
        drawn = page.drawn()
        assert [drawn["range"]["first"], drawn["range"]["last"]] == [first - 0.5, last + 0.5]
        for name, values in (("norm", logged), ("clipped_norm", np.minimum(logged, 2.0))):
            curve = page.curve(name)
            seen = np.zeros(STEPS, dtype=bool)
            for begin, end, low, high in zip(
                *(curve[key] for key in ("first", "last", "low", "high")), strict=True
            ):
                part = values[begin : end + 1]
                assert (low, high) == (np.nanmin(part), np.nanmax(part))
                seen[begin : end + 1] = True
            assert seen[first : last + 1][np.isfinite(values[first : last + 1])].all()
    assert len(page.curve("norm")["at"]) >= 10
    page.show(-1, STEPS)
    assert max(page.curve("norm")["high"]) == 4e7


def test_the_share_of_a_threshold_is_that_of_numpy(opened, tmp_path):
    """Typed, dragged with the mouse, and moved with keys."""
    norms = spiky()
    page = opened(log_norms(tmp_path / "run.jsonl", norms))

    def is_right():
        threshold = float(page.all(".trial input[type=text]")[0].get_property("value"))
        [sentence] = page.texts(".shares li")
        above = int((norms > threshold).sum())
        share = float(re.search(r"([\d.e-]+) %", sentence)[1])
        assert share == pytest.approx(100 * above / STEPS, rel=0.05)
        assert f"({above:,} of {STEPS:,})" in sentence
        return threshold

    field = page.all(".trial input[type=text]")[0]
    for typed in ("1.23", "0.5", "3e7", "1e9", "2,5"):
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(typed, Keys.TAB)
        page.settled()
        assert is_right() == float(typed.replace(",", "."))
    handle = page.all(".grabbable")[0]
    for place in (-60, -10, 75):
        moves = ActionChains(page.browser).move_to_element_with_offset(handle, 0, 0)
        moves.click_and_hold().move_by_offset(place, 5).release().perform()
        page.settled()
        dragged = is_right()
    page.all(".trial input[type=range]")[0].send_keys(Keys.ARROW_RIGHT)
    page.settled()
    assert dragged < is_right() <= dragged * 1.011
    assert page.drawn()["threshold"] == is_right()
    page.press("Clear")
    assert page.drawn()["threshold"] is None


def test_the_steps_that_a_threshold_clips_are_marked_in_all_panels(opened, tmp_path):
    """Where the norm is above it, and nowhere else."""
    norms = np.where(np.arange(1000) < 500, 1.0, 3.0)
    run = with_parameters(tmp_path / "run.jsonl", norms, ["a.weight"])
    page = opened(run)
    field = page.all(".trial input[type=text]")[0]
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("2", Keys.TAB)
    page.settled()
    panels = page.browser.execute_script(_MARKED)
    assert len(panels) == 3
    for left, right in panels:
        assert left == 0
        assert right == pytest.approx(1, abs=0.02)
    page.press("Clear")
    assert {share for panel in page.browser.execute_script(_MARKED) for share in panel} == {0}


ADVICE = {
    "quiet": (quiet(600), "GradientClipper(optimizer, {:g})", "advised: {:.3g}"),
    "spiky": (
        spiky(600),
        'GradientClipper(optimizer, "auto", nonfinite="skip")',
        "if fixed: {:.3g}",
    ),
    "drifting": (
        quiet(1200) * np.geomspace(1, 20, 1200),
        'GradientClipper(optimizer, "auto")',
        None,
    ),
}


@pytest.mark.parametrize("run", ADVICE)
def test_the_advice_has_a_line_to_copy_and_its_number_is_marked(opened, tmp_path, run):
    """The number is called advised where the line has it alone; where none fits, none is marked."""
    norms, line, label = ADVICE[run]
    file = log_norms(tmp_path / "run.jsonl", norms)
    page = opened(file)
    advice = reported(file)[0]["advice"]
    threshold = advice["threshold"]
    assert page.texts(".card code") == [line.format(threshold)]
    assert page.texts(".card p")[0] == advice["reason"]
    buttons = [text for text in page.texts(".card button") if text.startswith("Try ")]
    page.browser.execute_script(_WRITTEN)
    page.press("Dark")
    marked = [text for text in page.browser.execute_script("return window.written") if ":" in text]
    if label is None:
        assert (threshold, buttons, marked) == (None, [], [])
        return
    assert [float(text[4:]) for text in buttons] == [threshold]
    assert {*marked} == {label.format(threshold)}
    page.press(buttons[0])
    assert float(page.all(".trial input[type=text]")[0].get_property("value")) == threshold


def test_an_observed_run_is_said_to_be_one(opened, tmp_path):
    places = [tmp_path / name for name in ("observed", "clipped")]
    for place, exceed in zip(places, ("observe", "scale"), strict=True):
        log_run(place, *[4.0] * 20, exceed=exceed)
    [note] = opened(*places).texts(".notes li")
    assert note.startswith(f"{places[0]}: clipping was only observed.")


def test_the_file_asks_for_nothing(opened, browser, tmp_path):
    """It opens from disk, and every address that is loaded is its own."""
    page = opened(log_norms(tmp_path / "run.jsonl", spiky()))
    page.press("Copy")
    assert requests_of(browser) == [(tmp_path / "page.html").as_uri()]


def test_names_stay_text(opened, tmp_path):
    """Names of runs and parameters that are HTML are shown as they are."""
    folder = tmp_path / HOSTILE
    folder.mkdir()
    names = [f"{HOSTILE}.weight", f"{ENDING}.bias", "__proto__"]
    norms = quiet(300)
    norms[200] = 90
    run = with_parameters(folder / "a.jsonl", norms, names)
    page = opened(run, log_norms(folder / "b.jsonl", quiet(300)))
    assert page.all("img") == []
    assert len(page.all("script")) == 2
    assert page.texts(".runs .name") == ["a.jsonl", "b.jsonl"]
    assert HOSTILE in page.all(".run")[0].get_attribute("title")
    assert page.drawn()["map"]["names"] == names
    [led] = page.texts(".led")
    assert HOSTILE in led
    assert ENDING in led
    assert page.browser.title.startswith("Gradients of ")


def test_the_map_shows_the_largest_norm_of_each_parameter(opened, tmp_path):
    norms = spiky(1000)
    names = [f"layer{index}.weight" for index in range(30)]
    page = opened(with_parameters(tmp_path / "run.jsonl", norms, names))
    drawn = page.drawn()["map"]
    assert drawn["names"] == names[:24]
    steps = np.array(drawn["steps"])
    shares = np.arange(30, 0, -1.0) / np.linalg.norm(np.arange(30, 0, -1.0))
    largest = np.maximum.reduceat(norms, steps)
    expected = np.outer(shares[:24], largest).astype(np.float32)
    assert np.allclose(np.reshape(drawn["high"], (24, -1)), expected, rtol=1e-6)
    page.all(".controls input[type=search]")[0].send_keys("LAYER2")
    page.settled()
    assert page.drawn()["map"]["names"] == [f"layer{i}.weight" for i in (2, *range(20, 30))]
    page.all(".controls input[type=search]")[0].send_keys("nothing")
    page.settled()
    assert page.texts(".found") == ["No parameter has such a name."]


def test_a_thousand_parameters_can_be_shown(opened, tmp_path):
    """No canvas becomes larger than browsers draw."""
    names = [f"layers.{n}.weight" for n in range(1100)]
    page = opened(with_parameters(tmp_path / "run.jsonl", quiet(40), names))
    page.press("Show all 1,000")
    assert page.drawn()["map"]["names"] == names[:1000]
    largest = "return Math.max(...[...document.querySelectorAll('canvas')].map(c => c.height))"
    assert 15_000 < page.browser.execute_script(largest) <= 32_000
    page.press("Show the 24 largest")
    assert page.drawn()["map"]["names"] == names[:24]


def test_an_incident_shows_its_steps_in_all_panels(opened, tmp_path):
    norms = quiet(3000)
    norms[2000] = 70
    names = ["body.weight", "head.weight"]
    page = opened(with_parameters(tmp_path / "run.jsonl", norms, names))
    [incident] = page.all(".incident")
    assert "The norm was 70 at step 2,000" in incident.text
    incident.click()
    drawn = page.drawn()
    assert drawn["range"] == {"first": 1960, "last": 2040}
    assert {*drawn["map"]["steps"]} <= {*range(1945, 2045)}
    assert page.texts(".runs caption") == ["At step 2,000"]
    assert page.texts(".runs td")[0] == "70"


def test_an_incident_shows_the_map_of_its_run_with_the_parameter_that_led(opened, tmp_path):
    """Also one that is too small on the whole to be among the rows."""
    names = [f"layers.{n}.weight" for n in range(40)]
    norms = quiet(300)
    norms[200] = 70
    first = with_parameters(tmp_path / "a.jsonl", quiet(300), names)
    second = with_parameters(tmp_path / "b.jsonl", norms, names)
    lines = second.read_text().splitlines()
    lines[200] = log_line(200, 70.0, parameter_norms={**dict.fromkeys(names, 0.1), names[39]: 70.0})
    second.write_text("\n".join(lines))
    page = opened(first, second)
    assert names[39] not in page.drawn()["map"]["names"]
    page.all(".incident")[0].click()
    drawn = page.drawn()["map"]
    assert drawn["names"] == [names[39]]
    assert max(drawn["high"]) == 70
    assert page.all(".controls select")[0].get_property("selectedOptions")[0].text == "b.jsonl"


def test_keys_move_the_crosshair_and_the_range(opened, tmp_path):
    norms = spiky(500)
    page = opened(log_norms(tmp_path / "run.jsonl", norms, 2.0))
    chart = page.all(".frame[role=application]")[0]
    chart.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.settled()
    [spoken] = [each.get_property("textContent") for each in page.all(".spoken")]
    assert spoken.startswith(f"Step 2: before {float(f'{norms[2]:.4g}'):g}, after 2, threshold 2")
    chart.send_keys("+", "+")
    first = page.drawn()["range"]
    assert first["last"] - first["first"] == pytest.approx(125)
    chart.send_keys(Keys.PAGE_DOWN)
    assert page.drawn()["range"]["first"] == pytest.approx(first["first"] + 62.5)
    chart.send_keys("0", Keys.ESCAPE)
    assert page.drawn()["range"] == {"first": -0.5, "last": 499.5}
    assert page.texts(".runs caption") == ["At the last step of each run"]


def test_dragging_zooms_and_a_double_click_shows_all_steps(opened, tmp_path):
    page = opened(log_norms(tmp_path / "run.jsonl", spiky()))
    chart = page.all(".frame[role=application]")[0]
    drag = ActionChains(page.browser).move_to_element_with_offset(chart, -200, 0)
    drag.click_and_hold().move_by_offset(300, 0).release().perform()
    first, last = page.drawn()["range"].values()
    assert 0 < first < STEPS / 2 < last < STEPS - 1
    drag = ActionChains(page.browser).key_down(Keys.SHIFT)
    drag.move_to_element_with_offset(chart, 100, 0).click_and_hold().move_by_offset(-50, 0)
    drag.release().key_up(Keys.SHIFT).perform()
    moved = page.drawn()["range"]
    assert moved["last"] - moved["first"] == pytest.approx(last - first)
    assert moved["first"] > first
    ActionChains(page.browser).double_click(chart).perform()
    assert page.drawn()["range"] == {"first": -0.5, "last": STEPS - 0.5}


def test_runs_are_shown_side_by_side_and_one_by_one(opened, tmp_path):
    names = [f"{name}.jsonl" for name in "abc"]
    runs = [log_norms(tmp_path / name, quiet(100 * (n + 1))) for n, name in enumerate(names)]
    page = opened(*runs)
    assert page.texts(".runs .name") == names
    assert page.drawn()["range"]["last"] == 299.5
    page.all(".run")[2].click()
    drawn = page.drawn()
    assert {curve["run"] for curve in drawn["curves"]} == {str(run) for run in runs[:2]}
    assert drawn["range"]["last"] == 199.5


def test_of_many_runs_some_are_shown_and_others_found_by_name(opened, tmp_path):
    """Ten at first; the search takes a regular expression."""
    runs = [log_norms(tmp_path / f"lr{n:02}.jsonl", quiet(60 + n)) for n in range(14)]
    page = opened(*runs)

    def drawn():
        return {Path(curve["run"]).stem for curve in page.drawn()["curves"]}

    assert drawn() == {f"lr{n:02}" for n in range(10)}
    assert page.drawn()["range"]["last"] == 68.5
    page.all(".run-table input[type=search]")[0].send_keys("r1[12]\\.")
    rows = [row.text for row in page.all(".runs tbody tr") if row.is_displayed()]
    assert rows == ["lr11.jsonl", "lr12.jsonl"]
    page.press("Show these")
    assert drawn() == {f"lr{n:02}" for n in (*range(10), 11, 12)}
    page.all(".run-table input[type=search]")[0].send_keys(Keys.CONTROL, "a")
    page.all(".run-table input[type=search]")[0].send_keys("lr0")
    page.press("Hide these")
    assert drawn() == {"lr11", "lr12"}
    assert page.drawn()["range"]["last"] == 71.5


def test_another_scalar_of_a_run_can_be_shown_as_its_loss(opened, tmp_path):
    with SummaryWriter(str(tmp_path / "run")) as writer:
        log_run(writer, *[1.0] * 40)
        for step in range(0, 40, 5):
            writer.add_scalar("train/loss", 3.0 - step / 64, step)
            writer.add_scalar("train/lr", 0.1, step)
    page = opened(tmp_path / "run")
    [choice] = page.all(".choice select")
    assert choice.text.split("\n") == ["none", "train/loss", "train/lr"]
    assert choice.get_property("value") == "train/loss"
    curve = page.curve("value")
    assert curve["first"] == [*range(0, 40, 5)]
    assert curve["high"] == curve["low"] == [3.0 - step / 64 for step in range(0, 40, 5)]
    page.show(9.5, 10.5)
    page.all(".frame[role=application]")[0].send_keys(Keys.HOME)
    page.settled()
    assert page.texts(".runs td")[3] == f"{3 - 10 / 64:.4g}"
    choice.send_keys("none")
    names = {curve["name"] for curve in page.drawn()["curves"]}
    assert names == {"norm", "threshold", "clip_rate"}


def test_a_run_under_the_pointer_stands_out(opened, tmp_path):
    """The curves of the others become pale, until the pointer leaves."""
    page = opened(*(log_norms(tmp_path / f"{name}.jsonl", quiet(300)) for name in "ab"))
    [canvas, *_] = page.all(".frame canvas")
    before = canvas.screenshot_as_png
    ActionChains(page.browser).move_to_element(page.all(".run")[1]).perform()
    page.settled()
    assert canvas.screenshot_as_png != before
    ActionChains(page.browser).move_to_element(page.all("h1")[0]).perform()
    page.settled()
    assert canvas.screenshot_as_png == before


def test_steps_not_finite_or_skipped_are_marked_and_counted(opened, tmp_path):
    norms = [*[1.0] * 50, math.nan, *[1.0] * 50, math.inf]
    log_run(tmp_path / "run", *norms, nonfinite="skip")
    legend = opened(tmp_path / "run").texts(".legend li")
    assert any(text.endswith("not finite (2)") for text in legend)
    assert any(text.endswith("skipped (2)") for text in legend)


def test_panels_without_numbers_are_not_there(opened, tmp_path):
    """Of a run of norms alone the page has neither losses nor parameters."""
    page = opened(log_norms(tmp_path / "run.jsonl", quiet(300)))
    shown = [title for title in page.texts(".panel h2") if title]
    assert shown == ["Gradient norm", "Clipped steps", "Try a threshold", "Advice", "Incidents"]
    assert "None: every norm was finite" in page.texts(".incidents")[0]


def test_numbers_can_be_read_in_a_table(opened, tmp_path):
    norms = spiky(500)
    page = opened(log_norms(tmp_path / "run.jsonl", norms, 2.0))
    page.show(-0.5, 9.5)
    [summary] = [each for each in page.all("summary") if each.text == "Numbers as a table"]
    summary.click()
    rows = [row.split() for row in eventually(lambda: page.texts(".numbers tbody tr"))]
    expected = [[str(n), f"{float(f'{norms[n]:.4g}'):g}", "2", "2"] for n in range(10)]
    assert [row[:4] for row in rows] == expected


@pytest.mark.parametrize("width", [400, 1000])
def test_the_page_fits_and_follows_the_theme(opened, browser, tmp_path, width):
    media = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        names = [f"model.layers.{n}.attention.weight" for n in range(9)]
        run = with_parameters(tmp_path / "a run with a rather long name.jsonl", spiky(500), names)
        page = opened(run, log_norms(tmp_path / "another run.jsonl", quiet(300)))
        extent = "return [document.documentElement.scrollWidth, innerWidth]"
        scrolled, inner = browser.execute_script(extent)
        assert scrolled <= inner
        root = page.all("#gradclip")[0]
        assert root.get_attribute("data-theme") == "dark"
        scroll_bars = "return getComputedStyle(document.documentElement).colorScheme"
        assert browser.execute_script(scroll_bars) == "dark"
        folder = Path(os.environ.get("GRADCLIP_ARTEFACTS") or ARTEFACTS)
        folder.mkdir(parents=True, exist_ok=True)
        assert browser.save_screenshot(folder / f"page_{width}.png")
        page.press("Dark")
        assert root.get_attribute("data-theme") == "light"
        assert browser.execute_script(scroll_bars) == "normal"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_axis_is_logarithmic_or_linear(opened, tmp_path):
    """The switch changes the picture and no value."""
    page = opened(log_norms(tmp_path / "run.jsonl", spiky(500)))
    [canvas, *_] = page.all(".frame canvas")
    first, curve = canvas.screenshot_as_png, page.curve("norm")
    page.press("Log axis")
    assert canvas.screenshot_as_png != first
    assert page.curve("norm") == curve


def test_a_norm_of_0_hides_no_other_below_the_axis(opened, tmp_path):
    """The logarithmic axis begins below the smallest norm above 0, and all of these are drawn."""
    norms = np.where(np.arange(60) % 20 == 0, 0.0, np.where(np.arange(60) < 30, 1e-3, 5.0))
    page = opened(log_norms(tmp_path / "run.jsonl", norms, 1.0))
    ticks = page.browser.execute_script(_LABELS)
    assert any(1e-3 <= float(tick) <= 2e-3 for tick in ticks)


@pytest.mark.parametrize(
    "norms", [np.full(60, 5e-324), np.geomspace(1e-300, 1e300, 60), np.append(quiet(59), 1.79e308)]
)
def test_norms_of_any_size_are_drawn(opened, tmp_path, norms):
    """Also where room around them would end at 0 or at infinity."""
    page = opened(log_norms(tmp_path / "run.jsonl", norms))
    assert page.curve("norm")["high"] == norms.tolist()
    page.press("Log axis")
    assert page.curve("norm")["high"] == norms.tolist()


def at_steps(path, steps, norm=0.5):
    """Write a log with one norm at some steps."""
    path.write_text("\n".join(log_line(int(step), norm, 1.0) for step in steps))
    return path


@pytest.mark.parametrize("count", [500, 130_000])
def test_no_line_leads_over_a_gap_in_a_log(opened, tmp_path, count):
    """Also in a log that is kept in buckets, of which none reaches over the gap."""
    steps = np.r_[:100, 10**6 : 10**6 + count]
    page = opened(at_steps(tmp_path / "run.jsonl", steps))
    for first, last in ((-0.5, steps[-1] + 0.5), (50, 10**6 + 50), (98.5, 10**6 + 0.5)):
        page.show(first, last)
        curve = page.curve("norm")
        begin = next(i for i, step in enumerate(curve["first"]) if step >= 10**6)
        assert (curve["last"][begin - 1], curve["first"][begin]) == (99, 10**6)
        broken = [i for i, is_broken in enumerate(curve["isBroken"]) if is_broken]
        assert broken == [0, begin]


@pytest.mark.parametrize(
    "steps",
    [
        np.arange(0, 20_000, 50),
        np.r_[:500, 600:900],
        np.r_[:500, 500:100_000:1000],
    ],
    ids=["every 50th", "resumed", "each, then every 1000th"],
)
def test_a_line_joins_steps_at_their_usual_distance(opened, tmp_path, steps):
    """Also where a resumed run lost some, or logs fewer."""
    page = opened(at_steps(tmp_path / "run.jsonl", steps))
    assert sum(page.curve("norm")["isBroken"]) == 1


@pytest.mark.parametrize(
    ("steps", "lone"),
    [([7], 7), ([*range(100), 500_000, *range(10**6, 10**6 + 100)], 500_000)],
    ids=["alone", "between gaps"],
)
def test_a_lone_step_is_a_visible_point(opened, tmp_path, steps, lone):
    """The only step of a run, or one between gaps, also under a threshold that is as high."""
    page = opened(at_steps(tmp_path / "run.jsonl", steps, 1.0))
    curve = page.curve("norm")
    at = curve["at"][curve["first"].index(lone)]
    assert page.browser.execute_script(_BLUE, at) >= 12


def test_the_share_of_the_last_step_is_called_so(opened, tmp_path):
    page = opened(at_steps(tmp_path / "run.jsonl", [7]))
    assert page.texts(".legend li")[-1] == "share of the last step"


def test_norms_at_a_power_of_ten_count_for_thresholds_below(opened, tmp_path):
    """The smallest norm is the first threshold that is counted for, and not above it."""
    page = opened(log_norms(tmp_path / "run.jsonl", np.ones(250)))
    assert sum(page.drawn()["distribution"]["heights"][0]) == 250
    field = page.all(".trial input[type=text]")[0]
    for typed, count in (("0.5", 250), ("0.999", 250), ("1", 0)):
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(typed, Keys.TAB)
        page.settled()
        assert f"({count} of 250)" in page.texts(".shares li")[0]


def test_paper_is_white(opened, browser, tmp_path):
    page = opened(log_norms(tmp_path / "run.jsonl", spiky(500)))
    page.press("Dark")
    script = "window.themes = []; const root = document.getElementById('gradclip');"
    script += "addEventListener('beforeprint', () => window.themes.push(root.dataset.theme));"
    browser.execute_script(script)
    assert len(browser.print_page()) > 10_000
    assert browser.execute_script("return window.themes") == ["light"]
    assert page.all("#gradclip")[0].get_attribute("data-theme") == "dark"


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"format": 1', '"format": 2', "written for another version of gradclip's page"),
        ('"format": 1', '"format": 1, ', "cannot be read: it is damaged"),
        ('"data": "', '"data": "AAAA', "These numbers cannot be read"),
        ('"runs": [', '"runs": [], "other": [', "There is no run to show"),
    ],
)
def test_a_damaged_file_says_so(browser, tmp_path, old, new, sentence):
    file = page_file([log_norms(tmp_path / "run.jsonl", spiky(500))], tmp_path)
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new))
    browser.get(file.as_uri())
    Page(browser).awaited("await new Promise((done) => setTimeout(done, 300))")
    assert sentence in browser.find_element("tag name", "body").text

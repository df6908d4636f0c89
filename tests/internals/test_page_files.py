"""Files of long runs: they stay small, keep each extreme, and the page says what it shows."""

import numpy as np
import pytest

from gradclip.view import assets, html
from tests.support.browser import chromium, missing
from tests.support.page import Page
from tests.support.runs import norms_by_name, quiet, run_with

STEPS = 300_000


def test_the_script_is_one_module_that_imports_nothing():
    """And it has the whole of each module of the page."""
    script = assets.script()
    assert "import " not in script.replace("// ", "")
    assert {file.stem for file in assets.PAGE.glob("*.js")} == {*assets.MODULES}
    for name in assets.OFFERED:
        assert f"export const {name} = " in script


def test_many_parameters_and_runs_take_no_more_room():
    entries = [
        (step, f"layer{index}.weight", 1.0 + index) for step in range(300) for index in range(900)
    ]
    norms = quiet(300)
    run = run_with(norms, parameters=norms_by_name(entries))
    assert len(html.page_of([run] * 3)) < 3e6


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_a_long_run_keeps_every_extreme_in_few_bytes(tmp_path):
    """The smallest and the largest value of each bucket are those of its steps."""
    norms = quiet(STEPS) * np.random.default_rng(1).lognormal(size=STEPS)
    norms[[123_456, 299_999]] = 4e7, 1e-9
    file = tmp_path / "page.html"
    html.write_page([run_with(norms, threshold=1.0, losses=quiet(STEPS))] * 3, file)
    assert file.stat().st_size < 3e6
    with chromium() as browser:
        browser.get(file.as_uri())
        page = Page(browser)
        page.settled()
        [note] = page.texts(".notes li")
        for first, last in ((0, STEPS - 1), (100_000, 150_000), (123_400, 123_500)):
            page.show(first, last)
            curve = page.curve("norm")
            columns = zip(*(curve[key] for key in ("first", "last", "low", "high")), strict=True)
            for begin, end, low, high in columns:
                part = norms[begin : end + 1]
                assert (low, high) == (part.min(), part.max())
            assert curve["first"][0] <= first
            assert curve["last"][-1] >= last
        assert max(curve["high"]) == 4e7
        assert page.complaints() == []
    size = curve["last"][0] - curve["first"][0] + 1
    assert f"the smallest and the largest value of every {size} logged steps" in note

"""The output that docs/report.md shows is the output of its two commands."""

import re
import sys

import pytest

from gradclip.cli import main
from tests.support.docs import PAGES, run_example

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def test_the_output_on_the_page_is_that_of_the_report(tmp_path, monkeypatch, capsys):
    """Words to the letter; numbers to 2 %, as their last digits depend on the processor."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    [shown] = re.findall(r"^```text\n(.*?)^```", PAGES["docs/report.md"], re.M | re.S)
    run_example("minimal.py", "runs/minimal", cwd=tmp_path)
    assert main(["report", "runs/minimal"]) == 0
    printed = capsys.readouterr().out
    assert NUMBER.sub("#", " ".join(shown.split())) == NUMBER.sub("#", " ".join(printed.split()))
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (shown, printed)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02)

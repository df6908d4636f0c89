"""The classes that docs/extending.md shows keep the contracts, by the commands that it gives."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.support.docs import PAGES, ROOT

PAGE = PAGES["docs/extending.md"]
COMMANDS = re.findall(r"^```\n(PYTHONPATH=.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
[ENGINE] = re.findall(r"^```python\n([^`]*class PlainEngine[^`]*)^```", PAGE, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=["rule", "engine"])
def test_the_contract_holds_for_the_class_on_the_page(command, tmp_path, monkeypatch):
    """More than 30 tests of it; the classes lie where the commands look."""
    (tmp_path / "plain_engine.py").write_text(ENGINE)
    path, selected, python, *arguments = shlex.split(command.replace("\\\n", ""))
    folder = ROOT / "examples" if path == "PYTHONPATH=examples" else tmp_path
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
    monkeypatch.setenv(*selected.split("=", 1))
    assert python == "python"
    quick = [sys.executable, *arguments, "-p", "no:cacheprovider", "-m", "not slow"]
    done = subprocess.run(quick, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 30


def test_the_rule_on_the_page_is_that_of_the_example():
    example = (ROOT / "examples/own_threshold.py").read_text()
    for line in re.findall(r"^ {8}(?:return|average =|moved =|self.put).*", PAGE, re.MULTILINE)[:6]:
        assert line.split("  #")[0].rstrip() in example

"""The program of docs/quickstart.md, with the outcomes that the page shows."""

from pathlib import Path

import pytest

from gradclip.cli.demo.training import one_thread
from gradclip.cli.main import main
from tests.support.docs import CODE, PAGES

PROGRAM = CODE.findall(PAGES["docs/quickstart.md"])[0]
UNIFORM = 4.6
"""The loss of a uniform guess over the letters."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Run the program with each threshold of the page; return its last losses by the log."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.chdir(folder)
        printed = []
        names = {"print": printed.append}
        exec(PROGRAM, names)
        names["train"]("auto", "runs/auto")
        names["train"](1.0, "runs/one")
    last = [float(line.split()[-1]) for line in printed if line.startswith("step 300:")]
    return folder, dict(zip(("measured", "auto", "one"), last, strict=True))


def test_the_training_fails_without_clipping(losses):
    assert losses[1]["measured"] > UNIFORM


def test_the_network_learns_with_clipping(losses):
    assert losses[1]["auto"] < UNIFORM / 2
    assert losses[1]["one"] < UNIFORM / 2


def test_the_advice_is_that_of_the_page(losses, capsys):
    assert main(["report", str(Path(losses[0], "runs/measured"))]) == 0
    line = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert line.startswith('    GradientClipper(optimizer, "auto"')
    assert '    GradientClipper(optimizer, "auto")' in PAGES["docs/quickstart.md"].splitlines()

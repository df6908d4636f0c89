"""The program of docs/quickstart.md, with the outcomes that the page shows."""

from statistics import mean

import pytest

from gradclip.cli.demo.training import one_thread
from gradclip.cli.main import main
from tests.support.docs import CODE, PAGES

PROGRAM = CODE.findall(PAGES["docs/quickstart.md"])[0]
UNIFORM = 4.6
"""The loss of a uniform guess over the letters."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def losses(run_folder):
    """Run the program with each threshold of the page; return the losses that each run prints."""
    printed = []
    names = {"print": printed.append}
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.chdir(run_folder)
        exec(PROGRAM, names)
        names["train"]("auto", "runs/auto")
        names["train"](1.0, "runs/one")
    found = [float(line.split()[-1]) for line in printed]
    return {"measured": found[:6], "auto": found[6:12], "one": found[12:]}


def test_the_training_fails_without_clipping(losses):
    assert mean(losses["measured"]) > UNIFORM


@pytest.mark.parametrize("run", ["auto", "one"])
def test_the_network_learns_with_clipping(losses, run):
    assert losses[run][-1] < UNIFORM / 2


@pytest.mark.usefixtures("losses")
def test_the_advice_is_that_of_the_page(run_folder, capsys):
    assert main(["report", str(run_folder / "runs/measured")]) == 0
    line = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert line.startswith('    GradientClipper(optimizer, "auto"')
    assert '    GradientClipper(optimizer, "auto")' in PAGES["docs/quickstart.md"].splitlines()

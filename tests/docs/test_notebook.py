"""examples/quickstart.ipynb: what the repository has of it, and an execution by a real kernel."""

import base64
import re
from html import unescape

import nbformat
import pytest

from docs.notebook import NOTEBOOK, executed, keep_pictures

PNG = b"\x89PNG\r\n\x1a\n"


def outputs_of(notebook):
    """Return the outputs of each cell of code by the cell's id."""
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def pictures_in(notebook):
    outputs = [output for each in outputs_of(notebook).values() for output in each]
    encoded = [output.get("data", {}).get("image/png") for output in outputs]
    return [base64.b64decode(picture) for picture in encoded if picture is not None]


def stream_of(outputs):
    """Return what a cell printed."""
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_the_file_has_pictures_alone():
    """Nothing in it changes from one execution to the next."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    stripped = nbformat.from_dict(notebook)
    keep_pictures(stripped)
    assert notebook == stripped
    pictures = pictures_in(notebook)
    assert len(pictures) == 4
    assert all(picture.startswith(PNG) for picture in pictures)
    assert sum(map(len, pictures)) < 300_000


@pytest.mark.slow
def test_a_kernel_executes_it(tmp_path, monkeypatch):
    """It explodes without clipping, and learns with each threshold; its page holds the run."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = executed(tmp_path)
    outputs = outputs_of(notebook)
    assert len(pictures_in(notebook)) == 4
    [page] = [output.data["text/html"] for output in outputs["page"]]
    source = unescape(re.fullmatch(r'<iframe srcdoc="([^"]*)".*', page)[1])
    assert re.search(r'"name": "[^"]*runs/one"', source)
    report = stream_of(outputs["report"])
    assert "This run is exploding." in report
    assert re.search(r"GradientClipper\(optimizer, .+\)", report)
    rows = re.findall(r"^(\S+) +([\d.]+) +\d+%$", stream_of(outputs["final"]), re.M)
    losses = {max_norm: float(loss) for max_norm, loss in rows}
    assert len(losses) == 5
    assert losses.pop("None") > 4
    assert max(losses.values()) < 3
    assert sorted(losses, key=losses.get)[:2] in (["1", '"auto"'], ['"auto"', "1"])

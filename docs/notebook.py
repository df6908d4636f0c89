"""Executes examples/quickstart.ipynb and keeps its pictures: ``make notebook``.

The file in the repository has the pictures as its only outputs, and nothing that changes from one
execution to the next.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples/quickstart.ipynb"
SECONDS = 600
"""Time after which a cell counts as hanging."""


def executed(folder: Path) -> NotebookNode:
    """Return the notebook with the outputs of all its cells, executed in a folder.

    Raises:
        CellExecutionError: A cell raised an error.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, record_timing=False, resources=where).execute()
    return notebook


def keep_pictures(notebook: NotebookNode) -> None:
    """Remove all outputs but pictures, the counts of executions, and the versions of the kernel."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {
                "display_name": "Python 3 (ipykernel)",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.execution_count = None
            pictures = [output.get("data", {}).get("image/png") for output in cell.outputs]
            cell.outputs = [
                nbformat.v4.new_output("display_data", {"image/png": picture})
                for picture in pictures
                if picture is not None
            ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(Path(folder))
    keep_pictures(notebook)
    nbformat.write(notebook, NOTEBOOK)

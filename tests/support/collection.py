"""How many tests pytest collects for arguments such as ``tests/docs -k snippets``."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from _pytest.mark import deselect_by_keyword

from tests.support.docs import ROOT

POINTERS = "GRADCLIP_POINTERS"
"""Names the file that holds the arguments, and then the counts."""


def collected_by(pointers: list[str]) -> dict[str, int]:
    """Return the number of tests for each pointer, a path with or without ``-k``.

    One process collects all their paths, then selects as pytest does for ``-k``.
    """
    paths = sorted({shlex.split(pointer)[0] for pointer in pointers})
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "tests.support.collection"]
    with TemporaryDirectory() as folder:
        file = Path(folder, "pointers.json")
        file.write_text(json.dumps(pointers))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *paths],
            cwd=ROOT,
            env={**os.environ, POINTERS: str(file)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == pytest.ExitCode.OK, done.stdout[-2000:]
        return json.loads(file.read_text())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Count the tests of each pointer, in the process that collects them."""
    if not (name := os.environ.pop(POINTERS, None)):
        return
    counts = {}
    for pointer in json.loads(Path(name).read_text()):
        path, *options = shlex.split(pointer)
        items = [
            item for item in session.items if item.nodeid.startswith((f"{path}/", f"{path}::"))
        ]
        session.config.option.keyword = options[1] if options else ""
        deselect_by_keyword(items, session.config)
        counts[pointer] = len(items)
    Path(name).write_text(json.dumps(counts))

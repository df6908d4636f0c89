"""Logs with given norms, and what ``gradclip report`` says of logs."""

import io
import json
import math
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from gradclip.cli import main


def log_line(step: int, norm: float, threshold: float | None = None, **fields: Any) -> str:
    """Return a line as `JsonlSink` writes it; NaN and infinity are null."""
    clipped = norm if threshold is None else min(norm, threshold)
    numbers = {"norm": norm, "clipped_norm": clipped, "threshold": threshold}
    plain = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
    return json.dumps({"step": step, **plain, "skipped": False, **fields})


def log_norms(path: Path, norms: Iterable[float], threshold: float | None = None) -> Path:
    """Write a log whose steps have these norms."""
    lines = [log_line(step, float(norm), threshold) for step, norm in enumerate(norms)]
    path.write_text("\n".join(lines))
    return path


def reported(*paths: Path) -> list[dict[str, Any]]:
    """Return what ``gradclip report --json`` prints: for each run its facts and the advice."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["report", "--json", *map(str, paths)]) == 0
    return json.loads(printed.getvalue(), parse_constant=pytest.fail)


@pytest.fixture
def summary(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return what ``gradclip report`` says of a run with some norms."""
    path = tmp_path / "run.jsonl"
    return lambda norms, threshold=None: reported(log_norms(path, norms, threshold))[0]

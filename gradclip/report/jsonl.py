"""Reading of what `gradclip.JsonlSink` wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from .run import Columns, Run, warn_of

AT_ONCE = 4096
"""Lines that are parsed together, which takes half the time of one after the other."""
_FIELDS = itemgetter("step", "norm", "clipped_norm", "threshold", "skipped")


def read_jsonl(path: Path) -> list[Run]:
    """Return the run in a file, some lines at a time, so that its size does not matter.

    Args:
        path: The file.

    Warns:
        UserWarning: Some lines are none of ours.
    """
    columns, foreign = Columns(str(path)), 0
    with path.open("rb") as file:
        while lines := [*islice(file, AT_ONCE)]:
            if _taken(lines, columns):
                continue
            for line in filter(bytes.strip, lines):
                foreign += not _taken([line], columns)
    if foreign and columns:
        warn_of(path, f"{foreign} of its lines are no steps, and were passed over")
    return [columns.run()] if columns else []


def _taken(lines: Sequence[bytes], columns: Columns) -> bool:
    """Take the steps in lines, null as NaN; return False, with none taken, where one is foreign."""
    try:
        steps = json.loads(b"[%s]" % b",".join(lines))
        if len(steps) != len(lines):
            return False
        rows = np.array([*map(_FIELDS, steps)], dtype=np.float64)
        parameter_norms = {
            place: _norms_by_name(norms)
            for place, step in enumerate(steps)
            if (norms := step.get("parameter_norms")) is not None
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return False
    columns.add(rows, parameter_norms)
    return True


def _norms_by_name(norms: dict[str, float | None]) -> dict[str, float]:
    """Return norms as numbers, null as NaN.

    Raises:
        AttributeError: This is no object.
        TypeError: One of them is no number.
        ValueError: One of them is a text that is no number.
    """
    return {name: math.nan if norm is None else float(norm) for name, norm in norms.items()}

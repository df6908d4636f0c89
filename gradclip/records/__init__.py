"""The records of steps: kept on the device, copied in batches, written by sinks.

A `ClipRecord` (``record.py``) stays on the device; ``recorder.py`` carries records to the host in
batches, ``counting.py`` counts them and makes `LoggedStep` rows, and the sinks in ``sinks/`` write
these. ``incidents.py`` describes the steps that stand out.

Called by: gradients, optimizers, clipper, integrations, report, view, cli.
Imports: errors, checks, engines, scopes, ranks; `MemorySink.plot` also report.
"""

from typing import Any

from .logged_step import LoggedStep

__all__ = [
    "LoggedStep",
    "counting",
    "incidents",
    "logged_step",
    "loss_history",
    "losses",
    "norm_history",
    "parameter_norms",
    "record",
    "recorder",
    "sinks",
    "state",
    "weight_sums",
]


def __getattr__(name: str) -> Any:
    """Return `ClipRecord` for the pickles of 0.1.0, which name it here; imports torch only then."""
    if name == "ClipRecord":
        from .record import ClipRecord

        return ClipRecord
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The choice of where TensorBoard's tab reads its runs: local event files, or its data provider."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol

from .local_runs import LocalRuns
from .provided_runs import ProvidedRuns
from .run_view import RunView

_ADDRESS = re.compile(r"[a-zA-Z][0-9a-zA-Z.]*://")


class ServedRuns(Protocol):
    """The runs of a server that is asked again and again."""

    @property
    def views(self) -> dict[str, RunView]:
        """The runs by name, as they were at the last look."""

    @property
    def is_reading(self) -> bool:
        """Whether not all that is there was read at the last look."""

    def refreshed(self, environment: dict[str, Any]) -> tuple[dict[str, RunView], list[str]]:
        """Look for what is new, and return the runs with sentences for the reader.

        Args:
            environment: That of the request.
        """


def runs_of(context: Any) -> ServedRuns:
    """Return the runs of a TensorBoard: from their files, if they are on this machine.

    Args:
        context: What TensorBoard tells its plugins.
    """
    logdir = getattr(context.flags, "logdir", "") or context.logdir or ""
    folders = folders_of(logdir, getattr(context.flags, "logdir_spec", "") or "")
    if folders is None:
        return ProvidedRuns(context.data_provider)
    return LocalRuns(folders)


def folders_of(logdir: str, logdir_spec: str) -> list[tuple[str, Path]] | None:
    """Return the folders that TensorBoard was started with, each with the name of its group.

    None if one of them is not on this machine, or there is none.

    Args:
        logdir: The option ``--logdir``, one folder.
        logdir_spec: The option ``--logdir_spec``: folders with commas between them, of which each
            may have a name and a colon before it.
    """
    named = [("", logdir)] if logdir else [*map(_named, filter(None, logdir_spec.split(",")))]
    if not named or any(_ADDRESS.match(folder) for _, folder in named):
        return None
    return [(name, Path(os.path.expanduser(folder))) for name, folder in named]


def _named(specification: str) -> tuple[str, str]:
    """Return the name and the folder of a specification, as TensorBoard reads it."""
    is_path = specification[0] == "/" or os.path.splitdrive(specification)[0]
    if ":" not in specification or is_path or _ADDRESS.match(specification):
        return "", specification
    name, _, folder = specification.partition(":")
    return name, folder

"""Runs in local event files, each file read on from where it was left off.

A thread reads while somebody looks, and ends when it has caught up. Every point is kept.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from ..report.event_files import EventStream, add_event
from ..report.tags import TaggedRuns
from .run_view import RunView

PATIENCE = 0.5
"""Seconds that an answer waits for what is new; after that it has what was read."""
EVENTS_AT_ONCE = 2_048
"""Events that are read before an answer may be given."""
MIB = 2**20


class LocalRuns:
    """The runs below some folders; see `ServedRuns`.

    Args:
        folders: The folders, each with the name of its group, "" for none.
    """

    def __init__(self, folders: Sequence[tuple[str, Path]]) -> None:
        self._folders = folders
        self._directories: dict[Path, _RunDirectory] = {}
        self._lock = Lock()
        self._reader: Thread | None = None
        self.views: dict[str, RunView] = {}
        self.is_reading = False

    def refreshed(self, environment: dict[str, Any]) -> tuple[dict[str, RunView], list[str]]:
        """See `ServedRuns`."""
        with self._lock:
            reader = self._reader
            if reader is None or not reader.is_alive():
                reader = self._reader = Thread(target=self._read, daemon=True)
                reader.start()
        reader.join(PATIENCE)
        with self._lock:
            directories = [*self._directories.values()]
            self.views = {
                view.run.name: view for directory in directories for view in directory.views()
            }
            self.is_reading = reader.is_alive()
            return self.views, self._notes(directories)

    def _read(self) -> None:
        """Read all that is new, in pieces between which answers are given."""
        found = dict(run_directories(self._folders))
        with self._lock:
            self._directories = {
                path: self._directories.get(path) or _RunDirectory(name, path)
                for path, name in found.items()
            }
            for directory in self._directories.values():
                directory.look()
        for path in found:
            while True:
                with self._lock:
                    if not self._directories[path].read_some():
                        break
                time.sleep(0)  # an answer may wait for the lock

    def _notes(self, directories: Sequence[_RunDirectory]) -> list[str]:
        """Return sentences about what is still read, what cannot be read, and what is missing."""
        notes = [note for directory in directories for note in directory.notes]
        if self.is_reading:
            done = sum(directory.bytes_read for directory in directories) / MIB
            size = sum(directory.size for directory in directories) / MIB
            notes.append(f"Event files are being read: {done:.0f} of {size:.0f} MiB so far.")
        elif not self.views:
            places = ", ".join(str(folder) for _, folder in self._folders)
            found = (
                f"The event files in {places} have no gradient norms"
                if directories
                else f"There are no event files in {places}"
            )
            notes.append(
                f"{found}: give a GradientClipper a folder in there as log=. A run appears after "
                "its first batch of steps, or after ten seconds."
            )
        return notes


class _RunDirectory:
    """The runs in the event files of one directory.

    Args:
        name: The name of the runs.
        path: The directory.
    """

    def __init__(self, name: str, path: Path) -> None:
        self._name = name
        self._path = path
        self._begin()

    def _begin(self) -> None:
        self._streams: dict[Path, EventStream] = {}
        self._runs = TaggedRuns(self._name)
        self._views: list[RunView] | None = []
        self._trouble: str | None = None

    @property
    def bytes_read(self) -> int:
        """Number of bytes that were read so far."""
        return sum(stream.offset for stream in self._streams.values())

    @property
    def size(self) -> int:
        """Size of the files when they were last looked at."""
        return sum(stream.size for stream in self._streams.values())

    @property
    def notes(self) -> list[str]:
        """Sentences about what cannot be read."""
        troubles = [(stream.path, stream.trouble) for stream in self._streams.values()]
        troubles += [(self._path, self._runs.trouble), (self._path, self._trouble)]
        return [f"{path}: {trouble}." for path, trouble in troubles if trouble]

    def views(self) -> list[RunView]:
        """Return the runs so far."""
        if self._views is None:
            self._views = [RunView(run) for run in self._runs.runs()]
        return self._views

    def look(self) -> None:
        """Look at the files, and at their sizes."""
        self._trouble = None
        try:
            if any(stream.was_replaced() for stream in self._streams.values()):
                self._begin()  # what was read of it is no longer there
            files = sorted(path for path in self._path.iterdir() if is_event_file(path.name))
        except OSError as error:
            self._trouble = f"it cannot be read: {error}"
            return
        for path in files:
            try:
                size = path.stat().st_size
            except OSError as error:  # a link to a file that is gone hides no other file
                self._trouble = f"it cannot be read: {error}"
            else:
                self._streams.setdefault(path, EventStream(path)).size = size

    def read_some(self) -> bool:
        """Read some events that are new; return whether there may be more."""
        # Of the first file that has any.
        return any(map(self._read_some_of, self._streams.values()))

    def _read_some_of(self, stream: EventStream) -> bool:
        before = stream.offset
        try:
            for event in islice(stream, EVENTS_AT_ONCE):
                add_event(self._runs, event)
        except OSError as error:
            self._trouble = f"it cannot be read: {error}"
        if stream.offset > before:
            self._views = None
        return stream.offset > before


def run_directories(folders: Sequence[tuple[str, Path]]) -> Iterator[tuple[Path, str]]:
    """Yield each directory with event files below some folders, with the name of its run.

    The names are those of TensorBoard: the path from the folder, after the name of its group.
    """
    for group, folder in folders:
        seen: set[str] = set()
        for place, below, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:  # a link to a folder above
                below.clear()
                continue
            seen.add(real)
            below.sort(key=natural)
            if any(map(is_event_file, files)):
                yield Path(place), os.path.join(group, os.path.relpath(place, folder))


def is_event_file(name: str) -> bool:
    """Return whether TensorBoard takes a file of this name for one with events."""
    return "tfevents" in name and not name.endswith(".profile-empty")


def natural(name: str) -> list[str | int]:
    """Return a key by which run 2 comes before run 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

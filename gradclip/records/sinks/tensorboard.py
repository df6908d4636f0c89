"""Norm curves in TensorBoard."""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from ..logged_step import LoggedStep
from .base import CadencedSink
from .tags import scalars

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard import SummaryWriter

# Names our event files, so that they come before those that a user's own writer begins later:
# TensorBoard without its data server follows only the last one, and that shall not be ours.
_LOADED_AT = int(time.time())


class TensorBoardSink(CadencedSink):
    """Write scalars for TensorBoard, every step with its own wall time.

    The tags are ``grad_norm/pre``, ``grad_norm/post``, ``grad_norm/threshold`` (where there is
    one), ``grad_norm/clip_rate``, ``grad_norm/nonfinite_steps`` and ``grad_norm/skipped_steps``.
    While this sink is open, another one on the same directory or writer writes
    ``grad_norm_2/...``, and so on.

    Under "Custom Scalars" one chart overlays the norm before and after with the threshold, with
    the clip rate and the steps that were not finite or skipped beside it; a layout of your own in
    the same writer takes the place of this one, or this one of yours: the later counts. Under
    "Text" are the clipper's settings, and ``grad_norm/incidents``: a sentence for each step whose
    norm was not finite, or above the median of the last 100 and ten median deviations, with the
    parameters that are to blame and the norms before. With ``per_parameter`` their norms are in
    ``parameter_norm/<name>``.

    A directory shows one run. A run that is resumed continues the curves there, and one that
    begins again at step 0 replaces them: from the first step it writes on, TensorBoard no longer
    shows the curves that an earlier run wrote under these tags. They stay in the files, and
    visible stay texts, other tags, and those of parameters that are not written again. The
    directory and its event file are made when the first batch is written.

    Next to a ``SummaryWriter`` of your own, rather give that writer than its directory:
    TensorBoard updates only one file per directory where it runs without its data server. Of
    several processes give only one such a sink; of a directory as ``log=`` the first one writes.

    Args:
        where: A local directory, or a ``SummaryWriter``, which stays open at `close`.
        every: Write each step whose index is a multiple of this.
        flush_every: Steps per batch: how many a crash may lose.
        per_parameter: Of how many parameters the norms are written, before clipping: the largest of
            the moment; "all" for all.
        per_parameter_every: Of the steps that are written, those whose norms by parameter are: each
            whose index is a multiple of this, and those that there is something to say of.

    Raises:
        ArgumentError: ``where`` is no local directory or writer, or a number is not positive.
    """

    def __init__(
        self,
        where: str | os.PathLike[str] | SummaryWriter,
        every: int = 1,
        flush_every: int = 100,
        per_parameter: int | str = 0,
        per_parameter_every: int = 1,
    ) -> None:
        from .event_files import destination_of  # not at the top: it imports TensorBoard

        super().__init__(every, flush_every, per_parameter, per_parameter_every)
        self._destination = destination_of(where, _LOADED_AT)
        self._prefix = self._claimed_prefix()
        self._settings: Mapping[str, str] = {}

    def __repr__(self) -> str:
        return f"TensorBoardSink({self._destination.directory!r})"

    def begin(self, settings: Mapping[str, str]) -> None:
        """See `Sink.begin`."""
        self._settings = {**settings}

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`. What there is to say of a step is written at any cadence."""
        numbers = {step.step: scalars(self._prefix, step) for step in self.chosen(steps)}
        points = [
            (step.step, step.wall_time, numbers.get(step.step, ()), step.incident)
            for step in steps
            if step.incident or step.step in numbers
        ]
        if points:
            self._destination.write(self._prefix, points, self._opening)

    def _opening(self, step: int, wall_time: float) -> list[Event]:
        from .charts import opening_events

        prefixes = sorted(_claimed[self._destination.directory])
        return opening_events(step, wall_time, self._prefix, prefixes, self._settings)

    def close(self) -> None:
        """Close the event file with its last sink; a ``SummaryWriter`` stays open."""
        place = (self._destination.directory, self._prefix)
        if _open.get(place) is self:
            del _open[place]
            if all(sink._destination is not self._destination for sink in _open.values()):
                self._destination.close()

    def _claimed_prefix(self) -> str:
        directory = self._destination.directory
        names = itertools.chain(["grad_norm"], (f"grad_norm_{n}" for n in itertools.count(2)))
        prefix = next(name for name in names if (directory, name) not in _open)
        _open[directory, prefix] = self
        _claimed[directory].add(prefix)
        return prefix


_claimed: defaultdict[str, set[str]] = defaultdict(set)
"""By directory, every prefix that a sink there has had."""
_open: WeakValueDictionary[tuple[str, str], TensorBoardSink] = WeakValueDictionary()
"""The open sinks, by directory and prefix."""

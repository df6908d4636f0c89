"""A sink that writes the curves of a clipper for TensorBoard."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakSet

from ..logged_step import LoggedStep
from .base import CadencedSink
from .prefixes import PrefixClaim
from .tags import scalars

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from torch.utils.tensorboard import SummaryWriter

# The names of our event files contain this time, so that they sort before the file of a user's
# writer that is made later: TensorBoard without its data server follows only the last file of a
# directory, and that has to be the user's.
_LOADED_AT = int(time.time())


class TensorBoardSink(CadencedSink):
    """Write scalars for TensorBoard, every step with its own wall time.

    The tags are ``grad_norm/pre``, ``grad_norm/post``, ``grad_norm/threshold`` (if there is a
    single one), ``grad_norm/clip_rate``, ``grad_norm/nonfinite_steps``,
    ``grad_norm/skipped_steps`` and ``grad_norm/loss`` (if losses are given). While this sink is
    open, another one on the same directory or writer writes ``grad_norm_2/...``, and so on.
    <!-- test: tests/logging/test_tensorboard.py -->

    Under "Custom Scalars", one chart overlays the norm before and after with the threshold; others
    show the clip rate, the steps that were not finite or skipped, and the loss, if the first batch
    has one. If the same writer has a layout of your own, the later of the two layouts counts. Under
    "Text" are the settings of the clipper and ``grad_norm/incidents``: a sentence for each step
    whose norm was not finite, or above the median of the last 100 norms plus ten median deviations,
    with the parameters to blame and the norms before; and for each step whose loss was not finite,
    or above the mean of the last 128 losses plus six standard deviations. With ``per_parameter``,
    parameter norms are in ``parameter_norm/<name>``; with ``weights_every``, norms of weights and
    the shares by which they change are in ``weight_norm/<name>`` and ``update_ratio/<name>``.
    <!-- test: tests/logging/test_browser.py; tests/logging/test_incidents.py;
    tests/logging/test_losses.py -->

    A directory shows one run. A resumed run continues its curves, and a run that begins again at
    step 0 replaces them: from its first step on, TensorBoard no longer shows the curves that an
    earlier run wrote under these tags. The old points stay in the files; texts, other tags and
    curves of parameters that are not written again stay visible. The directory and its event file
    are made when the first batch is written.
    <!-- test: tests/logging/test_server.py; tests/logging/test_repeated_runs.py -->

    If you have a ``SummaryWriter`` of your own, give the writer and not its directory: without its
    data server, TensorBoard updates only one file per directory. Give such a sink to only one of
    several processes; with a directory as ``log=``, only the first process writes.
    <!-- test: tests/logging/test_tensorboard.py -k 'writer or data_server';
    tests/ranks/test_ranks.py -k log_of_one -->

    Args:
        where: A local directory, or a ``SummaryWriter``, which stays open.
        every: Write each step whose index is a multiple of this.
        flush_every: Steps per batch: how many a crash may lose.
        per_parameter: How many parameter norms are written with a step: the largest ones, before
            clipping; "all" for all of them.
        per_parameter_every: Parameter norms are written at each step whose index is a multiple of
            this, and at steps with an incident.
        weights_every: Weight norms and update ratios (norm of a parameter's change, divided by its
            norm before the step) are written at each step whose index is a multiple of this; 0 for
            never. They need memory for a copy of the parameters.

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
        weights_every: int = 0,
    ) -> None:
        from .event_files import destination_of  # not at the top: it imports TensorBoard

        super().__init__(every, flush_every, per_parameter, per_parameter_every, weights_every)
        self._destination = destination_of(where, _LOADED_AT)
        self.place = self._destination.directory
        self._prefix = PrefixClaim(self.place)
        _open.add(self)
        self._settings: Mapping[str, str] = {}
        self._has_losses = False
        self._is_new = True

    def __repr__(self) -> str:
        return f"TensorBoardSink({self._destination.directory!r})"

    def begin(self, settings: Mapping[str, str]) -> None:
        """See `Sink.begin`."""
        self._settings = {**settings}
        self._is_new = True  # the settings of an earlier clipper on these curves are out of date

    def follow(self, count_steps: Callable[[], int]) -> None:
        """See `Sink.follow`."""
        self._prefix.begin(count_steps)

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`. Incidents are written at any cadence."""
        prefix = self._prefix.name
        numbers = {step.step: scalars(prefix, step) for step in self.chosen(steps)}
        points = [
            (step.step, step.wall_time, numbers.get(step.step, ()), step.incident)
            for step in steps
            if step.incident or step.step in numbers
        ]
        if points:
            self._has_losses = any(step.loss is not None for step in steps)
            if self._is_new:
                self._is_new = False
                self._destination.reopen(prefix)
            self._destination.write(prefix, points, self._opening)

    def _opening(self, step: int, wall_time: float) -> list[Event]:
        from .charts import CHARTS, CHARTS_WITH_LOSS, opening_events

        prefix, prefixes = self._prefix.name, self._prefix.names
        charts = CHARTS_WITH_LOSS if self._has_losses else CHARTS
        return opening_events(step, wall_time, prefix, prefixes, self._settings, charts)

    def close(self) -> None:
        """Close the event file with its last sink; a ``SummaryWriter`` stays open."""
        self._prefix.release()
        _open.discard(self)
        if all(sink._destination is not self._destination for sink in _open):
            self._destination.close()


_open: WeakSet[TensorBoardSink] = WeakSet()
"""The open sinks."""

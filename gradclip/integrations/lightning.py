"""Clipping as a callback of Lightning's ``Trainer``."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.amp.grad_scaler import GradScaler

from ..checks import checked_count
from ..clipper import GradientClipper
from ..errors import AttachError, StateError
from ..records.sinks.base import Sink
from ..records.sinks.callable import CallableSink
from ..records.sinks.tags import TOTAL
from ..records.sinks.tensorboard import TensorBoardSink
from ..thresholds import Threshold
from .lightning_checks import (
    PACKAGES,
    Untouched,
    check_clipped_elsewhere,
    refuse_joint_scaling,
    refuse_own_clipping,
    refuse_shared_sink,
)
from .options import as_new, checked_options

__all__ = ["GradClipCallback"]

STATE = "clippers"
"""Under which key a checkpoint has the states."""
BY_LIGHTNING = ("log", "log_dict")
"""What a Trainer sets on its callbacks, bound to the model."""


def _callback_classes() -> tuple[type, ...]:
    """Return the ``Callback`` of each package that is installed.

    Raises:
        ImportError: Neither can be imported.
    """
    found, failures = [], []
    for package in PACKAGES:
        try:
            found.append(import_module(package).Callback)
        except ImportError as error:
            failures.append(error)
    if not found:
        raise ImportError(
            "gradclip.integrations.lightning needs lightning or pytorch_lightning, and neither "
            f"can be imported ({'; '.join(map(str, failures))}): "
            'pip install "gradclip[lightning]".'
        ) from failures[0]
    return tuple(found)


if TYPE_CHECKING:
    _Callback = object
else:
    # A Trainer of either package takes it, whichever was imported first.
    _Callback = type("_Callback", _callback_classes(), {})


class GradClipCallback(_Callback):
    """Clip every step of a ``Trainer``'s optimizers, and log the norms where it logs.

    For the ``Trainer`` of ``lightning`` and that of ``pytorch_lightning``, with automatic and
    manual optimization, accumulated batches, mixed precision and any strategy whose gradients
    gradclip knows. The clippers are attached when a fit starts and closed when it ends, also by an
    exception; outside of ``fit`` the callback does nothing.

    Several optimizers, which Lightning has under manual optimization alone, get a clipper each
    with a norm, a threshold, counters and curves of its own: they mostly have losses of their own
    and step one after the other, as those of a GAN do, so that no moment has all the gradients of
    one norm. ``joint=True`` is for optimizers that divide one model and one loss among them.

    A checkpoint has the clippers' states, and a run that is resumed from it makes the same
    decisions and continues its curves. So does a second ``fit`` of the same trainer; for another
    trainer the callback begins anew, as does a copy of it. The index of a step is that of
    ``trainer.global_step`` for one optimizer, and the number of its own steps for each of several;
    a step that ``GradScaler`` leaves out for its overflow is in ``global_step`` alone.

    Optimizers that are replaced during a fit are clipped from the next batch on, by clippers that
    continue those of the old ones.

    ``LearningRateFinder`` and ``BatchSizeFinder`` set all callbacks aside while they try at the
    start of a fit: those steps are neither clipped nor counted.

    >>> from gradclip.integrations.lightning import GradClipCallback
    >>> callback = GradClipCallback(1.0, nonfinite="skip")
    >>> # Trainer(callbacks=[callback]).fit(module, data)
    >>> callback.clippers
    []

    Args:
        max_norm: As `GradientClipper` takes it. A rule that learns is copied for each clipper.
        log: True for the loggers of the trainer: to TensorBoard as a `TensorBoardSink` writes, with
            the overlay and the incidents, to others by `CallableSink`, with the same names. Or what
            `GradientClipper` takes, a list in which True may be, or None. With several optimizers
            the names of the second begin with ``grad_norm_2``, and so on. Of several processes
            the first one logs.
        every: Which steps the trainer's loggers get: each whose index is a multiple of this; None
            for ``trainer.log_every_n_steps``. They arrive in batches of 100 and at the end of
            each epoch.
        joint: Whether several optimizers share one clipper and its norm.
        model: Names the parameters; by default the LightningModule.
        grad_scaler: By default that of the precision plugin.
        options: The other options of `GradientClipper`, for each clipper.

    Raises:
        ArgumentError: An option that cannot be meant; at the start of a fit: the trainer has a
            ``gradient_clip_val`` or ``gradient_clip_algorithm``, or one sink is to serve several
            clippers.
        AttachError: At the start of a fit: an optimizer or a strategy that cannot be clipped.
        StateError: At the start of a fit: the checkpoint is of other clippers.
        TypeError: `GradientClipper` has no such option.

    Warns:
        UserWarning: The module overrides ``configure_gradient_clipping``, which Lightning calls
            before each step, without a ``gradient_clip_val`` as well; under manual optimization it
            writes to its gradients before the first step, as ``self.clip_gradients()`` does; an
            optimizer was replaced by one that the state of its clipper does not fit.
    """

    def __init__(
        self,
        max_norm: float | Threshold | Callable[[int], float | None] | None,
        *,
        log: Any = True,
        every: int | None = None,
        joint: bool = False,
        model: nn.Module | None = None,
        grad_scaler: GradScaler | None = None,
        **options: Any,
    ) -> None:
        self._logs = [*log] if isinstance(log, list | tuple) else [log]
        own = [each for each in self._logs if each is not True]
        self._threshold = checked_options(max_norm, {**options, "log": own})
        self._every = None if every is None else checked_count("every", every, 1)
        self._joint = joint
        self._model, self._grad_scaler = model, grad_scaler
        self._options = options
        self._stage: str | None = None
        self._attached = False
        self._loaded: list[Mapping[str, Any]] | None = None
        self._trainer: weakref.ref[Any] | None = None
        self._optimizers: list[Any] = []
        self._untouched: Untouched | None = None
        self.clippers: list[GradientClipper] = []
        """Those of the running or the last fit, one for each optimizer; one if they are joint."""

    # Their life

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a trainer that clips as well; called by the trainer."""
        self._stage = stage
        if stage == "fit":
            refuse_own_clipping(trainer)
            check_clipped_elsewhere(trainer.strategy, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the clippers; called by the trainer, before it loads the optimizers' states."""
        self._attach(trainer, pl_module, self._states_for(trainer))
        self._trainer, self._loaded = weakref.ref(trainer), None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from where the trainer does, if no state has said; called by the trainer."""
        refuse_own_clipping(trainer)  # other callbacks can have set it
        _count_on(self.clippers, trainer)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow a trainer whose optimizers were replaced; called by the trainer."""
        if [*map(id, trainer.optimizers)] == [*map(id, self._optimizers)]:
            return
        states = self.state_dict().get(STATE, ())
        self._close()
        self._attach(trainer, pl_module, None)
        for clipper, state in zip(self.clippers, states, strict=False):
            try:
                clipper.load_state_dict(state)
            except StateError as error:
                what = f"An optimizer was replaced by one whose clipper begins anew: {error}"
                warnings.warn(what, UserWarning, stacklevel=2)
        _count_on(self.clippers, trainer)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Look at the gradients as they are computed; called by the trainer."""
        if self._untouched is not None:
            self._untouched.after_backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Look at the gradients as they are to be clipped; called by the trainer."""
        if not any(optimizer is each for each in self._optimizers):
            raise AttachError(
                f"This {type(optimizer).__name__} came into the fit within a batch and has no "
                "clipper: replace optimizers before a batch begins, as in on_train_epoch_start."
            )
        if self._untouched is not None:
            self._untouched.before_step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is left to the logs; called by the trainer. Host sync."""
        for clipper in self.clippers:
            clipper.flush()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the clippers; called by the trainer."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the clippers; called by the trainer."""
        self._end()

    def _attach(
        self, trainer: Any, module: Any, states: Sequence[Mapping[str, Any]] | None
    ) -> None:
        scaler = self._grad_scaler or getattr(trainer.precision_plugin, "scaler", None)
        model = module if self._model is None else self._model
        given: list[Any] = [[each] for each in trainer.optimizers]
        if self._joint and len(given) > 1:
            given = [trainer.optimizers]
            refuse_joint_scaling(scaler)
        refuse_shared_sink(self._logs, len(given))
        with ExitStack() as attached:
            clippers = []
            for index, optimizers in enumerate(given):
                clipper = GradientClipper(
                    optimizers,
                    as_new(self._threshold),
                    log=self._sinks(trainer, index),
                    model=model,
                    grad_scaler=scaler,
                    **self._options,
                )
                clippers.append(attached.enter_context(clipper))
            if states is not None:
                _load(clippers, states)
            attached.pop_all()
        self.clippers, self._attached = clippers, True
        self._optimizers = [*trainer.optimizers]
        self._untouched = Untouched(module, scaled=scaler is not None)

    def _end(self) -> None:
        self._stage, self._attached = None, False
        self._close()

    def _close(self) -> None:
        self._optimizers = []
        for clipper in self.clippers:
            clipper.close()

    # Their states

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the clippers, empty if there are none; for checkpoints. Host sync.

        It loads with ``weights_only=True``.
        """
        if self._loaded is not None:
            return {STATE: self._loaded}
        return {STATE: [each.state_dict() for each in self.clippers]} if self.clippers else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; before a fit, it waits for the clippers.

        What a checkpoint holds that is only evaluated is not taken.

        Raises:
            StateError: It is no such state, or of other clippers than there are.
        """
        states = _parsed(state_dict)
        if self._stage not in (None, "fit"):
            return
        if self._attached:
            _load(self.clippers, states)
        else:
            self._loaded = states

    def _states_for(self, trainer: Any) -> Sequence[Mapping[str, Any]] | None:
        """Return what the clippers of a fit begin with."""
        if self._loaded is None and (self._trainer is None or self._trainer() is not trainer):
            return None
        return self.state_dict().get(STATE)

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"clippers": [], "_attached": False, "_trainer": None, "_stage": None}
        left_out |= {"_optimizers": [], "_untouched": None}
        kept = {name: each for name, each in vars(self).items() if name not in BY_LIGHTNING}
        return {**kept, **left_out}

    # What they are given

    def _sinks(self, trainer: Any, index: int) -> list[Any]:
        """Return the logs of a clipper; on ranks other than the first there are none."""
        if not trainer.is_global_zero:
            return []
        every = self._every or trainer.log_every_n_steps
        loggers = trainer.loggers if every else []
        prefix = TOTAL if index == 0 else f"{TOTAL}_{index + 1}"
        logs: list[Any] = []
        for log in self._logs:
            if log is True:
                logs += [_sink_of(logger, every, prefix) for logger in loggers]
            else:
                logs.append(log)
        return logs


def _sink_of(logger: Any, every: int, prefix: str) -> Sink:
    """Return the sink that writes to a trainer's logger."""
    from torch.utils.tensorboard import SummaryWriter  # not at the top: it imports TensorBoard

    writer = getattr(logger, "experiment", None)
    if isinstance(writer, SummaryWriter):
        return TensorBoardSink(writer, every)
    return CallableSink(
        lambda numbers, step: logger.log_metrics(numbers, step), every, prefix=prefix
    )


def _count_on(clippers: Sequence[GradientClipper], trainer: Any) -> None:
    for clipper in clippers:
        if clipper.steps == 0:
            clipper.steps = trainer.global_step // len(trainer.optimizers)


def _parsed(state: object) -> list[Mapping[str, Any]]:
    found = state.get(STATE) if isinstance(state, Mapping) else None
    if not isinstance(found, list):
        keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise StateError(
            f"state_dict has {keys}, needed is the key {STATE!r} with a list: give what "
            "GradClipCallback.state_dict() returned. Nothing was loaded."
        )
    return found


def _load(clippers: Sequence[GradientClipper], states: Sequence[Mapping[str, Any]]) -> None:
    if len(states) != len(clippers):
        raise StateError(
            f"The state is of {len(states)} clippers, and there are {len(clippers)}: resume with "
            "the optimizers and the joint= it was saved with. Nothing was loaded."
        )
    for clipper, state in zip(clippers, states, strict=True):
        clipper.load_state_dict(state)

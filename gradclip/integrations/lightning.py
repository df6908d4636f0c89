"""A callback that clips in the ``Trainer`` of PyTorch Lightning."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from ..checks import checked_count
from ..clipper import GradientClipper
from ..errors import AttachError, StateError
from ..records.losses import loss_or_none
from ..records.sinks.base import Sink
from ..records.sinks.callable import CallableSink
from ..records.sinks.tags import TOTAL
from ..records.sinks.tensorboard import TensorBoardSink
from ..thresholds import MaxNorm
from .lightning_checks import (
    PACKAGES,
    ManualClippingWatch,
    check_strategy_and_module,
    refuse_joint_scaling,
    refuse_own_clipping,
    refuse_shared_sink,
)
from .options import as_new, checked_options

__all__ = ["GradClipCallback"]

STATE = "clippers"
"""The key of the clippers' states in a checkpoint."""
SET_BY_TRAINER = ("log", "log_dict")
"""Attributes that a Trainer sets on its callbacks: methods of the model, not to be copied."""


def _callback_classes() -> tuple[type, ...]:
    """Return the ``Callback`` of each package that is installed.

    Raises:
        ImportError: Neither can be imported.
    """
    classes, failures = [], []
    for package in PACKAGES:
        try:
            classes.append(import_module(package).Callback)
        except ImportError as error:
            failures.append(error)
    if not classes:
        raise ImportError(
            "gradclip.integrations.lightning needs lightning or pytorch_lightning, and neither "
            f"can be imported ({'; '.join(map(str, failures))}): "
            'pip install "gradclip[lightning]".'
        ) from failures[0]
    return tuple(classes)


if TYPE_CHECKING:
    _Callback = object
else:
    # Derived from both, so that a Trainer of either package takes it.
    _Callback = type("_Callback", _callback_classes(), {})


class GradClipCallback(_Callback):
    """Clip every step of a ``Trainer``'s optimizers, and log the norms to its loggers.

    For the ``Trainer`` of ``lightning`` and that of ``pytorch_lightning``, with automatic and
    manual optimization, accumulated batches, mixed precision, and any strategy whose gradients
    gradclip can measure. The clippers attach when a fit starts and close when it ends, also by an
    exception; outside of ``fit`` the callback does nothing.
    <!-- test: tests/integrations/test_lightning_fits.py -->

    Several optimizers, which Lightning allows under manual optimization alone, get a clipper each,
    with a norm, a threshold, counters and curves of its own. Most of them have a loss of their own
    and step one after the other, as in a GAN, so that the gradients of a joint norm never exist
    together. ``joint=True`` is for optimizers that share one model and one loss.
    <!-- test: tests/integrations/test_lightning.py -k optimizers -->

    A checkpoint holds the states of the clippers: a run that is resumed from it makes the same
    decisions and continues its curves. So does a second ``fit`` of the same trainer. With another
    trainer the callback starts afresh, and so does a copy of it. The index of a step is that of
    ``trainer.global_step`` for one optimizer, and the number of its own steps for each of several;
    a step that ``GradScaler`` skips for its overflow counts in ``global_step`` alone.
    <!-- test: tests/integrations/test_lightning_fits.py -k resumed -->

    Under automatic optimization the loss of a step is the mean over its accumulated batches, on
    this rank. Under manual optimization with one clipper it is the loss of the last backward pass;
    with several, assign ``callback.clippers[i].loss`` in ``training_step`` after the backward pass.
    <!-- test: tests/integrations/test_lightning.py -k loss -->

    If optimizers are replaced during a fit, clippers of the new ones continue the old ones from
    the next batch on.
    <!-- test: tests/integrations/test_lightning_fits.py -k replaced -->

    ``LearningRateFinder`` and ``BatchSizeFinder`` put all callbacks aside during their trial steps
    at the start of a fit: these steps are neither clipped nor counted.
    <!-- test: tests/integrations/test_lightning_fits.py -k tuners -->

    Examples:
        >>> from gradclip.integrations.lightning import GradClipCallback
        >>> callback = GradClipCallback(1.0, nonfinite="skip")
        >>> # Trainer(callbacks=[callback]).fit(module, data)
        >>> callback.clippers
        []

    Args:
        max_norm: As for `GradientClipper`. A rule that learns is copied for each clipper.
        log: True for the loggers of the trainer: TensorBoard gets what a `TensorBoardSink` writes,
            with the overlay and the incidents, and others get a `CallableSink` with the same
            names. Or what `GradientClipper` takes, a list that may hold True, or None. With
            several optimizers the names of the second begin with ``grad_norm_2``, and so on. Of
            several processes the first one logs.
        every: The trainer's loggers get each step whose index is a multiple of this; None for
            ``trainer.log_every_n_steps``. They get them in batches of 100 and at the end of each
            epoch.
        joint: Whether several optimizers share one clipper and its norm.
        model: Names the parameters; by default the LightningModule.
        grad_scaler: By default that of the precision plugin.
        options: The other options of `GradientClipper`, for each clipper.

    Raises:
        ArgumentError: An invalid option; at the start of a fit: the trainer has a
            ``gradient_clip_val`` or ``gradient_clip_algorithm``, or one sink would serve several
            clippers.
        AttachError: At the start of a fit: an optimizer or a strategy that cannot be clipped.
        StateError: At the start of a fit: the checkpoint is of other clippers.
        TypeError: `GradientClipper` has no such option.

    Warns:
        UserWarning: The module overrides ``configure_gradient_clipping``, which Lightning calls
            before each step, also without a ``gradient_clip_val``; under manual optimization the
            module writes to its gradients before the first step, as ``self.clip_gradients()``
            does; an optimizer was replaced by one that the state of its clipper does not fit.

    <!-- test: tests/integrations/test_lightning.py -k 'refusals or module_that' -->
    """

    def __init__(
        self,
        max_norm: MaxNorm,
        *,
        log: Any = True,
        every: int | None = None,
        joint: bool = False,
        model: nn.Module | None = None,
        grad_scaler: GradScaler | None = None,
        **options: Any,
    ) -> None:
        self._logs = [*log] if isinstance(log, list | tuple) else [log]
        sinks = [each for each in self._logs if each is not True]
        self._threshold = checked_options(max_norm, {**options, "log": sinks})
        self._every = None if every is None else checked_count("every", every, 1)
        self._joint = joint
        self._model, self._grad_scaler = model, grad_scaler
        self._options = options
        self._stage: str | None = None
        self._started = False
        self._loaded: list[Mapping[str, Any]] | None = None
        self._trainer: weakref.ref[Any] | None = None
        self._optimizers: list[Any] = []
        self._watch: ManualClippingWatch | None = None
        self._loss_before: Any = None
        """Loss of the batches that were accumulated before this one."""
        self._has_stepped = False
        """Whether this batch, or the last one, has come to a step."""
        self.clippers: list[GradientClipper] = []
        """The clippers of this fit or the last, one for each optimizer, or one with ``joint``."""

    # The life of the clippers

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a trainer that clips by itself; called by the trainer."""
        self._stage = stage
        if stage == "fit":
            refuse_own_clipping(trainer)
            check_strategy_and_module(trainer.strategy, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the clippers; called by the trainer, before it loads the optimizers' states."""
        self._loaded = self._states_for(trainer)
        self._attach(trainer, pl_module)
        self._trainer = weakref.ref(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Load a state, or count on from the trainer's step; called by the trainer.

        Only now: after ``on_fit_start`` of this callback, that of another one may have given the
        optimizers the parameter groups of a checkpoint, as that of ``BaseFinetuning`` does.
        <!-- test: tests/integrations/test_lightning_fits.py -k groups_that_a_callback -->
        """
        refuse_own_clipping(trainer)  # another callback may have set it since
        if self._loaded is not None:
            _load(self.clippers, self._loaded)
            self._loaded = None
        self._started = True
        _count_on(self.clippers, trainer)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Attach to optimizers that were replaced; called by the trainer."""
        self._loss_before = None
        if len(self.clippers) == 1 and pl_module.automatic_optimization and not self._has_stepped:
            self._loss_before = self.clippers[0].loss
        self._has_stepped = False
        if [*map(id, trainer.optimizers)] == [*map(id, self._optimizers)]:
            return
        states = self.state_dict().get(STATE, ())
        self._close()
        self._attach(trainer, pl_module)
        for clipper, state in zip(self.clippers, states, strict=False):
            try:
                clipper.load_state_dict(state)
            except StateError as error:
                message = f"An optimizer was replaced by one whose clipper begins anew: {error}"
                warnings.warn(message, UserWarning, stacklevel=2)
        _count_on(self.clippers, trainer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Take the loss of a batch; called by the trainer. No host sync."""
        if len(self.clippers) != 1:
            return
        loss = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))  # Lightning has scaled it already
        # Lightning divides by the number of batches that it accumulates, so that their sum is a
        # mean. A closure that is evaluated again begins anew with its batch.
        before = self._loss_before
        self.clippers[0].loss = loss_or_none(loss if before is None else loss + before)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Remember the gradients as they were computed; called by the trainer."""
        if self._watch is not None:
            self._watch.after_backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Refuse an unknown optimizer, and check the gradients; called by the trainer."""
        self._has_stepped = True
        if not any(optimizer is each for each in self._optimizers):
            raise AttachError(
                f"This {type(optimizer).__name__} was added within a batch and has no clipper: "
                "replace optimizers before a batch begins, as in on_train_epoch_start."
            )
        if self._watch is not None:
            self._watch.before_step()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the steps so far to the logs; called by the trainer. Host sync."""
        for clipper in self.clippers:
            clipper.flush()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the clippers; called by the trainer."""
        self._end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the clippers; called by the trainer."""
        self._end()

    def _attach(self, trainer: Any, module: Any) -> None:
        scaler = self._grad_scaler or getattr(trainer.precision_plugin, "scaler", None)
        model = module if self._model is None else self._model
        groups: list[Any] = [[optimizer] for optimizer in trainer.optimizers]
        if self._joint and len(groups) > 1:
            groups = [trainer.optimizers]
            refuse_joint_scaling(scaler)
        refuse_shared_sink(self._logs, len(groups))
        with ExitStack() as attached:  # detaches the first ones if a later one is refused
            clippers = []
            for index, optimizers in enumerate(groups):
                clipper = GradientClipper(
                    optimizers,
                    as_new(self._threshold),
                    log=self._sinks(trainer, index),
                    model=model,
                    grad_scaler=scaler,
                    **self._options,
                )
                clippers.append(attached.enter_context(clipper))
            attached.pop_all()
        self.clippers = clippers
        self._optimizers = [*trainer.optimizers]
        self._watch = ManualClippingWatch(module, scaled=scaler is not None)

    def _end(self) -> None:
        self._stage, self._started = None, False
        self._close()

    def _close(self) -> None:
        self._optimizers = []
        for clipper in self.clippers:
            clipper.close()

    # The states of the clippers

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the clippers for a checkpoint; empty if there are none. Host sync.

        It loads with ``weights_only=True``.
        <!-- test: tests/integrations/test_lightning_fits.py -k resumed -->
        """
        if self._loaded is not None:
            return {STATE: self._loaded}
        return {STATE: [each.state_dict() for each in self.clippers]} if self.clippers else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned; before a fit it waits for the clippers.

        The state of a checkpoint that is only evaluated is ignored.
        <!-- test: tests/integrations/test_lightning_fits.py -k evaluation;
        tests/integrations/test_lightning.py -k invalid_states -->

        Raises:
            StateError: It is not such a state, or one of other clippers.
        """
        states = _parsed(state_dict)
        if self._stage not in (None, "fit"):
            return
        if self._started:
            _load(self.clippers, states)
        else:
            self._loaded = states

    def _states_for(self, trainer: Any) -> list[Mapping[str, Any]] | None:
        """Return the states that the clippers of a fit continue; None to begin anew."""
        if self._loaded is None and (self._trainer is None or self._trainer() is not trainer):
            return None
        return self.state_dict().get(STATE)

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and a state that waits: a copy is attached to nothing."""
        reset = {"clippers": [], "_started": False, "_trainer": None, "_stage": None}
        reset |= {"_optimizers": [], "_watch": None, "_loss_before": None, "_has_stepped": False}
        kept = {name: value for name, value in vars(self).items() if name not in SET_BY_TRAINER}
        return {**kept, **reset}

    # The logs of the clippers

    def _sinks(self, trainer: Any, index: int) -> list[Any]:
        """Return the logs of a clipper; none on ranks other than the first."""
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
    """Return a sink that writes to a trainer's logger."""
    from torch.utils.tensorboard import SummaryWriter  # here: TensorBoard need not be installed

    writer = getattr(logger, "experiment", None)
    if isinstance(writer, SummaryWriter):
        return TensorBoardSink(writer, every)
    return CallableSink(
        lambda numbers, step: logger.log_metrics(numbers, step), every, prefix=prefix
    )


def _count_on(clippers: Sequence[GradientClipper], trainer: Any) -> None:
    """Count from the trainer's step on, where no step was counted."""
    for clipper in clippers:
        if clipper.steps == 0:
            clipper.steps = trainer.global_step // len(trainer.optimizers)


def _parsed(state: object) -> list[Mapping[str, Any]]:
    states = state.get(STATE) if isinstance(state, Mapping) else None
    if not isinstance(states, list):
        keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise StateError(
            f"state_dict has {keys}, needed is the key {STATE!r} with a list: give what "
            "GradClipCallback.state_dict() returned. Nothing was loaded."
        )
    return states


def _load(clippers: Sequence[GradientClipper], states: Sequence[Mapping[str, Any]]) -> None:
    if len(states) != len(clippers):
        raise StateError(
            f"The state is of {len(states)} clippers, and there are {len(clippers)}: resume with "
            "the optimizers and the joint= that it was saved with. Nothing was loaded."
        )
    for clipper, state in zip(clippers, states, strict=True):
        clipper.load_state_dict(state)

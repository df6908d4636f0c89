"""A callback that clips in the ``Trainer`` of Hugging Face Transformers.

trainer = Trainer(
    model,
    TrainingArguments("out", max_grad_norm=0),
    train_dataset=data,
    callbacks=[GradClipCallback(1.0)],
)
"""

from __future__ import annotations

import base64
import io
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from ..clipper import GradientClipper
from ..errors import ArgumentError, AttachError, StateError
from ..gradients.held import parameters_of
from ..optimizers.call_stack import locals_of
from ..records.logged_step import LoggedStep
from ..records.losses import loss_or_none
from ..records.sinks.base import Sink
from ..records.sinks.tags import TOTAL, scalars
from ..thresholds import MaxNorm, learns
from .options import as_new, checked_options

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import (
        CallbackHandler,
        ExportableState,
    )
except ImportError as error:
    raise ImportError(
        "gradclip.integrations.transformers needs Hugging Face Transformers, which could not be "
        f'imported ({error}): pip install "gradclip[transformers]"'
    ) from error

__all__ = ["GradClipCallback"]

# The method of the Trainer that has the loss of a batch, as ``tr_loss_step``.
_LOOP = getattr(Trainer, "_run_epoch", Trainer._inner_training_loop).__code__
_AS_GIVEN = "as given to the callback that is restored"
"""Stands for ``max_norm`` in a checkpoint, which is JSON and can hold no rule."""


class GradClipCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Clip the gradients at every step of a ``Trainer``, and record their norms.

    The Trainer's own clipping has to be off, ``TrainingArguments(max_grad_norm=0)``. It measures
    the norm all the same and logs it as ``grad_norm``, in the precision of the gradients.
    <!-- test: tests/integrations/test_transformers.py -k trainer_clips -->

    At each step that the Trainer logs, ``trainer.state.log_history`` has the norm before and after,
    the threshold, the clip rate and the counts of non-finite and of skipped steps, as
    ``grad_norm/pre`` and so on, and so has whatever the Trainer reports to. With ``log`` all steps
    are logged there instead. The loss of a step, ``grad_norm/loss``, is the sum of those that the
    Trainer adds up over its accumulated batches, on this rank and not averaged over steps.
    <!-- test: tests/integrations/test_transformers.py -k 'history or loss or log' -->

    A checkpoint holds the clipper's counters and what its rule has learned, and
    ``train(resume_from_checkpoint=...)`` continues exactly. Any other ``train()`` begins anew. The
    clipper attaches when training begins and detaches when it ends; after an error, the next
    training or `close` detaches it.
    <!-- test: tests/integrations/test_transformers.py -k 'resumed or second or after_an_error' -->

    Args:
        max_norm: As for `GradientClipper`. Each training gets a copy of a rule.
        **options: Options of `GradientClipper`, except for ``model``, which is the Trainer's. Sinks
            in ``log`` are closed at the end of a training, and the next one writes to them again.

    Raises:
        ArgumentError: An invalid option.
        EngineUnavailableError: An engine that this installation lacks.
        TypeError: An option that `GradientClipper` does not have.
    """

    _asked: ClassVar[Callable[[], GradClipCallback | None]] = staticmethod(lambda: None)
    """Returns the callback whose state was asked for last, by a weak reference."""

    def __init__(self, max_norm: MaxNorm, **options: Any) -> None:
        restored = type(self)._asked() if _is_placeholder(max_norm) else None
        if restored is not None:
            # To restore a callback, Transformers asks it for its state, and makes a new one of the
            # arguments in there: the new one goes on as the old one, whose rule is no JSON.
            self.__dict__ = restored.__dict__
            return
        if "model" in options:
            raise ArgumentError(
                "model was given, and the names of the parameters are those of the Trainer's "
                "model: leave it out."
            )
        self._threshold = checked_options(max_norm, options)
        self._options = options
        self._newest: _Newest | None = None
        self._clipper: GradientClipper | None = None

    @property
    def clipper(self) -> GradientClipper | None:
        """The clipper of this training or the last one; None before the first."""
        return self._clipper

    def close(self) -> None:
        """Detach the clipper and close its logs, as the end of a training does."""
        if self._clipper is not None:
            self._clipper.close()

    # Methods that the Trainer calls

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach a clipper to the optimizer.

        Raises:
            ArgumentError: The Trainer clips by itself.
            AttachError: The optimizer cannot be clipped.

        <!-- test: tests/integrations/test_transformers.py -k 'trainer_clips or stand_in' -->
        """
        self.close()
        _refuse_own_clipping(args.max_grad_norm)
        _refuse_foreign_parameters(model, optimizer)
        _go_first(self)
        options = {**self._options}
        if options.get("log") is None:
            options["log"] = self._newest = _Newest()
        self._clipper = GradientClipper(optimizer, as_new(self._threshold), model=model, **options)
        self._restore(self._clipper, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the loss of a step that a GradScaler has skipped."""
        if self._clipper is not None:
            self._clipper.loss = None

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the loss of a batch that is accumulated. No host sync."""
        self._add_loss()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the loss of the last batch before the step. No host sync."""
        self._add_loss()

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the newest step to the Trainer's log of a step."""
        if logs is None or "loss" not in logs or self._clipper is None or self._newest is None:
            return
        self._clipper.flush()
        numbers = self._newest.take()
        logs.update(numbers)
        history = state.log_history
        if history and history[-1].get("step") == state.global_step:
            history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach the clipper."""
        self.close()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint. Host sync."""
        type(self)._asked = staticmethod(weakref.ref(self))
        saved = None if self._clipper is None else _packed(self._clipper.state_dict())
        return {"args": {"max_norm": _AS_GIVEN}, "attributes": {}, "clipper": saved}

    def __getstate__(self) -> dict[str, Any]:
        """Return the options alone: a copy begins anew."""
        return {**vars(self), "_clipper": None, "_newest": None}

    def _add_loss(self) -> None:
        """Add the loss of the newest batch to that of the step.

        No event has it as an argument: it is a variable of the Trainer's loop, on the device.
        """
        clipper, loss = self._clipper, next(locals_of(_LOOP, "tr_loss_step"), None)
        if clipper is not None and loss is not None:
            clipper.loss = loss_or_none(loss if clipper.loss is None else clipper.loss + loss)

    def _restore(self, clipper: GradientClipper, state: Any) -> None:
        """Load the clipper's state from a checkpoint, if the training is resumed from one."""
        # The Trainer writes under this key later, and fails if a checkpoint without it was loaded.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, {})
        if not state.global_step:
            return
        packed = saved.get("clipper") if isinstance(saved, dict) else None
        clipper.steps = state.global_step
        if packed is not None:
            try:
                clipper.load_state_dict(_unpacked(packed))
            except StateError as error:
                _warn(
                    f"The checkpoint is of another clipper, so that this one begins anew: {error}"
                )
        elif learns(self._threshold):
            _warn(
                "The checkpoint has no state of a clipper, so that its rule begins to learn anew: "
                "give a checkpoint of a training with this callback to continue exactly."
            )


class _Newest(Sink):
    """A sink that keeps the newest step until it is logged."""

    def __init__(self) -> None:
        self._step: LoggedStep | None = None

    def write(self, steps: Sequence[LoggedStep]) -> None:
        self._step = steps[-1]

    def take(self) -> dict[str, float]:
        """Return the numbers of the newest step; empty if they were taken before."""
        step, self._step = self._step, None
        return {} if step is None else dict(scalars(TOTAL, step))


def _is_placeholder(max_norm: object) -> bool:
    return isinstance(max_norm, str) and max_norm == _AS_GIVEN


def _refuse_own_clipping(max_grad_norm: float | None) -> None:
    if max_grad_norm is None or max_grad_norm > 0:
        effect = "fails at its first step" if max_grad_norm is None else "clips by itself before"
        raise ArgumentError(
            f"TrainingArguments has max_grad_norm={max_grad_norm}, with which the Trainer {effect}"
            ": give max_grad_norm=0 with GradClipCallback."
        )


def _refuse_foreign_parameters(model: nn.Module | None, optimizer: Any) -> None:
    """Refuse a stand-in for optimizers that step inside ``backward()``."""
    if model is None or not isinstance(optimizer, Optimizer):
        return
    model_ids = {id(parameter) for parameter in model.parameters()}
    if not any(id(held) in model_ids for held in parameters_of(optimizer.param_groups)):
        inner = getattr(optimizer, "optimizer", optimizer)
        raise AttachError(
            f"{type(inner).__name__} holds no parameter of the model, as if each layer had an "
            "optimizer that steps inside backward(), before a norm over all gradients is known: "
            "choose another optim= in TrainingArguments, one that is not layerwise."
        )


def _go_first(callback: GradClipCallback) -> None:
    """Put a callback before those that report the logs, to which it adds numbers.

    No argument of a callback leads to the handler of all: it is found on the call stack.
    """
    for handler in locals_of(CallbackHandler.call_event.__code__, "self"):
        others = [other for other in handler.callbacks if other is not callback]
        handler.callbacks = [callback, *others]
        return


def _packed(state: Mapping[str, Any]) -> str:
    """Return a state as text: a checkpoint holds callbacks as JSON."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _unpacked(text: str) -> Any:
    return torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)

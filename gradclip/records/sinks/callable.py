"""A sink that passes the numbers of each step to a function of the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...errors import ArgumentError
from ..logged_step import LoggedStep
from .base import CadencedSink
from .tags import INDEX, scalars


class CallableSink(CadencedSink):
    """Call a logger with the numbers of each step: ``log({"grad_norm/pre": 2.5, ...}, step)``.

    The names are those of the curves in TensorBoard. Batches arrive after their steps were taken,
    and some loggers, such as Weights & Biases, drop points that are older than their newest step.
    For them the dict also has the index of the step, ``grad_norm/step``.
    <!-- test: tests/logging/test_callable.py -->

    Examples:
        >>> import gradclip, torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> def log(numbers, step):
        ...     print(step, numbers["grad_norm/pre"])
        >>> with gradclip.GradientClipper(optimizer, 1.0, log=gradclip.CallableSink(log)):
        ...     optimizer.step()
        0 0.0

        With Weights & Biases, whose ``run`` is the object that ``wandb.init()`` returned:

        ```python
        for names in ("grad_norm/*", "parameter_norm/*", "weight_norm/*", "update_ratio/*"):
            run.define_metric(names, step_metric="grad_norm/step")
        sink = gradclip.CallableSink(lambda numbers, step: run.log(numbers))
        ```

    Args:
        log: Called with a dict of numbers and the index of the step, in the order of the steps.
        every: Log each step whose index is a multiple of this.
        flush_every: Steps per batch.
        prefix: Beginning of the names.
        per_parameter: How many parameter norms are logged with a step: the largest ones, before
            clipping; "all" for all of them.
        per_parameter_every: Parameter norms are logged at each step whose index is a multiple of
            this, and at steps with an incident.
        weights_every: Weight norms and update ratios (norm of a parameter's change, divided by its
            norm before the step) are logged at each step whose index is a multiple of this; 0 for
            never. They need memory for a copy of the parameters.

    Raises:
        ArgumentError: ``log`` is not callable, or a number is not positive.

    <!-- test: tests/contracts/sinks/test_contract.py -->
    """

    def __init__(
        self,
        log: Callable[[dict[str, float], int], object],
        every: int = 1,
        flush_every: int = 100,
        prefix: str = "grad_norm",
        per_parameter: int | str = 0,
        per_parameter_every: int = 1,
        weights_every: int = 0,
    ) -> None:
        super().__init__(every, flush_every, per_parameter, per_parameter_every, weights_every)
        if not callable(log) or isinstance(log, type):
            raise ArgumentError(
                f"log is {log!r}: give a function of a dict of numbers and the index of a step."
            )
        self._log = log
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"CallableSink({self._log!r})"

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`."""
        for step in self.chosen(steps):
            index = {f"{self._prefix}/{INDEX}": step.step}
            self._log({**index, **dict(scalars(self._prefix, step))}, step.step)

"""The ``ranks=`` option: the processes that share one model, and its replicated parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed

from ..errors import ArgumentError, AttachError
from ..scopes.naming import ParameterChoice, ParameterSelection
from .groups import RankGroup, in_process_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Ranks:
    """The ranks that one norm spans, for parameters that are spread without DTensors.

    Examples are the stages of a pipeline, the shards of Megatron-LM, and the flat parameters of
    ``FullyShardedDataParallel``. DTensors need no `Ranks`, nor does DistributedDataParallel, whose
    gradients are whole on every rank.
    <!-- test: tests/ranks/test_ranks.py; tests/ranks/test_pipeline.py;
    tests/ranks/test_wrappers.py -->

    All ranks attach a clipper with the same options, and all step together, also a rank without a
    gradient or a parameter. Parameters are matched across ranks by name: equal names are parts of
    one parameter, except for copies.
    <!-- test: tests/ranks/test_agreement.py -->

    Examples:
        >>> import gradclip
        >>> gradclip.Ranks(replicated="*.norm.weight")
        Ranks(replicated='*.norm.weight')

    Args:
        group: A ``torch.distributed.ProcessGroup``, a ``DeviceMesh`` of one dimension, or None for
            all ranks.
        replicated: Parameters whose gradient is the same on several ranks and counts once, such as
            tied embeddings of the first and the last stage, or layer norms under sequence
            parallelism. Give names, in which ``*`` and ``?`` stand for any letters and any letter;
            or a function of name and parameter that returns True for them. Copies have the same
            name on all their ranks, or the function returns one string for them. Each rank has the
            whole gradient of a copy when the optimizer steps. If shards are copied, each shard has
            a name of its own.

    Raises:
        ArgumentError: ``group`` or ``replicated`` is none of these.
    """

    def __init__(
        self, group: ProcessGroup | DeviceMesh | None = None, replicated: ParameterChoice = ()
    ) -> None:
        self.replicated = ParameterSelection("replicated", replicated)
        self.group = None if group is None else _process_group(group)
        self.announced = False
        """True once the clipper that is being attached has sent its message to the other ranks."""

    def __repr__(self) -> str:
        group = f"{self.group.size()} ranks" if self.group is not None else ""
        replicated = f"replicated={self.replicated!r}" if self.replicated else ""
        return f"Ranks({', '.join(filter(None, (group, replicated)))})"

    def original_of(self, name: str, parameter: Tensor) -> str | None:
        """Return the name that all copies of a parameter share; None for one without copies."""
        answer = self.replicated.answer(name, parameter)
        if isinstance(answer, str):
            return str(answer) or None  # a plain str: a message with a subclass may not unpickle
        return name if answer else None

    def joined(self) -> RankGroup:
        """Return the group of the ranks.

        Raises:
            AttachError: There is no process group.

        <!-- test: tests/ranks/test_agreement.py -k groups -->
        <!-- test: tests/ranks/test_agreement.py -k without_a_process_group -->
        """
        if not in_process_group():
            raise AttachError(
                "ranks= was given and there is no process group: call "
                "torch.distributed.init_process_group() first, or leave ranks at None."
            )
        group = self.group or distributed.distributed_c10d._get_default_group()
        ranks = tuple(sorted(distributed.get_process_group_ranks(group)))
        types = tuple(distributed.distributed_c10d._device_capability(group))
        return RankGroup(ranks, (group,), types)


def _process_group(group: Any) -> ProcessGroup:
    if getattr(group, "ndim", None) == 1 and hasattr(group, "get_group"):
        group = group.get_group()
    # For a rank outside of it, new_group() returns a number instead of a group.
    if distributed.is_available() and isinstance(group, distributed.ProcessGroup):
        return group
    raise ArgumentError(
        f"group is {group!r}: give a torch.distributed.ProcessGroup that this rank is in, a "
        "DeviceMesh of one dimension (mesh['pp'] of a larger one), or None for all ranks."
    )

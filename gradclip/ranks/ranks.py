"""The ``ranks=`` option: which processes hold parts of one model, and which parts are copies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed

from ..errors import ArgumentError, AttachError
from ..scopes.selection import Chosen, Selection
from .groups import RankGroup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Ranks:
    """Where the parameters live that are not here: a clipper on each of these ranks has one norm.

    For parameters that are spread over processes without being DTensors: the stages of a pipeline,
    shards as those of Megatron-LM, the flat parameters of ``FullyShardedDataParallel``. DTensors
    need none, nor does DistributedDataParallel, whose gradients are whole on every rank.

    A clipper is attached on all ranks at once, with the same options, and all of them step
    together, those included that have no gradient or no parameter. Names tell what belongs
    together: parameters of the same name are parts of one, except for copies.

    >>> import gradclip
    >>> gradclip.Ranks(replicated="*.norm.weight")
    Ranks(replicated='*.norm.weight')

    Args:
        group: The ranks: a ``torch.distributed.ProcessGroup``, a ``DeviceMesh`` of one dimension,
            or None for all.
        replicated: Parameters whose gradient is the same on several ranks and counts once, such as
            tied embeddings of the first and the last stage, or layer norms under sequence
            parallelism: names, in which ``*`` and ``?`` stand for any letters and any letter; or a
            function of name and parameter that is true for them. Copies have the same name on all
            their ranks, or the function returns one for them, a string. Each has the whole
            gradient when the optimizer steps; of shards that are copied, each shard has a name.

    Raises:
        ArgumentError: ``group`` or ``replicated`` is none of these.
    """

    def __init__(
        self, group: ProcessGroup | DeviceMesh | None = None, replicated: Chosen = ()
    ) -> None:
        self.replicated = Selection("replicated", replicated)
        self.group = None if group is None else _process_group(group)
        self.announced = False
        """Whether the clipper that is being attached has told the others of itself."""

    def __repr__(self) -> str:
        several = f"{self.group.size()} ranks" if self.group is not None else ""
        copies = f"replicated={self.replicated!r}" if self.replicated else ""
        return f"Ranks({', '.join(filter(None, (several, copies)))})"

    def original_of(self, name: str, parameter: Tensor) -> str | None:
        """Return the name that all copies of a replicated parameter share; None for others."""
        found = self.replicated.of(name, parameter)
        if isinstance(found, str):
            return str(found) or None
        return name if found else None

    def joined(self) -> RankGroup:
        """Return the ranks, of which this one must be one.

        Raises:
            AttachError: There is no process group.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            raise AttachError(
                "ranks= was given and there is no process group: call "
                "torch.distributed.init_process_group() first, or leave ranks at None."
            )
        group = self.group or distributed.distributed_c10d._get_default_group()
        ranks = tuple(sorted(distributed.get_process_group_ranks(group)))
        types = tuple(distributed.distributed_c10d._device_capability(group))
        return RankGroup(ranks, (group,), types)


def _process_group(given: Any) -> ProcessGroup:
    if getattr(given, "ndim", None) == 1 and hasattr(given, "get_group"):
        given = given.get_group()
    if distributed.is_available() and isinstance(given, distributed.ProcessGroup):
        return given
    raise ArgumentError(
        f"group is {given!r}: give a torch.distributed.ProcessGroup that this rank is in, a "
        "DeviceMesh of one dimension (mesh['pp'] of a larger one), or None for all ranks."
    )

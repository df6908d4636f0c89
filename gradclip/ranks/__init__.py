"""Ranks: the norm of a gradient whose parts lie on several processes.

Each rank measures the power sums of what it holds; one collective a step for each group of ranks
adds them up (of the infinity norm it takes the largest), and only then the root is taken. A
gradient is on several ranks in one of two ways: as a DTensor, which knows its shard
(``shards.py``), or by the ``ranks=`` option, which says so (``ranks.py``). When clippers attach,
they exchange messages (``messages.py``), check them (``refusals.py``), agree on the norms of all
ranks (``agreement.py``), and keep the outcome in a layout (``layout.py``).

Four caches live as long as the process, since what they hold is asked for at each step and cannot
change while its process group exists: the group made for ranks that have none of their own
(``groups.py``); the rank group of a device mesh, one for all meshes of the same ranks; the shard
of a DTensor by mesh, placements and shape; the common shard of the newest few lists of DTensors
(``shards.py``). After ``destroy_process_group()`` a program may make groups again, and a new
device mesh compares equal to an old one. So the first three have the process group of all ranks in
their keys, and the last one has the very objects that describe the DTensors. A key keeps its
objects alive, so that a later object never has the address of an earlier one.

Called by: records, gradients, optimizers, functional, clipper.
Imports: errors, engines, scopes.
"""

from .ranks import Ranks

__all__ = [
    "Ranks",
    "agreement",
    "averaging",
    "groups",
    "layout",
    "messages",
    "ranks",
    "shards",
    "shared_loss",
]

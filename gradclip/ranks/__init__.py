"""Many processes: parts of one gradient that lie on several ranks.

Ranks combine power sums, never roots, in one collective a step for each group. ``shards.py`` reads
DTensors, ``ranks.py`` is the option for everything else, ``agreement.py`` what clippers settle
when they attach.

Called by: records, gradients, optimizers, functional, clipper.
Imports: errors, engines, scopes.
"""

from .ranks import Ranks

__all__ = ["Ranks", "agreement", "groups", "ranks", "shards"]

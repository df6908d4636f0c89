"""What has to be known of a CUDA graph that a step is captured in."""

from __future__ import annotations

import torch


def capturing() -> bool:
    """Tell whether what is launched now goes into a CUDA graph, to be run when that is replayed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def keep_if_captured(*things: object) -> None:
    """Keep for ever what a graph that is captured now reads or writes whenever it is replayed.

    The graph knows addresses alone: what lies there would be freed with its last name in Python,
    and nothing tells when the graph itself is gone.
    """
    if capturing():
        _KEPT.update((id(thing), thing) for thing in things)


_KEPT: dict[int, object] = {}

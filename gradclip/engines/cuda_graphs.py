"""CUDA graphs: whether one is captured now, and the objects that must live as long as it does."""

from __future__ import annotations

import torch

_KEPT: dict[int, object] = {}
"""By id, every object that a captured graph uses; each once, however often it is captured.

Never emptied: a graph stores addresses only, so the memory would be freed and used by others once
the last Python name is gone, and torch does not report when a graph is destroyed.
"""


def capturing() -> bool:
    """Return whether the current stream is captured: kernels run when the graph is replayed."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def keep_if_captured(*objects: object) -> None:
    """Keep objects alive for good if a graph is captured now, since its replays use them."""
    if capturing():
        _KEPT.update((id(item), item) for item in objects)

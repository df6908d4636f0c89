"""Clipping without a hook: one call clips or measures.

``torch_names.py`` holds the functions with torch's names and signatures, ``units.py`` adaptive
gradient clipping, ``backward.py`` clipping and measuring during the backward pass, and
``differentiable.py`` clipping out of place. ``arguments.py`` reads what the functions are given,
``operators.py`` makes each function one operator for ``torch.compile``.

Called by: no other room.
Imports: errors, checks, engines, thresholds, scopes, ranks, gradients.
"""

__all__ = ["backward", "differentiable", "torch_names", "units"]

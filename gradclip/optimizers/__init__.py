"""The life of a hook: what happens around one step of an optimizer.

``supported.py`` says which optimizers can be clipped, ``attachment.py`` holds the hooks,
``closures.py``, ``step_changes.py`` and ``call_stack.py`` serve it. ``joint.py`` chooses the
gradients of one step, ``clipped_already.py`` remembers them, and the rest deals with GradScaler.

Called by: clipper, integrations.
Imports: errors, engines, thresholds, scopes, ranks, records, gradients.
"""

__all__ = ["attachment", "call_stack", "joint", "step_changes", "supported"]

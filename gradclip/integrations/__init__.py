"""Callbacks for the trainers of frameworks; each module imports its own framework alone.

``lightning``: a callback for the ``Trainer`` of PyTorch Lightning. ``transformers``: one for that
of Transformers.

Called by: no other room.
Imports: errors, checks, thresholds, scopes, records, gradients, optimizers, clipper.
"""

__all__ = ["lightning", "transformers"]

"""gradclip in the trainers of frameworks, one a file, each of which imports its framework.

``lightning``: a callback for the ``Trainer`` of PyTorch Lightning. ``transformers``: one for that
of Transformers.

Called by: nobody inside the package.
Imports: errors, checks, thresholds, scopes, records, gradients, optimizers, clipper.
"""

__all__ = ["lightning", "transformers"]

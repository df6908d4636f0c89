"""Integrations: a callback for the trainer of each framework, one framework a file.

``lightning`` is for the ``Trainer`` of PyTorch Lightning, ``transformers`` for that of Hugging Face
Transformers. Each imports its framework, which need not be installed for the rest of the package.

Called by: no other room.
Imports: errors, checks, thresholds, scopes, records, gradients, optimizers, clipper.
"""

__all__ = ["lightning", "transformers"]

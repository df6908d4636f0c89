"""gradclip in the training loops of frameworks, one a file, each of which imports its framework.

``lightning``: a callback for the ``Trainer`` of PyTorch Lightning. ``transformers``: one for that
of Transformers.
"""

"""Scopes: which gradients share a norm.

A scope labels parameters, and gradients with the same label share a norm. ``scope.py`` has the
ready-made labellings, in a table, and functions of the user's; ``labels.py`` has the labels of one
clipper, and ``norm_indices.py`` takes vectors from rows to norms and back. ``naming.py`` finds the
names of parameters, ``wrapper_names.py`` those of the plain model where it is wrapped.

Called by: ranks, records, gradients, optimizers, functional, clipper, integrations.
Imports: errors, checks, engines.
"""

from .scope import Scope

__all__ = ["Scope", "labels", "naming", "norm_indices", "scope", "wrapper_names"]

"""Axis 1: which gradients share a norm.

A scope labels parameters, and gradients with the same label share a norm. ``scope.py`` has the
ready-made labellings and the user's own, ``labels.py`` the labels of one clipper,
``norm_indices.py`` the way from a gradient or a row to its norm and back.

Called by: ranks, records, gradients, optimizers, functional, clipper, integrations.
Imports: errors, checks, engines.
"""

from .scope import Scope

__all__ = ["Scope", "labels", "naming", "norm_indices", "scope", "selection"]

"""Scopes: labels of parameters; gradients with the same label share a norm.

===========  ================================  ===============================================
scope        one norm for                      used by
===========  ================================  ===============================================
"global"     all gradients                     Pascanu 2013, AutoClip, ZClip, OLMo
"group"      a parameter group                 tasks or stages that must not scale each other
"parameter"  a parameter                       Keras ``clipnorm``, detectron2, AdaGC
"unit"       an index of dimension 0           AGC of NFNets; rows of an embedding
a function   all with the same label           models trained side by side, layers, experts
===========  ================================  ===============================================

A label is a name, so the same labels at a restart are the same norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from ..errors import ArgumentError
from .naming import ParameterChoice, ParameterSelection

KINDS = ("global", "group", "parameter", "unit")
SHARED = "global"
"""The label of all gradients in scope "global"."""

Label = str | None
Labels = Label | Sequence[Label]
"""One label for a parameter, None for never clipped, or one for each index of dimension 0."""
Labelling = Callable[[str, Tensor], object]


class Scope:
    """Which gradients share a norm.

    A scope gives every parameter a label; gradients with the same label share a norm.
    <!-- test: tests/behaviour/scopes/test_scopes.py -->

    Examples:
        >>> import gradclip
        >>> gradclip.Scope("unit", exclude="head.*")
        Scope('unit', exclude='head.*')

    Args:
        kind: "global": one norm for all gradients. "group": one for each parameter group.
            "parameter": one for each parameter. "unit": one for each index of dimension 0, that
            is the row of a matrix or the output filter of a convolution (of a transposed one the
            input filter); a gradient of less than two dimensions is one unit. Or a function of a
            parameter's name and the parameter that returns its label: a string or a whole number,
            or None for never clipped, in no norm; or a sequence, 1-d tensor or array of such
            labels, one for each index of dimension 0. It is called once for each parameter.
        exclude: Parameters that are never clipped and in no norm: names, in which ``*`` stands
            for any characters and ``?`` for one; or a function of name and parameter that returns
            True for them.

    Raises:
        ArgumentError: ``kind`` or ``exclude`` is none of these.

    <!-- test: tests/behaviour/scopes/test_scopes.py -k invalid_scope -->
    """

    def __init__(self, kind: str | Labelling = "global", *, exclude: ParameterChoice = ()) -> None:
        # A class is callable too, and was given instead of an instance of it.
        if isinstance(kind, type) or not (kind in KINDS or callable(kind)):
            raise ArgumentError(
                f"scope is {kind!r}: give one of {', '.join(map(repr, KINDS))}, a Scope, or a "
                "function of a parameter's name and the parameter that returns a label."
            )
        self.kind = kind
        self.exclude = ParameterSelection("exclude", exclude)

    def __repr__(self) -> str:
        exclude = f", exclude={self.exclude!r}" if self.exclude else ""
        return f"Scope({self.kind!r}{exclude})"

    @property
    def is_everything(self) -> bool:
        """True if all gradients share one norm, whatever their names."""
        return self.kind == "global" and not self.exclude

    def labels(self, name: str, parameter: Tensor, group: str) -> Labels:
        """Return the label of a parameter, or those of the indices of its dimension 0.

        Args:
            name: Name of the parameter, which no other parameter has.
            parameter: The parameter.
            group: Name of its parameter group.

        Raises:
            ArgumentError: A function returned an invalid label.

        <!-- test: tests/behaviour/scopes/test_scopes.py -k 'labels_are_names or need_the_rows' -->
        """
        if self.exclude.answer(name, parameter):
            return None
        if callable(self.kind):
            return _checked(self.kind(name, parameter), name, parameter)
        if self.kind == "unit" and parameter.dim() > 1:
            return [f"{name}[{index}]" for index in range(len(parameter))]
        return {"global": SHARED, "group": group}.get(self.kind, name)


def scope_from(scope: object) -> Scope:
    """Return the scope that a user's ``scope`` means.

    Raises:
        ArgumentError: It is not a kind, a function or a `Scope`.
    """
    return scope if isinstance(scope, Scope) else Scope(cast("str | Labelling", scope))


def _checked(returned: object, name: str, parameter: Tensor) -> Labels:
    to_list = getattr(returned, "tolist", None)  # of a tensor or an array
    labels = returned if to_list is None else to_list()
    if isinstance(labels, Sequence) and not isinstance(labels, str | bytes | bytearray):
        if parameter.dim() and len(labels) == len(parameter):
            return [_checked_label(label, name, parameter) for label in labels]
        raise _invalid_label(f"{len(labels)} labels", name, parameter)
    return _checked_label(labels, name, parameter)


def _checked_label(label: object, name: str, parameter: Tensor) -> Label:
    if label is None:
        return None
    if isinstance(label, str):
        return str.__str__(label)  # weights_only=True refuses to load a subclass from a checkpoint
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    raise _invalid_label(repr(label), name, parameter)


def _invalid_label(found: str, name: str, parameter: Tensor) -> ArgumentError:
    return ArgumentError(
        f"The scope gave {found} for {name} of shape {tuple(parameter.shape)}: give a string or a "
        "whole number, None for never clipped, or one of these for each index of dimension 0."
    )

"""Which gradients share a norm, as a labelling of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from ..errors import ArgumentError
from .selection import Chosen, Selection

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

    >>> import gradclip
    >>> gradclip.Scope("unit", exclude="head.*")
    Scope('unit', exclude='head.*')

    Args:
        kind: "global": all gradients. "group": those of each parameter group. "parameter": each
            one has a norm of its own. "unit": each index of dimension 0 has, that is the row of a
            matrix or the output filter of a convolution (of a transposed one the input filter);
            gradients of less than two dimensions are one unit. Or a function of a parameter's
            name and the parameter which returns its label, a string or a whole number, or None
            for never clipped, in no norm; or a sequence, 1-d tensor or array of such labels, one
            for each index of dimension 0. It is called once for each parameter.
        exclude: What is never clipped and in no norm: names, in which ``*`` and ``?`` stand for
            any letters and any letter; or a function of name and parameter that is true for them.

    Raises:
        ArgumentError: ``kind`` or ``exclude`` is none of these.
    """

    def __init__(
        self,
        kind: str | Labelling = "global",
        *,
        exclude: Chosen = (),
    ) -> None:
        if isinstance(kind, type) or not (kind in KINDS or callable(kind)):
            raise ArgumentError(
                f"scope is {kind!r}: give one of {', '.join(map(repr, KINDS))}, a Scope, or a "
                "function of a parameter's name and the parameter that returns a label."
            )
        self.kind = kind
        self.exclude = Selection("exclude", exclude)

    def __repr__(self) -> str:
        exclude = f", exclude={self.exclude!r}" if self.exclude else ""
        return f"Scope({self.kind!r}{exclude})"

    @property
    def is_everything(self) -> bool:
        """Whether all gradients share one norm, whatever their names."""
        return self.kind == "global" and not self.exclude

    def labels(self, name: str, parameter: Tensor, group: str) -> Labels:
        """Return the label of a parameter, or those of the indices of its dimension 0.

        Args:
            name: Name of the parameter, which no other one has.
            parameter: The parameter.
            group: Name of its parameter group.

        Raises:
            ArgumentError: A function returned what is no label.
        """
        if self.exclude.of(name, parameter):
            return None
        if callable(self.kind):
            return _checked(self.kind(name, parameter), name, parameter)
        if self.kind == "unit" and parameter.dim() > 1:
            return [f"{name}[{index}]" for index in range(len(parameter))]
        return {"global": SHARED, "group": group}.get(self.kind, name)


def scope_from(scope: object) -> Scope:
    """Return the scope that a user's ``scope`` means.

    Raises:
        ArgumentError: It is none of kind, function and `Scope`.
    """
    return scope if isinstance(scope, Scope) else Scope(cast("str | Labelling", scope))


def _checked(found: object, name: str, parameter: Tensor) -> Labels:
    to_list = getattr(found, "tolist", None)  # of a tensor or an array
    found = found if to_list is None else to_list()
    if isinstance(found, Sequence) and not isinstance(found, str | bytes | bytearray):
        if parameter.dim() and len(found) == len(parameter):
            return [_checked_one(label, name, parameter) for label in found]
        raise _no_label(f"{len(found)} labels", name, parameter)
    return _checked_one(found, name, parameter)


def _checked_one(found: object, name: str, parameter: Tensor) -> Label:
    if found is None:
        return None
    if isinstance(found, str):
        return str.__str__(found)  # not a subclass, which could not be loaded again
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    raise _no_label(repr(found), name, parameter)


def _no_label(found: str, name: str, parameter: Tensor) -> ArgumentError:
    return ArgumentError(
        f"The scope gave {found} for {name} of shape {tuple(parameter.shape)}: give a string or a "
        "whole number, None for never clipped, or one of these for each index of dimension 0."
    )

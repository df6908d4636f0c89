"""The exceptions that gradclip raises.

    GradClipError
    ├── ArgumentError           also ValueError: an invalid option or argument
    ├── AttachError             also RuntimeError: an optimizer that a hook cannot clip
    ├── GradientError           also TypeError: a gradient that cannot be clipped correctly
    ├── EngineUnavailableError  also RuntimeError: an engine asked for by name that cannot run here
    ├── StateError              also ValueError: a state dict that does not fit
    ├── NonFiniteGradientError  also RuntimeError: a norm that is NaN or infinite
    └── SkipLimitError          also RuntimeError: too many skipped steps in a row

Each message says what was found, what is needed and how to mend it. When one is raised, the
gradients are as they were before the call.
"""

from __future__ import annotations


class GradClipError(Exception):
    """Base of every exception that gradclip raises."""


class ArgumentError(GradClipError, ValueError):
    """An option or argument has an invalid type or value."""


class AttachError(GradClipError, RuntimeError):
    """The optimizer cannot be clipped through its step hook."""


class GradientError(GradClipError, TypeError):
    """A gradient has a dtype or layout that cannot be clipped correctly."""


class EngineUnavailableError(GradClipError, RuntimeError):
    """An engine was asked for by name and cannot run here."""


class StateError(GradClipError, ValueError):
    """A state dict does not belong to this clipper; nothing was loaded."""


class NonFiniteGradientError(GradClipError, RuntimeError):
    """The norm of the gradients is NaN or infinite, and ``nonfinite="raise"``."""


class SkipLimitError(GradClipError, RuntimeError):
    """As many steps in a row were skipped as ``skip_limit`` allows."""

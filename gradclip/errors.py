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
    """Base of every exception that gradclip raises.

    <!-- test: tests/internals/test_checks.py -k builtin_kind -->
    """


class ArgumentError(GradClipError, ValueError):
    """An option or argument has an invalid type or value.

    <!-- test: tests/behaviour/clipper/test_options.py -k invalid -->
    """


class AttachError(GradClipError, RuntimeError):
    """The optimizer cannot be clipped through its step hook.

    <!-- test: tests/behaviour/attachment/test_attach.py -k refused -->
    """


class GradientError(GradClipError, TypeError):
    """A gradient has a dtype or layout that cannot be clipped correctly.

    <!-- test: tests/behaviour/functions/test_torch_names.py -k refused -->
    """


class EngineUnavailableError(GradClipError, RuntimeError):
    """An engine was asked for by name and cannot run here.

    <!-- test: tests/behaviour/clipper/test_options.py -k cannot_serve -->
    """


class StateError(GradClipError, ValueError):
    """A state dict does not belong to this clipper; nothing was loaded.

    <!-- test: tests/faults/test_states.py -k do_not_fit -->
    """


class NonFiniteGradientError(GradClipError, RuntimeError):
    """The norm of the gradients is NaN or infinite, and ``nonfinite="raise"``.

    <!-- test: tests/behaviour/scopes/test_names.py -k not_finite -->
    """


class SkipLimitError(GradClipError, RuntimeError):
    """As many steps in a row were skipped as ``skip_limit`` allows.

    <!-- test: tests/behaviour/clipper/test_step.py -k in_a_row -->
    """

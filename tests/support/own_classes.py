"""Classes of the reader's own, on which the tests of a contract run when asked to."""

import os
from importlib import import_module
from typing import Any


def own_classes(variable: str) -> dict[str, Any]:
    """Return the class that an environment variable names as MODULE:CLASS, by its name."""
    module, _, name = os.environ.get(variable, "").partition(":")
    return {name: getattr(import_module(module), name)} if module else {}

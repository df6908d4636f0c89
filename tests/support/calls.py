"""The Python functions that a step of the clipper enters."""

import sys
from collections.abc import Callable
from pathlib import Path

import gradclip

PACKAGE = str(Path(gradclip.__file__).parent)


def python_calls(step: Callable[[], object]) -> list[str]:
    """Return the functions of gradclip that a call enters, and what these enter in turn."""
    calls: list[str] = []

    def profile(frame, event, _) -> None:
        caller = frame.f_back
        files = [code.co_filename for code in (frame.f_code, caller and caller.f_code) if code]
        if event == "call" and any(file.startswith(PACKAGE) for file in files):
            calls.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls

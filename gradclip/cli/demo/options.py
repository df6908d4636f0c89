"""What a user of the demo can choose."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ArgumentError

CELLS = ("rnn-tanh", "rnn-relu", "lstm", "gru")
"""Recurrent networks to choose from."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of ``gradclip demo``, which the command line has checked."""

    steps: int = 300
    """Steps of each run."""
    seed: int = 2
    max_norm: float = 1.0
    cell: str = "rnn-tanh"
    out: str = "demo"
    """Folder for everything that is written."""

    @property
    def picture(self) -> str:
        """Path of the picture."""
        return os.path.join(self.out, "demo.png")

    def logs(self, run: str) -> str:
        """Return the folder for the TensorBoard logs of a run."""
        return os.path.join(self.out, run)


LOG_SUFFIX = ".gradclip-demo"
"""Ends the names of the demo's event files, so that it can tell them from others."""


def prepare(options: Options, runs: Sequence[str]) -> None:
    """Make the folders of the runs, and take away what an earlier demo logged there.

    Raises:
        ArgumentError: A folder or the picture cannot be written.
    """
    if os.path.isdir(options.picture):
        raise _refusal(options, f"{options.picture} is a folder, where the picture would go")
    folders = [options.out, *(options.logs(run) for run in runs)]
    for folder in folders:
        _check_writable(options, folder)
    for folder in folders[1:]:
        _remove_logs(folder)


def _check_writable(options: Options, folder: str) -> None:
    # By doing it: permissions tell little to root, on network drives and on read-only mounts.
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except FileExistsError:
        raise _refusal(options, f"{folder} is a file") from None
    except OSError as error:
        raise _refusal(options, f"{folder} cannot be written ({error.strerror})") from None
    except ValueError as error:
        raise _refusal(options, f"it is no path ({error})") from None


def _refusal(options: Options, found: str) -> ArgumentError:
    return ArgumentError(
        f"argument --out: found {options.out!r}, but {found}: give a folder that can be made "
        "and written, such as --out demo"
    )


def _remove_logs(folder: str) -> None:
    pattern = os.path.join(glob.escape(folder), f"events.out.tfevents.*{LOG_SUFFIX}")
    for path in glob.glob(pattern):
        os.remove(path)

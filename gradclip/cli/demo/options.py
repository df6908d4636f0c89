"""The options of the demo, and the check that its output folder is writable."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ArgumentError

CELLS = ("rnn-tanh", "rnn-relu", "lstm", "gru")
"""Kinds of recurrent networks."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of ``gradclip demo``, checked by the command line."""

    steps: int = 300
    """Number of steps of each training."""
    seed: int = 2
    max_norm: float = 1.0
    cell: str = "rnn-tanh"
    out: str = "demo"
    """Folder that receives all files."""

    @property
    def picture(self) -> str:
        """Path of the picture."""
        return os.path.join(self.out, "demo.png")

    @property
    def page(self) -> str:
        """Path of the interactive page."""
        return os.path.join(self.out, "demo.html")

    def logs(self, run: str) -> str:
        """Return the folder of the TensorBoard logs of a run."""
        return os.path.join(self.out, run)


LOG_SUFFIX = ".gradclip-demo"
"""Ends the names of the demo's event files: only these are removed by the next demo."""


def prepare(options: Options, runs: Sequence[str]) -> None:
    """Make the folders of the runs, and remove the logs of an earlier demo.

    Raises:
        ArgumentError: A folder, the picture or the page cannot be written. Nothing was removed.
    """
    for path, kind in ((options.picture, "picture"), (options.page, "page")):
        if os.path.isdir(path):
            raise _refusal(options, f"{path}, the path of the {kind}, is a folder")
    folders = [options.out, *(options.logs(run) for run in runs)]
    for folder in folders:
        _check_writable(options, folder)
    for folder in folders[1:]:
        _remove_logs(folder)


def _check_writable(options: Options, folder: str) -> None:
    # By writing: permissions say little for root, on network drives and on read-only mounts.
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except FileExistsError:
        raise _refusal(options, f"{folder} is a file") from None
    except OSError as error:
        raise _refusal(options, f"{folder} cannot be written ({error.strerror})") from None
    except ValueError as error:
        raise _refusal(options, f"it is not a path ({error})") from None


def _refusal(options: Options, trouble: str) -> ArgumentError:
    return ArgumentError(
        f"argument --out: found {options.out!r}, but {trouble}: give a folder that can be "
        "made and written, such as --out demo"
    )


def _remove_logs(folder: str) -> None:
    pattern = os.path.join(glob.escape(folder), f"events.out.tfevents.*{LOG_SUFFIX}")
    for path in glob.glob(pattern):
        os.remove(path)

"""The whole demo: two training runs, a table, a picture, a page and logs."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from typing import TextIO

from ...report import read_runs
from ...report.printing import number, print_table
from ...view.html import write_page
from .options import Options, prepare
from .picture import draw
from .progress import progress
from .task import read_text
from .training import FINAL_STEPS, LEARNING_RATE, Curves, train


def run_demo(options: Options, stdout: TextIO, stderr: TextIO) -> list[Curves]:
    """Train a model without and with clipping, and show the results.

    Args:
        options: The options of the command.
        stdout: Receives the results.
        stderr: Receives the progress.

    Returns:
        The curves of both runs: without clipping, with clipping.

    Raises:
        ArgumentError: The folder cannot be written; nothing was changed.
    """
    runs = [Curves("unclipped", clips=False), Curves("clipped", clips=True)]
    prepare(options, [curves.run for curves in runs])
    text = read_text()
    print(
        f"A {options.cell} network learns {len(text.characters):,} characters of Python's help, "
        f"with SGD at learning rate {LEARNING_RATE:g}:\nfirst without clipping, then with "
        f"max_norm={options.max_norm:g}, from the same weights and on the same batches.",
        file=stdout,
        flush=True,
    )
    with progress(stderr) as shown:
        for curves in runs:
            shown.begin(curves.title, options.steps)
            train(options, text, curves, shown.advance)
    show_table(runs, options.max_norm, stdout)
    _draw(runs, options, stdout)
    _write_page(runs, options)
    print(f"Page:    {options.page} (open it in a browser)", file=stdout)
    print(f"Curves:  {_tensorboard()} --logdir {shlex.quote(options.out)}", file=stdout)
    return runs


def _draw(runs: list[Curves], options: Options, stdout: TextIO) -> None:
    try:
        draw(runs, options)
    except ImportError:
        print('Picture: needs matplotlib, pip install "gradclip[report]"', file=stdout)
        if os.path.exists(options.picture):
            print(f"         ({options.picture} belongs to an earlier demo)", file=stdout)
    else:
        print(f"Picture: {options.picture}", file=stdout)


def _write_page(runs: list[Curves], options: Options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged file beside the logs is not the demo's
        logged = read_runs([options.logs(curves.run) for curves in runs])
    write_page(logged, options.page)


def _tensorboard() -> str:
    """Return the command that starts TensorBoard from this shell."""
    if shutil.which("tensorboard"):
        return "tensorboard"
    beside = os.path.join(sysconfig.get_path("scripts"), "tensorboard")
    if shutil.which(beside):
        return shlex.quote(beside)
    return f"{shlex.quote(sys.executable)} -m tensorboard.main"


HEADER = ("", "final loss", "largest norm", "clip rate", "steps/s")


def show_table(runs: Sequence[Curves], max_norm: float, stream: TextIO) -> None:
    """Print the table of the results and its explanation."""
    rows = [_row(curves) for curves in runs]
    print_table(HEADER, rows, stream)
    steps = len(runs[0].losses)
    span = f"the last {FINAL_STEPS} steps" if steps > FINAL_STEPS else "all steps"
    print(
        f"Final loss: mean of {span}. Clip rate: share of the finite norms above "
        f"{max_norm:g}\n(in brackets: observed only, no gradient was changed).",
        file=stream,
    )


def _row(curves: Curves) -> tuple[str, ...]:
    largest = number(curves.largest_norm)
    if curves.nonfinite_norms:
        largest += f", {curves.nonfinite_norms} NaN/inf"
    rate = f"{curves.clip_rate:.0%}" if curves.clips else f"({curves.clip_rate:.0%})"
    speed = f"{curves.steps_per_second:.0f}"
    return curves.title, number(curves.final_loss), largest, rate, speed

"""The arguments of ``gradclip demo`` and ``gradclip report``, and the exit codes."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from .. import __version__
from ..errors import GradClipError
from .demo.options import CELLS, Options

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes; 130 is that of shells after Ctrl-C."""

Number = TypeVar("Number", int, float)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, without raising ``SystemExit``.

    Args:
        argv: The arguments; None takes those of the process.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as end:  # argparse has printed the help, the version or the error
        return int(end.code or DONE)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except GradClipError as error:
        return _complain(f"{arguments.prog}: {error}", REFUSED)
    except OSError as error:
        return _complain(
            f"{arguments.prog}: stopped, a file cannot be written or read: {error}", FAILED
        )


def _complain(message: str, code: int) -> int:
    """Print a message to stderr and return the exit code."""
    print(message, file=sys.stderr)
    return code


def _demo(arguments: argparse.Namespace) -> int:
    options = Options(
        steps=arguments.steps,
        seed=arguments.seed,
        max_norm=arguments.max_norm,
        cell=arguments.cell,
        out=arguments.out,
    )
    try:
        # Not at the top: it imports torch and TensorBoard, which takes seconds.
        from .demo.run import run_demo

        run_demo(options, sys.stdout, sys.stderr)
    except KeyboardInterrupt:
        return _complain(
            f"{arguments.prog}: interrupted; the logs so far are in {options.out}",
            INTERRUPTED,
        )
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from ..report import read_runs  # not at the top: it imports NumPy
    from ..report.pictures.picture import check_picture, check_runs, draw
    from ..report.printing import print_report
    from ..view.html import check_page, write_page

    if arguments.html is not None:
        check_page(arguments.html)
    if arguments.plot is not None:
        try:
            check_picture(arguments.plot)
        except ImportError as error:
            return _complain(f"{arguments.prog}: {error}", REFUSED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runs = read_runs(arguments.run)
    for warning in caught:
        _complain(f"{arguments.prog}: {warning.message}", DONE)
    if arguments.plot is not None:
        check_runs(runs)
    advice = print_report(runs, sys.stdout, as_json=arguments.json)
    if arguments.plot is not None:
        draw(runs, arguments.plot, advice)
        print(f"Picture: {arguments.plot}", file=sys.stderr)  # stdout may be JSON for a program
    if arguments.html is not None:
        write_page(runs, arguments.html)
        print(f"Page: {arguments.html}, to be opened in a browser", file=sys.stderr)
    return DONE


class _Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line; argparse would print the usage as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: {message} (see '{self.prog} --help')\n")


def _parser() -> _Parser:
    about = "Gradient clipping for PyTorch."
    parser = _Parser(prog="gradclip", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gradclip {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_report(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    about = "train a recurrent network on text twice, without and with clipping"
    demo = commands.add_parser(
        "demo",
        help=about,
        description=f"{about.capitalize()}; log both runs for TensorBoard, and draw them as a "
        "picture and as an interactive page.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    demo.set_defaults(command=_demo, prog=demo.prog)
    start = Options()
    demo.add_argument(
        "--steps", type=_steps, default=start.steps, help="number of steps of each training"
    )
    demo.add_argument("--seed", type=_seed, default=start.seed, help="seed of weights and batches")
    demo.add_argument(
        "--max-norm",
        type=_max_norm,
        default=start.max_norm,
        help="threshold of the training with clipping",
    )
    demo.add_argument("--cell", choices=CELLS, default=start.cell, help="kind of recurrent network")
    demo.add_argument(
        "--out", default=start.out, help="folder for the logs, the picture and the page"
    )


def _add_report(commands: argparse._SubParsersAction[_Parser]) -> None:
    about = "summarize the gradient norms of logged runs and advise a threshold"
    report = commands.add_parser(
        "report", help=about, description=f"{about.capitalize()}.", allow_abbrev=False
    )
    report.set_defaults(command=_report, prog=report.prog)
    report.add_argument(
        "run", nargs="+", metavar="RUN", help="folder with TensorBoard logs, or file of JsonlSink"
    )
    report.add_argument(
        "--json", action="store_true", help="print JSON for programs instead of tables"
    )
    report.add_argument(
        "--plot", metavar="FILE", help="draw the runs side by side into a .png or .svg file"
    )
    report.add_argument(
        "--html", metavar="FILE", help="write an interactive page of the runs into an .html file"
    )


def _steps(text: str) -> int:
    return _checked(text, int, lambda steps: steps >= 1, "a whole number >= 1, such as 300")


def _seed(text: str) -> int:
    # The range of seeds that torch's generators accept.
    return _checked(text, int, lambda seed: 0 <= seed < 2**63, "a whole number, 0 to 2^63 - 1")


def _max_norm(text: str) -> float:
    return _checked(text, float, lambda norm: 0 <= norm < math.inf, "a finite number >= 0")


def _checked(
    text: str, kind: Callable[[str], Number], fits: Callable[[Number], bool], needed: str
) -> Number:
    """Return the number in a text, or raise an error that argparse prints."""
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not fits(number):
        raise argparse.ArgumentTypeError(f"found {text!r}: give {needed}")
    return number

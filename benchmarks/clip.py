"""Cost of clipping against torch's clip_grad_norm_, and the error of the norm.

    python -m benchmarks.clip [--sets small lstm] [--seconds 5] [--json]

Prints times as ratios to torch's default in the same run: on a shared machine only ratios mean
something. Gradients are rewritten from a pool before every timed call.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

import gradclip
from benchmarks.gradients import Gradients, Still, machine
from benchmarks.shapes import SETS
from benchmarks.timing import interleaved_medians

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REGIMES = {"under": 1e9, "clipping": 1.0}


def read_bandwidth(seconds: float) -> float:
    """Return bytes per second of the fastest read of 400 MB that torch offers."""
    data = torch.ones(100_000_000)
    readers = {"dot": lambda: torch.dot(data, data), "aminmax": lambda: torch.aminmax(data)}
    return 4e8 / min(interleaved_medians(readers, lambda: None, seconds).values())


def measure_set(name: str, dtype: str, seconds: float, bandwidth: float) -> list[dict[str, Any]]:
    """Measure both regimes on one set of gradients."""
    gradients = Gradients(SETS[name](), DTYPES[dtype])
    rows = []
    for regime, max_norm in REGIMES.items():
        medians = medians_of_rivals(gradients, max_norm, seconds)
        reference = medians.pop("torch")
        gradients.rewrite()
        rows.append(
            {
                "set": name,
                "dtype": dtype,
                "regime": regime,
                "torch_us": reference * 1e6,
                **{rival: median / reference for rival, median in medians.items()},
                "read_share": gradients.bytes / medians["function"] / bandwidth,
                "error": gradients.error(),
            }
        )
    return rows


def medians_of_rivals(gradients: Gradients, max_norm: float, seconds: float) -> dict[str, float]:
    """Time torch's and gradclip's ways to clip to one threshold."""
    parameters = gradients.parameters
    optimizer = Still(parameters)
    theirs = torch.nn.utils.clip_grad_norm_
    rivals = {
        "torch": lambda: theirs(parameters, max_norm),
        "foreach": lambda: theirs(parameters, max_norm, foreach=True),
        "function": lambda: gradclip.clip_grad_norm_(parameters, max_norm),
        "hook": optimizer.step,
    }
    with gradclip.GradientClipper(optimizer, max_norm):
        return interleaved_medians(rivals, gradients.rewrite, seconds)


def measure_logging(seconds: float) -> dict[str, float]:
    """Measure a step of the small set with an optimizer that does nothing, in microseconds.

    The mean of as many steps as a batch of records has, so that writing it is included.
    """
    gradients = Gradients(SETS["small"](), torch.float32)
    parameters = gradients.parameters
    bare, hooked, logged = Still(parameters), Still(parameters), Still(parameters)
    steps = itertools.count()

    def by_hand() -> None:
        step = next(steps)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        writer.add_scalar("norm", norm.item(), step)
        writer.add_scalar("clipped", min(norm.item(), 1e9), step)
        bare.step()

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        rivals = {
            "torch": lambda: (torch.nn.utils.clip_grad_norm_(parameters, 1e9), bare.step()),
            "torch and add_scalar": by_hand,
            "function": lambda: (gradclip.clip_grad_norm_(parameters, 1e9), bare.step()),
            "hook": hooked.step,
            "hook and log": logged.step,
        }
        with (
            gradclip.GradientClipper(hooked, 1e9),
            gradclip.GradientClipper(logged, 1e9, log=f"{folder}/gradclip"),
        ):
            medians = interleaved_medians(rivals, gradients.rewrite, seconds, calls=100)
    return {name: taken * 1e6 for name, taken in medians.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    bandwidth = read_bandwidth(min(options.seconds, 2.0))
    rows = [
        row
        for name in options.sets
        for dtype in options.dtypes
        for row in measure_set(name, dtype, options.seconds, bandwidth)
    ]
    logging = measure_logging(options.seconds)
    if options.json:
        print(json.dumps({"machine": machine(), "rows": rows, "logging_us": logging}))
    else:
        print_tables(rows, logging, bandwidth)


def print_tables(rows: list[dict[str, Any]], logging: dict[str, float], bandwidth: float) -> None:
    """Print Markdown tables."""
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(
        f"read bandwidth {bandwidth / 1e9:.1f} GB/s; ratios to torch's default, lower is faster\n"
    )
    print("| set | dtype | regime | torch, us | foreach | function | hook | of bandwidth | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['set']} | {row['dtype']} | {row['regime']} | {row['torch_us']:.0f} "
            f"| {row['foreach']:.2f} | {row['function']:.2f} | {row['hook']:.2f} "
            f"| {row['read_share']:.0%} | {row['error']:.0e} |"
        )
    print("\n| small set, clipping and an empty step, under the threshold | us | ratio |")
    print("|---|---|---|")
    for name, taken in logging.items():
        print(f"| {name} | {taken:.0f} | {taken / logging['torch']:.2f} |")
    print(f"\nthe hook adds {logging['hook'] - logging['function']:.0f} us to the function,")
    print(f"logging adds {logging['hook and log'] - logging['hook']:.0f} us to the hook")


if __name__ == "__main__":
    main()

"""Libraries of the native engine beside each other: `python -m benchmarks.cost.compilers`.

Prints a table of times relative to the first library: what a compiler makes of the same sources.
Calls alternate within one process and one thread, whose CPU time counts, so that other programs
disturb little.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.common import shapes
from benchmarks.common.gradients import Gradients
from benchmarks.common.markdown import table
from benchmarks.common.timing import by_thread, interleaved_medians
from gradclip.engines.native import loading
from gradclip.engines.native.engine import NativeEngine

SETS = {"small": shapes.small, "lstm": shapes.lstm, "resnet50": shapes.resnet50}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Engines = Mapping[str, NativeEngine]
Verb = Callable[[NativeEngine], object]


def engine_of(library: Path) -> NativeEngine:
    """Return an engine over one library."""
    loading.LIBRARY = library.resolve()
    return NativeEngine(loading.load())


def ratio(call: Verb, engines: Engines, gradients: Gradients, seconds: float) -> list[str]:
    """Return the median time of each library but the first, relative to the first."""
    rivals = {name: lambda engine=engine: call(engine) for name, engine in engines.items()}
    medians = interleaved_medians(rivals, gradients.rewrite, seconds, timer=by_thread)
    first, *others = medians.values()
    return [f"{other / first:.2f}" for other in others]


def measure(name: str, dtype: torch.dtype, engines: Engines, seconds: float) -> list[str]:
    """Return a row of the table."""
    gradients, half = Gradients(SETS[name](), dtype), torch.tensor([0.5], dtype=torch.float64)
    tensors = [parameter.grad for parameter in gradients.parameters]
    verbs: tuple[Verb, ...] = (
        lambda engine: engine.norm(tensors, 2.0),
        lambda engine: engine.scale_(tensors, half),
        lambda engine: engine.norm(tensors, torch.inf),
        lambda engine: engine.power_sums(tensors, 3.0),
    )
    cells = [" / ".join(ratio(verb, engines, gradients, seconds)) for verb in verbs]
    return [name, str(dtype).removeprefix("torch."), *cells]


def main() -> None:
    """Measure libraries that are given as NAME=PATH."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("libraries", nargs="+", help="NAME=PATH; times are relative to the first")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pairs = (library.partition("=")[::2] for library in given.libraries)
    engines = {name: engine_of(Path(path)) for name, path in pairs}
    rows = [measure(name, dtype, engines, given.seconds) for name in SETS for dtype in DTYPES]
    print("\n".join(table(["set", "dtype", "norm", "scaling", "infinity norm", "3-norm"], rows)))


if __name__ == "__main__":
    main()

"""Final loss against the learning rate over three decades, by the way to clip.

    python -m benchmarks.experiments.learning_rates.run [--seeds 3]
        [--outcomes build/learning_rates.jsonl] [--save benchmarks/results/learning_rates.md]

Two small networks learn the characters of real text: that of `gradclip demo` with SGD, and a GPT
with AdamW. For each seed, all rates and all ways to clip start from the same weights and read the
same batches. The rates lie around the one that each network has elsewhere, 1 in the demo and 0.003
in the experiment without tuning; no result of this experiment chose them. Outcomes are appended to
a file as they come, and those that it holds already are not computed again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import gradclip
from benchmarks.common.gradients import machine
from benchmarks.common.markdown import save
from benchmarks.common.text import split_text
from benchmarks.experiments.learning_rates.curves import ARMS, curves_of, points_of
from benchmarks.experiments.learning_rates.networks import NETWORKS, Network
from benchmarks.experiments.learning_rates.outcomes import Job, completed
from benchmarks.experiments.learning_rates.picture import draw
from benchmarks.experiments.learning_rates.report import report
from benchmarks.experiments.without_tuning.run import FIRST_SEED
from benchmarks.experiments.without_tuning.task import DECAY
from benchmarks.experiments.without_tuning.tasks.characters import EVALUATED


def settings(options: argparse.Namespace) -> dict[str, str]:
    """Return the settings of the trainings, for the report."""
    learned, _, characters = split_text()
    environment = {**machine(), "threads": 1}
    trainings = {name: _training(network) for name, network in NETWORKS.items()}
    saved = f" --save {options.save}" if options.save else ""
    return {
        "command": f"`python -m benchmarks.experiments.learning_rates.run --seeds {options.seeds}"
        f"{saved}`",
        "made with": f"gradclip {gradclip.__version__}, "
        + ", ".join(f"{key} {value}" for key, value in environment.items())
        + f"; {date.today()}",
        "seeds": f"{options.seeds}, from {FIRST_SEED} to {FIRST_SEED + options.seeds - 1}",
        "text": f"`pydoc_data.topics`, {len(learned):,} characters of {characters} kinds to train "
        f"on; the final loss is that of {EVALUATED} pieces of the last tenth, in nats; a uniform "
        f"guess has {math.log(characters):.2f}",
        "learning rate": f"constant, then falling to 0 in the last {DECAY:.0%} of the steps",
        **trainings,
        "limits": "short trainings of small networks, and few seeds; the ranges depend on the "
        "number of steps, and are known to half a decade",
    }


def _training(network: Network) -> str:
    """Return the training of a network in words, without its learning rate."""
    rate = network.rates[0]
    task = network.task(rate)
    return f"{task.title.removesuffix(f'({rate:g})')}, {task.steps} steps"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outcomes", type=Path, default=Path("build/learning_rates.jsonl"))
    parser.add_argument(
        "--save", type=Path, help="write the Markdown to this file and a picture beside it"
    )
    options = parser.parse_args(arguments)
    jobs = [
        Job(FIRST_SEED + seed, name, rate, arm)
        for seed in range(options.seeds)
        for name, network in NETWORKS.items()
        for rate in network.rates
        for arm in ARMS
    ]
    outcomes = completed(jobs, options.outcomes)
    guess = math.log(split_text()[2])
    lines = report(settings(options), outcomes, guess)
    if options.save:
        picture = options.save.with_suffix(".png")
        lines += ["", f"![Final losses by learning rate and way to clip]({picture.name})"]
        save(lines, options.save)
        curves = {name: curves_of(points_of(outcomes, name)) for name in NETWORKS}
        draw(curves, picture, guess)
    print("\n".join(lines))


if __name__ == "__main__":
    main()

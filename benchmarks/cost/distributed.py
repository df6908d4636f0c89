"""Cost of clipping on FSDP2 against torch's clip_grad_norm_ with full_tensor(), by ranks.

    python -m benchmarks.cost.distributed [--ranks 2 4] [--parameters 48 300] [--rounds 200]
                                     [--save benchmarks/results/distributed.md]

A stack of linear layers is sharded by `fully_shard`, in blocks of four and the root, over gloo
processes of one thread each. After a real backward pass all ways to clip are called in turn, in
the same processes, each on gradients that were just copied back and behind a barrier. A call takes
from when the last rank begins until the last one is done, by the clock that all processes of a
machine share; of these times the medians are compared. Collectives are counted by torch's
CommDebugMode, which sees functional ones and the others.

How cost grows with ranks. The time of a call is modelled as

    t(n, R) = s + n c + k(R)    with    k(R) = a + 2 (R - 1) m

for n gradients on R ranks. s + n c is what each rank does alone: the host's time for a tensor, in
which R does not occur, and one read of its shards, which are smaller the more ranks there are. k is
the one all-reduce, of 8 bytes for each norm and thus all latency: gloo sends them around a ring,
2 (R - 1) messages of time m one after the other, on top of a constant a. (In a tree, as nccl has
it, they are 2 log2(R).) torch's way has one such collective as well, and a larger c: what is saved
grows with n, and with R the share of k that nobody saves.

The last column measures k. On 2 shared cores, among other work, the quickest tenth of 400 calls in
a quiet loop took 0.26, 0.60, 0.81 and 1.65 ms or less on 2, 3, 4 and 6 ranks: a is small, and m
0.13 to 0.17 ms. With 8 ranks it was 5.8 ms: where there are more ranks than cores they wait for
their turns, in their local parts as well, and s, c and m grow by ranks per core at least.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn

import gradclip
from benchmarks.common.gradients import Still, machine
from benchmarks.common.markdown import save, table

WIDTH, BLOCK = 64, 4
REGIMES = {"under": 1e9, "clipping": 1e-3}
OURS = ("function", "hook")
LIMITS = {(2, 48): 0.25, (2, 300): 0.2}
"""Largest share of torch's time, by ranks and parameters."""


class Layer(nn.Module):
    """A weight and a bias, and a way around them, so that gradients reach the first of many."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        """Add to what is passed on."""
        return inputs + self.linear(inputs).tanh()


class Sharded:
    """Parameters of a model on FSDP2, with gradients that can be written anew.

    Args:
        count: How many parameters.
    """

    def __init__(self, count: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        layers = [Layer() for _ in range(count // 2)]
        blocks = [nn.Sequential(*layers[i : i + BLOCK]) for i in range(0, len(layers), BLOCK)]
        model = nn.Sequential(*blocks)
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh)
        torch.manual_seed(1 + distributed.get_rank())
        model(torch.randn(8, WIDTH)).square().mean().backward()
        self._model = model
        self.parameters = [*model.parameters()]
        self.held = [parameter.grad.to_local() for parameter in self.parameters]
        self._source = [gradient.clone() for gradient in self.held]

    def rewrite(self) -> None:
        """Write the gradients of the backward pass."""
        torch._foreach_copy_(self.held, self._source)


def rivals_for(gradients: Sharded, max_norm: float, held: ExitStack) -> dict[str, Callable]:
    """Return ways to clip to a threshold and to know the norm, and the collective alone."""
    parameters, optimizer = gradients.parameters, Still(gradients.parameters)
    held.enter_context(gradclip.GradientClipper(optimizer, max_norm))
    number = torch.zeros(1, dtype=torch.float64)
    return {
        "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm).full_tensor(),
        "function": lambda: gradclip.clip_grad_norm_(parameters, max_norm),
        "hook": optimizer.step,
        "all_reduce": lambda: distributed.all_reduce(number),
    }


def medians_of(
    rivals: Mapping[str, Callable[[], object]], prepare: Callable[[], None], rounds: int
) -> dict[str, float]:
    """Return the median time of each rival over all ranks, in seconds. Collective.

    As `interleaved_medians`, but by rounds: all ranks have to make equally many.
    """
    names = list(rivals)
    began, done = torch.zeros(2, len(names), rounds + 1, dtype=torch.float64)
    for turn in range(rounds + 1):
        for place in range(turn, turn + len(names)):
            index = place % len(names)
            prepare()
            distributed.barrier()
            start = time.perf_counter()
            rivals[names[index]]()
            began[index, turn], done[index, turn] = start, time.perf_counter()
    for times in (began, done):
        distributed.all_reduce(times, distributed.ReduceOp.MAX)
    # The first round pays for what is allocated once.
    taken = (done - began)[:, 1:].tolist()
    return {name: statistics.median(each) for name, each in zip(names, taken, strict=True)}


def collectives_in(call: Callable[[], object]) -> int:
    """Count the collectives that a call enters."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        call()
    return int(mode.get_total_counts())


def check(gradients: Sharded, rivals: Mapping[str, Callable[[], object]]) -> None:
    """Check that all leave the same gradients behind.

    Raises:
        ValueError: One does not.
    """
    left = {}
    for name in ("torch", *OURS):
        gradients.rewrite()
        rivals[name]()
        left[name] = torch.cat([gradient.flatten() for gradient in gradients.held])
    for name in OURS:
        if not torch.allclose(left[name], left["torch"], rtol=1e-4, atol=0):
            raise ValueError(f"{name} and torch left different gradients behind.")


def measure(gradients: Sharded, regime: str, rounds: int) -> dict[str, Any]:
    """Measure all ways to clip in one regime. Collective."""
    with ExitStack() as held:
        rivals = rivals_for(gradients, REGIMES[regime], held)
        check(gradients, rivals)
        medians = medians_of(rivals, gradients.rewrite, rounds)
        collectives = {name: collectives_in(rivals[name]) for name in ("torch", *OURS)}
    ratios = {name: medians[name] / medians["torch"] for name in OURS}
    return {
        "ranks": distributed.get_world_size(),
        "parameters": len(gradients.parameters),
        "regime": regime,
        "us": {name: taken * 1e6 for name, taken in medians.items()},
        "ratios": ratios,
        "collectives": collectives,
    }


def serve(rank: int, ranks: int, folder: str, counts: list[int], rounds: int) -> None:
    """Measure as one of several processes; the first writes what was found."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    rows = []
    for count in counts:
        gradients = Sharded(count)
        rows += [measure(gradients, regime, rounds) for regime in REGIMES]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    distributed.barrier()
    distributed.destroy_process_group()


def measure_ranks(ranks: int, counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """Measure in so many processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, counts, rounds)
        multiprocessing.spawn(serve, arguments, nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
        return rows


def costs(rows: list[dict[str, Any]]) -> list[str]:
    """Return what was measured as a Markdown table."""
    names = ["ranks", "parameters", "regime", "torch, us", *OURS, "collectives, torch", *OURS]
    lines = [
        [
            *(str(row[key]) for key in ("ranks", "parameters", "regime")),
            f"{row['us']['torch']:.0f}",
            *(f"{row['ratios'][name]:.3f}" for name in OURS),
            *(str(row["collectives"][name]) for name in ("torch", *OURS)),
            f"{row['us']['all_reduce']:.0f}",
        ]
        for row in rows
    ]
    return table([*names, "all_reduce, us"], lines)


def figures(rows: list[dict[str, Any]]) -> list[str]:
    """Return what the project has set itself beside what was measured, as a Markdown table."""
    lines = []
    most = max(row["collectives"][name] for row in rows for name in OURS)
    lines.append(["collectives a step, all ranks in one group", "1", f"{most}", f"{most == 1}"])
    for (ranks, parameters), limit in LIMITS.items():
        found = [row for row in rows if (row["ranks"], row["parameters"]) == (ranks, parameters)]
        for name in OURS if found else ():
            worst = max(row["ratios"][name] for row in found)
            what = f"{name}, {ranks} ranks, {parameters} parameters, of torch's time"
            lines.append([what, f"{limit}", f"{worst:.3f}", f"{worst <= limit}"])
    return table(["figure", "limit", "measured", "met"], lines)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--parameters", type=int, nargs="+", default=[48, 300])
    parser.add_argument("--rounds", type=int, default=200, help="calls of each rival in a row")
    parser.add_argument("--save", type=Path, help="a file for the Markdown, too")
    options = parser.parse_args(argv)
    if any(count % 2 for count in options.parameters):
        parser.error("--parameters: a layer has two, so give even numbers")
    rows = [
        row
        for ranks in options.ranks
        for row in measure_ranks(ranks, options.parameters, options.rounds)
    ]
    today = datetime.date.today().isoformat()
    told = {**machine(), "threads": 1, "cores": os.cpu_count(), "date": today}
    lines = [
        ", ".join(f"{key} {value}" for key, value in told.items()),
        f"medians of {options.rounds} calls; ratios to torch's, lower is faster",
        "",
        *costs(rows),
        "",
        *figures(rows),
    ]
    print("\n".join(lines))
    save(lines, options.save)


if __name__ == "__main__":
    main()

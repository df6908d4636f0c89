"""Cost of clipping on FSDP2 beside torch's clip_grad_norm_ with full_tensor(), by ranks.

    python -m benchmarks.cost.distributed [--ranks 2 4] [--parameters 48 300] [--rounds 200]
        [--save benchmarks/results/distributed.md]

A stack of linear layers is sharded by `fully_shard`, in blocks of four and the root, over gloo
processes of one thread each. After a real backward pass all ways to clip are called in turn, in
the same processes, each on gradients that were just copied back and behind a barrier. The time of a
call is the time from the start of the last rank to the end of the last rank, by the clock that all
processes of a machine share. Of each way the fastest tenth of its times is compared, since other
programs on the cores interrupt long calls more than short ones. Collectives are counted by torch's
CommDebugMode, which counts functional and other collectives.

Growth with the number of ranks. The time of a call is modelled as

    t(n, R) = s + n c + k(R)    with    k(R) = a + 2 (R - 1) m

for n gradients on R ranks. s + n c is the work of each rank alone: the host's time for a tensor,
which does not depend on R, and one read of its shards, which shrink with R. k is the single
all-reduce of 8 bytes for each norm, which is pure latency: gloo sends 2 (R - 1) messages of time m
around a ring, one after the other, on top of a constant a. (In a tree, as in nccl, there are 2
log2(R).) torch also has one such collective, and a larger c: the saving grows with n, and the share
of k, which cannot be saved, grows with R.

The last column measures k. On 2 busy shared cores, the fastest tenth of 400 calls in a loop took at
most 0.26, 0.60, 0.81 and 1.65 ms on 2, 3, 4 and 6 ranks: a is small, and m is 0.13 to 0.17 ms. With
8 ranks it took 5.8 ms: if there are more ranks than cores, ranks wait for a core, also in their
local work, and s, c and m grow at least with the ranks per core.
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
from benchmarks.common.timing import orders

WIDTH, BLOCK = 64, 4
REGIMES = {"under": 1e9, "clipping": 1e-3}
OURS = ("function", "hook")
LIMITS = {
    (2, 48, "under"): 0.28,
    (2, 48, "clipping"): 0.32,
    (2, 300, "under"): 0.2,
    (2, 300, "clipping"): 0.25,
}
"""Largest ratio to torch's time, by ranks, parameters and regime."""


class Layer(nn.Module):
    """A linear layer with a residual connection, so that gradients reach the first of many."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs plus the outputs of the layer."""
        return inputs + self.linear(inputs).tanh()


class Sharded:
    """Parameters of a model on FSDP2, with gradients that can be rewritten.

    Args:
        count: Number of parameters.
    """

    def __init__(self, count: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        layers = [Layer() for _ in range(count // 2)]
        blocks = [nn.Sequential(*layers[i : i + BLOCK]) for i in range(0, len(layers), BLOCK)]
        model = nn.Sequential(*blocks)
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh)
        torch.manual_seed(1 + distributed.get_rank())
        model(torch.randn(8, WIDTH)).square().mean().backward()
        self._model = model
        self.parameters = [*model.parameters()]
        self.tensors = [parameter.grad.to_local() for parameter in self.parameters]
        self._source = [gradient.clone() for gradient in self.tensors]

    def rewrite(self) -> None:
        """Restore the gradients of the backward pass."""
        torch._foreach_copy_(self.tensors, self._source)


def rivals_for(gradients: Sharded, max_norm: float, stack: ExitStack) -> dict[str, Callable]:
    """Return calls that clip and return the norm, and a call of the collective alone."""
    parameters, optimizer = gradients.parameters, Still(gradients.parameters)
    stack.enter_context(gradclip.GradientClipper(optimizer, max_norm))
    number = torch.zeros(1, dtype=torch.float64)
    return {
        "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, max_norm).full_tensor(),
        "function": lambda: gradclip.clip_grad_norm_(parameters, max_norm),
        "hook": optimizer.step,
        "all_reduce": lambda: distributed.all_reduce(number),
    }


def fastest_tenths(
    rivals: Mapping[str, Callable[[], object]], prepare: Callable[[], None], rounds: int
) -> dict[str, float]:
    """Return the fastest tenth of each rival's times over all ranks, in seconds. Collective.

    Like `interleaved_medians`, but with a number of rounds: it must be the same on all ranks.
    """
    names = list(rivals)
    began, done = torch.zeros(2, len(names), rounds + 1, dtype=torch.float64)
    for turn, order in zip(range(rounds + 1), orders(names), strict=False):
        for name in order:
            index = names.index(name)
            prepare()
            distributed.barrier()
            start = time.perf_counter()
            rivals[name]()
            began[index, turn], done[index, turn] = start, time.perf_counter()
    for times in (began, done):
        distributed.all_reduce(times, distributed.ReduceOp.MAX)
    # The first round pays for one-time allocations.
    taken = (done - began)[:, 1:].tolist()
    return {
        name: statistics.quantiles(each, n=10, method="inclusive")[0]
        for name, each in zip(names, taken, strict=True)
    }


def collectives_in(call: Callable[[], object]) -> int:
    """Return the number of collectives in a call."""
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        call()
    return int(mode.get_total_counts())


def check(gradients: Sharded, rivals: Mapping[str, Callable[[], object]]) -> None:
    """Check that all rivals leave the same gradients.

    Raises:
        ValueError: Some rivals leave different gradients.
    """
    left = {}
    for name in ("torch", *OURS):
        gradients.rewrite()
        rivals[name]()
        left[name] = torch.cat([gradient.flatten() for gradient in gradients.tensors])
    for name in OURS:
        if not torch.allclose(left[name], left["torch"], rtol=1e-4, atol=0):
            raise ValueError(f"{name} and torch left different gradients behind.")


def measure(gradients: Sharded, regime: str, rounds: int) -> dict[str, Any]:
    """Return the measurements of all rivals in one regime. Collective."""
    with ExitStack() as stack:
        rivals = rivals_for(gradients, REGIMES[regime], stack)
        check(gradients, rivals)
        times = fastest_tenths(rivals, gradients.rewrite, rounds)
        collectives = {name: collectives_in(rivals[name]) for name in ("torch", *OURS)}
    ratios = {name: times[name] / times["torch"] for name in OURS}
    return {
        "ranks": distributed.get_world_size(),
        "parameters": len(gradients.parameters),
        "regime": regime,
        "us": {name: taken * 1e6 for name, taken in times.items()},
        "ratios": ratios,
        "collectives": collectives,
    }


def serve(rank: int, ranks: int, folder: str, counts: list[int], rounds: int) -> None:
    """Measure as one of several processes; the first one writes the rows."""
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
    """Return the rows that this number of new processes measures."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, folder, counts, rounds)
        multiprocessing.spawn(serve, arguments, nprocs=ranks)
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text())
        return rows


def costs(rows: list[dict[str, Any]]) -> list[str]:
    """Return the measurements as a Markdown table."""
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
    """Return the project's limits beside the measurements, as a Markdown table."""
    lines = []
    most = max(row["collectives"][name] for row in rows for name in OURS)
    lines.append(["collectives a step, all ranks in one group", "1", f"{most}", f"{most == 1}"])
    for row in rows:
        ranks, parameters, regime = (row[key] for key in ("ranks", "parameters", "regime"))
        limit = LIMITS.get((ranks, parameters, regime))
        for name in OURS if limit is not None else ():
            what = f"{name}, {ranks} ranks, {parameters} parameters, {regime}, of torch's time"
            measured = row["ratios"][name]
            lines.append([what, f"{limit}", f"{measured:.3f}", f"{measured <= limit}"])
    return table(["figure", "limit", "measured", "met"], lines)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--parameters", type=int, nargs="+", default=[48, 300])
    parser.add_argument("--rounds", type=int, default=200, help="calls of each rival in a row")
    parser.add_argument("--save", type=Path, help="also write the Markdown to this file")
    options = parser.parse_args(argv)
    if any(count % 2 for count in options.parameters):
        parser.error("--parameters: a layer has two, so give even numbers")
    rows = [
        row
        for ranks in options.ranks
        for row in measure_ranks(ranks, options.parameters, options.rounds)
    ]
    today = datetime.date.today().isoformat()
    environment = {**machine(), "threads": 1, "cores": os.cpu_count(), "date": today}
    lines = [
        "Written by `python -m benchmarks.cost.distributed`.",
        "",
        ", ".join(f"{key} {value}" for key, value in environment.items()),
        f"the fastest tenth of {options.rounds} calls; ratios to torch's, lower is faster",
        "",
        *costs(rows),
        "",
        *figures(rows),
    ]
    print("\n".join(lines))
    save(lines, options.save)


if __name__ == "__main__":
    main()

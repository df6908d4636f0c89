"""Processes that train together: a pool for each number of ranks, which many tests use."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT = 60.0


class Pool:
    """Ranks of one gloo group, each a process with one thread.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, count, str(Path(self._folder.name) / "store"))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of a module on all ranks at once; return what each returned.

        Raises:
            AssertionError: It raised on one of them, or took too long.
        """
        for end in self._ends:
            end.send((function, arguments))
        found = []
        for rank, end in enumerate(self._ends):
            assert end.poll(TIMEOUT), f"rank {rank} is silent"
            found.append(end.recv())
        failures = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(found) if error]
        assert not failures, "\n".join(failures)
        return [result for _, result in found]

    def close(self) -> None:
        """End the processes."""
        for end, process in zip(self._ends, self._processes, strict=True):
            end.close()
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _serve(end: Connection, rank: int, count: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            break
        try:
            end.send((None, function(*arguments)))
        except BaseException:  # noqa: BLE001  # whoever called hears of it
            end.send((traceback.format_exc(), None))
    distributed.destroy_process_group()

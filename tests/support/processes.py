"""Processes that train together: a pool for each number of ranks, which many tests use."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from inspect import Parameter, Signature, signature
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TIMEOUT = 60.0

# Every rank is a fork of one process that has imported torch, which takes each of them seconds.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "torch.distributed.fsdp", "gradclip"])


class Pool:
    """Ranks of one gloo group, each a process with one thread."""

    def __init__(self, count: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._ends, self.processes = [], []
        for rank in range(count):
            ours, theirs = CONTEXT.Pipe()
            arguments = (theirs, rank, count, str(Path(self._folder.name) / "store"))
            process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, ranks: Any = None) -> list[Any]:
        """Call a function of a module on all ranks or on some; return what each returned."""
        ranks = range(len(self._ends)) if ranks is None else ranks
        for rank in ranks:
            self._ends[rank].send((function, arguments))
        answers = {}
        for rank in ranks:
            assert self._ends[rank].poll(TIMEOUT), f"rank {rank} is silent"
            answers[rank] = self._ends[rank].recv()
        failures = [f"rank {rank}: {error}" for rank, (error, _) in answers.items() if error]
        assert not failures, "\n".join(failures)
        return [result for _, result in answers.values()]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self.processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def on_ranks(pool: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on all ranks of a pool, a fixture."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(**arguments: Any) -> None:
            arguments.pop(pool).run(_call_body, test.__module__, test.__name__, arguments)

        own = [*signature(test).parameters.values()]
        fixture = Parameter(pool, Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = Signature([fixture, *own])  # type: ignore[attr-defined]
        run.__name__, run.__doc__, run.__module__ = test.__name__, test.__doc__, test.__module__
        run.body = test  # type: ignore[attr-defined]
        return run

    return decorate


def _call_body(module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(import_module(module), name).body(**arguments)


def _serve(end: Any, rank: int, count: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=TIMEOUT / 2)}
    distributed.init_process_group("gloo", init_method=f"file://{store}", **options)
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send((None, function(*arguments)))
        except BaseException as error:  # noqa: BLE001  # whoever called hears of it
            told = traceback.TracebackException.from_exception(error, capture_locals=True)
            end.send(("".join(told.format()), None))

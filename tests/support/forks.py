"""Processes that are forked from one which has imported everything, so that they start at once."""

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

TIMEOUT = 60.0


class Children:
    """Forks of a process without threads, which may die as they like."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.faults.warm"])
        self.begun: list[BaseProcess] = []

    def begin(self, function: Callable[..., None], *arguments: Any) -> BaseProcess:
        """Begin to call a function of a module."""
        process = self.context.Process(target=function, args=arguments)
        process.start()
        self.begun.append(process)
        return process

    def run(self, function: Callable[..., None], *arguments: Any, exitcode: int = 0) -> None:
        """Call a function of a module, and wait for its end."""
        process = self.begin(function, *arguments)
        process.join(TIMEOUT)
        assert process.exitcode == exitcode, "it hangs" if process.is_alive() else "it failed"


@pytest.fixture
def children() -> Iterator[Children]:
    """Return children that are killed at the end if they are still there."""
    children = Children()
    yield children
    for process in children.begun:
        process.kill()
        process.join(TIMEOUT)

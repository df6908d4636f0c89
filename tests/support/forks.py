"""Processes that are forked from one which has imported everything, so that they start at once."""

from __future__ import annotations

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
        self._begun: list[BaseProcess] = []

    def begin(self, function: Callable[..., None], *arguments: Any) -> BaseProcess:
        """Begin to call a function of a module."""
        process = self.context.Process(target=function, args=arguments)
        process.start()
        self._begun.append(process)
        return process

    def run(self, function: Callable[..., None], *arguments: Any, exitcode: int = 0) -> None:
        """Call a function of a module, and wait for its end."""
        process = self.begin(function, *arguments)
        process.join(TIMEOUT)
        assert process.exitcode == exitcode, "it hangs" if process.is_alive() else "it failed"

    def kill(self) -> None:
        """Kill those that are still there."""
        for process in self._begun:
            process.kill()
            process.join(TIMEOUT)
        self._begun.clear()


@pytest.fixture(scope="session")
def _children() -> Children:
    return Children()


@pytest.fixture
def children(_children: Children) -> Iterator[Children]:
    yield _children
    _children.kill()

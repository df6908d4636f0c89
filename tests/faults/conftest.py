"""Processes that may be killed, and TensorBoard's own reader."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from tests.sinks.conftest import read, read_steps

__all__ = ["read", "read_steps"]  # fixtures

TIMEOUT = 60.0


class Children:
    """Processes that are forked from one that has imported everything, and has no threads."""

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

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function of a module; it has to come to an end."""
        process = self.begin(function, *arguments)
        process.join(TIMEOUT)
        assert process.exitcode == 0, "it hangs" if process.is_alive() else "it failed"

    def kill(self) -> None:
        """Kill what is still there."""
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

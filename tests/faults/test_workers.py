"""Workers of a data loader, forked beside a clipper that logs, write nothing and hang nowhere."""

from __future__ import annotations

import atexit
import gc
import json
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.faults.lives import Life, sinks
from tests.support.curves import steps_in

BEFORE, EPOCHS, LENGTH = 5, 2, 8
STEPS = BEFORE + EPOCHS * LENGTH


class Data(Dataset[int]):
    """Says which process read an item; may raise at one of them, or collect garbage."""

    def __init__(self, raises_at: int | None = None, *, collects: bool = False) -> None:
        self._raises_at, self._collects = raises_at, collects

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> int:
        if self._collects and not index:
            gc.collect()
        if index == self._raises_at:
            raise KeyError("no such item")
        return os.getpid()


def loader(data: Data, *, persistent: bool = False) -> DataLoader[int]:
    return DataLoader(
        data,
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        persistent_workers=persistent,
    )


def begun(folder: Path) -> Life:
    """Return a training that has taken steps which wait to be written."""
    torch.set_num_threads(1)
    life = Life(*sinks(folder))
    for _ in range(BEFORE):
        life.step()
    return life


def train(folder: Path, persistent: bool) -> None:
    life, data = begun(folder), loader(Data(), persistent=persistent)
    readers = set()
    for _ in range(EPOCHS):
        for reader in data:
            readers.add(reader)
            life.step()
    assert os.getpid() not in readers
    assert len(readers) == 2 if persistent else 2 * EPOCHS
    life.clipper.close()


def train_and_fail(folder: Path) -> None:
    life = begun(folder)
    items = iter(loader(Data(raises_at=3)))
    for _ in range(3):
        next(items)
        life.step()
    with pytest.raises(KeyError, match="no such item"):
        next(items)
    while life.clipper.steps < STEPS:
        life.step()
    life.clipper.close()


def train_after_another(folder: Path) -> None:
    """Leave a clipper to the garbage collector, which may run first in a worker."""
    gc.disable()
    begun(folder)
    list(loader(Data(collects=True)))
    gc.collect()


def fork_and_exit(folder: Path) -> None:
    """Fork as a program may without a data loader: the child ends as programs do."""
    life = begun(folder)
    child = os.fork()
    if child == 0:
        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(child, 0)
    while life.clipper.steps < STEPS:
        life.step()
    life.clipper.close()


def train_without_close(folder: Path) -> None:
    begun(folder)


def check_written_once(folder, steps):
    """Check that each step is in the logs once, and that one process wrote them."""
    lines = (folder / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(steps)]
    assert steps_in(folder / "events")["grad_norm/pre"] == [*range(steps)]
    assert len(os.listdir(folder / "events")) == 1


def close_in_a_child(folder: Path) -> None:
    """Fork and let the child alone go on, which then owns the logs."""
    life = begun(folder)
    child = os.fork()
    if child == 0:
        life.clipper.close()
    else:
        os.waitpid(child, 0)
    os._exit(0)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_write_nothing(tmp_path, children, persistent):
    children.run(train, tmp_path, persistent)
    check_written_once(tmp_path, STEPS)


def test_a_worker_that_fails_leaves_the_logs_to_the_training(tmp_path, children):
    children.run(train_and_fail, tmp_path)
    check_written_once(tmp_path, STEPS)


def test_a_worker_that_collects_an_old_clipper_writes_nothing(tmp_path, children):
    children.run(train_after_another, tmp_path)
    check_written_once(tmp_path, BEFORE)


def test_a_forked_child_that_exits_writes_nothing(tmp_path, children):
    children.run(fork_and_exit, tmp_path)
    check_written_once(tmp_path, STEPS)


def test_a_forked_process_that_trains_has_written_all_at_its_end(tmp_path, children):
    children.run(train_without_close, tmp_path)
    check_written_once(tmp_path, BEFORE)


def test_a_child_that_closes_what_it_has_inherited_has_written_it(tmp_path, children):
    children.run(close_in_a_child, tmp_path)
    check_written_once(tmp_path, BEFORE)

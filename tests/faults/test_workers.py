"""Workers of a data loader, forked beside a clipper that logs, write nothing and hang nowhere."""

import atexit
import gc
import os

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.faults.lives import LoggedTraining, sinks
from tests.support.curves import lines_in, steps_in

BEFORE, EPOCHS, LENGTH = 5, 2, 8
STEPS = BEFORE + EPOCHS * LENGTH


class Data(Dataset):
    """Says which process read an item; may raise at one of them, or collect garbage."""

    def __init__(self, raises_at=None, *, collects=False):
        self._raises_at, self._collects = raises_at, collects

    def __len__(self):
        return LENGTH

    def __getitem__(self, index):
        if self._collects and not index:
            gc.collect()
        if index == self._raises_at:
            raise KeyError("no such item")
        return os.getpid()


def forking_loader(data, *, persistent=False):
    options = {"num_workers": 2, "multiprocessing_context": "fork"}
    return DataLoader(data, batch_size=None, persistent_workers=persistent, **options)


def begun(folder):
    """Return a training that has taken steps which wait to be written."""
    torch.set_num_threads(1)
    life = LoggedTraining(*sinks(folder))
    for _ in range(BEFORE):
        life.step()
    return life


def end(life):
    while life.clipper.steps < STEPS:
        life.step()
    life.clipper.close()


def train_with_workers(folder, persistent=False):
    life, data = begun(folder), forking_loader(Data(), persistent=persistent)
    readers = set()
    for _ in range(EPOCHS):
        for reader in data:
            readers.add(reader)
            life.step()
    assert os.getpid() not in readers
    assert len(readers) == 2 if persistent else 2 * EPOCHS
    life.clipper.close()


def train_with_persistent_workers(folder):
    train_with_workers(folder, persistent=True)


def train_with_a_worker_that_fails(folder):
    life = begun(folder)
    items = iter(forking_loader(Data(raises_at=3)))
    for _ in range(3):
        next(items)
        life.step()
    with pytest.raises(KeyError, match="no such item"):
        next(items)
    end(life)


def leave_a_clipper_to_a_worker(folder):
    """Leave a clipper to the garbage collector, which runs first in a worker."""
    gc.disable()
    begun(folder)
    list(forking_loader(Data(collects=True)))
    gc.collect()


def fork_without_a_loader(folder):
    """The child ends as programs do."""
    life = begun(folder)
    child = os.fork()
    if child == 0:
        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(child, 0)
    end(life)


def train_without_close(folder):
    """A forked process that trains writes everything at its end."""
    begun(folder)


def close_in_a_child(folder):
    """The child alone goes on, which then owns the logs."""
    life = begun(folder)
    child = os.fork()
    if child == 0:
        life.clipper.close()
    else:
        os.waitpid(child, 0)
    os._exit(0)


@pytest.mark.parametrize(
    ("life", "steps"),
    [
        (train_with_workers, STEPS),
        (train_with_persistent_workers, STEPS),
        (train_with_a_worker_that_fails, STEPS),
        (leave_a_clipper_to_a_worker, BEFORE),
        (fork_without_a_loader, STEPS),
        (train_without_close, BEFORE),
        (close_in_a_child, BEFORE),
    ],
)
def test_each_step_is_written_once(tmp_path, children, life, steps):
    """By one process, whichever forks there are."""
    children.run(life, tmp_path)
    assert [line["step"] for line in lines_in(tmp_path / "steps.jsonl")] == [*range(steps)]
    assert steps_in(tmp_path / "events")["grad_norm/pre"] == [*range(steps)]
    assert len(os.listdir(tmp_path / "events")) == 1

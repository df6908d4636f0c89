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
    """Says which process read an item, after an action at each."""

    def __init__(self, act=int):
        self._act = act

    def __len__(self):
        return LENGTH

    def __getitem__(self, index):
        self._act(index)
        return os.getpid()


def fail_at_three(index):
    if index == 3:
        raise KeyError("no such item")


def collect_garbage(index):
    gc.collect()


def loader_of(data, *, persistent=False):
    options = {"num_workers": 2, "multiprocessing_context": "fork"}
    return DataLoader(data, batch_size=None, persistent_workers=persistent, **options)


def begun(folder):
    """Return a training that has taken steps which wait to be written."""
    torch.set_num_threads(1)
    life = LoggedTraining(*sinks(folder))
    life.step_up_to(BEFORE)
    return life


def train_with_workers(folder, persistent):
    life, data = begun(folder), loader_of(Data(), persistent=persistent)
    readers = set()
    for _ in range(EPOCHS):
        for reader in data:
            readers.add(reader)
            life.step()
    assert os.getpid() not in readers
    assert len(readers) == 2 if persistent else 2 * EPOCHS
    life.clipper.close()


def train_with_a_worker_that_fails(folder):
    life = begun(folder)
    items = iter(loader_of(Data(fail_at_three)))
    for _ in range(3):
        next(items)
        life.step()
    with pytest.raises(KeyError, match="no such item"):
        next(items)
    life.step_up_to(STEPS)
    life.clipper.close()


def leave_a_clipper_to_a_worker(folder):
    """Leave a clipper to the garbage collector, which runs first in a worker."""
    gc.disable()
    begun(folder)
    list(loader_of(Data(collect_garbage)))
    gc.collect()


def fork_without_a_loader(folder):
    """The child ends as programs do."""
    life, child = begun(folder), os.fork()
    if child == 0:
        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(child, 0)
    life.step_up_to(STEPS)
    life.clipper.close()


def close_in_a_child(folder):
    """The child alone goes on, which then owns the logs."""
    life, child = begun(folder), os.fork()
    if child == 0:
        life.clipper.close()
    else:
        os.waitpid(child, 0)
    os._exit(0)


@pytest.mark.parametrize(
    ("steps", "life", "arguments"),
    [
        (STEPS, train_with_workers, [False]),
        (STEPS, train_with_workers, [True]),
        (STEPS, train_with_a_worker_that_fails, []),
        (BEFORE, leave_a_clipper_to_a_worker, []),
        (STEPS, fork_without_a_loader, []),
        (BEFORE, begun, []),  # a forked process that trains writes everything at its end
        (BEFORE, close_in_a_child, []),
    ],
)
def test_each_step_is_written_once(tmp_path, children, steps, life, arguments):
    """By one process, whichever forks there are."""
    children.run(life, tmp_path, *arguments)
    assert [line["step"] for line in lines_in(tmp_path / "steps.jsonl")] == [*range(steps)]
    assert steps_in(tmp_path / "events")["grad_norm/pre"] == [*range(steps)]
    assert len(os.listdir(tmp_path / "events")) == 1

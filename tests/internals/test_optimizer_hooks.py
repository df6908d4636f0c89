"""Parts of a hook whose cases are easier to make than to provoke through a clipper."""

import functools

import pytest
import torch
from torch import nn

from gradclip import ClipRecord
from gradclip.optimizers.clipped_already import ClippedGradients
from gradclip.optimizers.closures import ClosureFinder
from gradclip.optimizers.shared_overflow import SharedOverflow
from gradclip.optimizers.step_changes import StepChanges
from tests.support.clippers import optimizer_of

ONE, OTHER = optimizer_of(), optimizer_of()


def closure() -> float:
    return 1.0


class Renamed(torch.optim.SGD):
    def step(self, scale=1.0, loss_closure=None):
        return super().step(loss_closure)


class Second(torch.optim.SGD):
    def step(self, scale=1.0, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "there"),
    [
        (torch.optim.SGD, (closure,), {}, True),
        (torch.optim.SGD, (), {"closure": closure}, True),
        (Second, (0.5, closure), {}, True),
        (Second, (0.5,), {"closure": closure}, True),
        (Renamed, (0.5, closure), {}, True),
        (Renamed, (), {"scale": 2.0, "loss_closure": closure}, True),
        (Renamed, (), {"loss_closure": functools.partial(closure)}, True),
        (torch.optim.SGD, (), {}, False),
        (torch.optim.SGD, (None,), {}, False),
        (torch.optim.SGD, (), {"closure": None}, False),
        (Second, (0.5,), {}, False),
        (Second, (closure,), {}, False),
        (Renamed, (0.5, None), {}, False),
        (Renamed, (torch.ones(1), nn.Linear(1, 1)), {"loss_closure": float}, False),
    ],
)
def test_a_closure_is_found_and_replaced(kind, args, kwargs, there):
    finder, args = ClosureFinder(optimizer_of(kind)), ("the optimizer", *args)
    found = finder.find(args, kwargs)
    if not there:
        assert found is None
        return
    assert found() == 1.0
    new_args, new_kwargs = finder.replace(args, kwargs, other := lambda: 2.0)
    assert finder.find(new_args, new_kwargs) is other
    assert len(new_args) == len(args)
    assert new_kwargs.keys() == kwargs.keys()
    assert [new for new, old in zip(new_args, args, strict=True) if new is not old] in ([], [other])


def record() -> ClipRecord:
    return ClipRecord(0, 0.0, torch.ones(1), torch.ones(1), torch.ones(1))


def test_a_step_writes_known_gradients_and_uses_up_their_record():
    gradient, newest, clipped = torch.ones(3), record(), ClippedGradients()
    clipped.mark_stepped(ONE, [gradient])
    assert not clipped.known_among([gradient])
    clipped.add([gradient], newest)
    gradient.div_(2)  # as a fused optimizer unscales
    clipped.mark_stepped(ONE, [gradient])
    assert clipped.known_among([gradient])
    assert clipped.records_for(ONE, [gradient]) == [None]
    assert clipped.records_for(OTHER, [gradient]) == [newest]
    clipped.add([gradient], newest)
    assert clipped.records_for(ONE, [gradient]) == [newest]


def test_tensors_that_are_gone_are_forgotten():
    """Another tensor may have the id of one."""
    clipped, newest = ClippedGradients(), record()
    for _ in range(100):
        gradient = torch.ones(3)
        assert not clipped.known_among([gradient])
        clipped.add([gradient], newest)
        assert len(clipped._records) == 1
        del gradient


def test_tensors_of_inference_mode_are_never_known():
    with torch.inference_mode():
        gradient = torch.ones(3)
    clipped = ClippedGradients()
    clipped.add([gradient], record())
    assert not clipped.known_among([gradient])
    assert clipped.records_for(ONE, [gradient]) == [None]


def test_attributes_are_restored_unless_somebody_else_has_changed_them():
    optimizer = optimizer_of()
    optimizer.there = optimizer.deleted = there = object()
    changes = StepChanges(optimizer)
    for name in ("there", "absent", "deleted", "theirs"):
        changes.set(name, 1)
        changes.set(name, 2)
        assert getattr(optimizer, name) == 2
    del optimizer.deleted
    optimizer.theirs = theirs = object()
    changes.undo()
    assert optimizer.there is there
    assert not hasattr(optimizer, "absent")
    assert not hasattr(optimizer, "deleted")
    assert optimizer.theirs is theirs
    assert not changes
    optimizer.there = 3
    changes.undo()
    assert optimizer.there == 3


def test_a_second_release_leaves_the_overflows_of_the_next_clipper_shared():
    scaler, device = torch.amp.GradScaler("cpu"), torch.device("cpu")
    first = SharedOverflow(scaler, [ONE], None, device)
    first.release()
    assert type(scaler) is torch.amp.GradScaler
    second = SharedOverflow(scaler, [ONE], None, device)
    first.release()
    assert scaler.shared_overflows[ONE] is second
    second.release()
    assert type(scaler) is torch.amp.GradScaler

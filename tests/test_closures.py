from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from gradclip.optimizers.closures import ClosureFinder


def closure() -> float:
    return 1.0


class Renamed(torch.optim.SGD):
    def step(self, scale=1.0, loss_closure=None):
        return super().step(loss_closure)


class Second(torch.optim.SGD):
    def step(self, scale=1.0, closure=None):
        return super().step(closure)


def finder(kind: type[torch.optim.Optimizer]) -> ClosureFinder:
    return ClosureFinder(kind([nn.Parameter(torch.ones(1))], lr=1.0))


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        (torch.optim.SGD, (closure,), {}),
        (torch.optim.SGD, (), {"closure": closure}),
        (Second, (0.5, closure), {}),
        (Second, (0.5,), {"closure": closure}),
        (Second, (), {"closure": closure, "scale": 2.0}),
        (Renamed, (0.5, closure), {}),
        (Renamed, (), {"scale": 2.0, "loss_closure": closure}),
        (Renamed, (), {"loss_closure": functools.partial(closure)}),
    ],
)
def test_a_closure_is_found_and_replaced_wherever_it_is(kind, args, kwargs):
    found = finder(kind)
    args = ("the optimizer", *args)
    assert found.find(args, kwargs)() == 1.0
    new_args, new_kwargs = found.replace(args, kwargs, other := lambda: 2.0)
    assert found.find(new_args, new_kwargs) is other
    assert len(new_args) == len(args)
    assert new_kwargs.keys() == kwargs.keys()
    assert [new for new, old in zip(new_args, args, strict=True) if new is not old] in ([], [other])


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        (torch.optim.SGD, (), {}),
        (torch.optim.SGD, (None,), {}),
        (torch.optim.SGD, (), {"closure": None}),
        (Second, (0.5,), {}),
        (Second, (closure,), {}),
        (Renamed, (0.5, None), {}),
        (Renamed, (torch.ones(1), nn.Linear(1, 1)), {"loss_closure": float}),
    ],
)
def test_what_is_no_closure_is_not_taken_for_one(kind, args, kwargs):
    assert finder(kind).find(("the optimizer", *args), kwargs) is None

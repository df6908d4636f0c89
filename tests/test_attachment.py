from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from gradclip import AttachError, GradientClipper, NotAvailableError


def optimizer_of(kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([3.0, 4.0])
    return kind([weight], lr=1.0, **options)


def gradient(optimizer: torch.optim.Optimizer) -> list[float]:
    return optimizer.param_groups[0]["params"][0].grad.tolist()


class Wrapper:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class Hookless(torch.optim.Optimizer):
    """A wrapper that passes isinstance without having gone through Optimizer.__init__."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "No optimizer was given: give a torch.optim.Optimizer"),
        ([], "No optimizer was given"),
        (torch.optim.SGD, "Found the class SGD: give a torch.optim.Optimizer"),
        (nn.Linear(1, 1), "Found a Linear: give a torch.optim.Optimizer"),
        (iter([]), "Found a list_iterator: give a torch.optim.Optimizer"),
        (Hookless(None), "Hookless has no step hooks.*give the optimizer that it wraps"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_optimizer_with_hooks_is_refused(found, message):
    with pytest.raises(AttachError, match=message):
        GradientClipper(found, 1.0)


def test_a_list_of_one_optimizer_is_that_optimizer():
    optimizer = optimizer_of()
    GradientClipper([optimizer], 1.0)
    optimizer.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("wrapper", [Wrapper, Hookless, lambda inner: Wrapper(Hookless(inner))])
def test_of_a_wrapper_the_inner_optimizer_is_clipped(wrapper):
    optimizer = optimizer_of()
    clipper = GradientClipper(wrapper(optimizer), 1.0)
    with pytest.raises(AttachError, match="Another GradientClipper is attached to this SGD"):
        GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    assert clipper.steps == 1


def test_the_steps_of_a_clipper_go_through_the_wrapper():
    optimizer = optimizer_of()
    clipper = GradientClipper(Hookless(optimizer), 1.0)
    assert clipper.step(lambda: 7.0) == 7.0
    assert clipper.steps == 1


def test_a_second_clipper_on_the_same_optimizer_is_refused():
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)
    with pytest.raises(AttachError, match="Another GradientClipper is attached to this SGD: det"):
        GradientClipper(optimizer, 2.0)
    optimizer.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    clipper.detach()
    GradientClipper(optimizer, 2.0)


def test_a_differentiable_optimizer_is_refused():
    optimizer = optimizer_of(torch.optim.Adam, differentiable=True)
    with pytest.raises(AttachError, match="Adam has differentiable=True"):
        GradientClipper(optimizer, 1.0)
    assert gradient(optimizer) == [3.0, 4.0]


def test_one_differentiable_group_is_enough_to_refuse():
    optimizer = optimizer_of()
    weight = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [weight], "differentiable": True})
    with pytest.raises(AttachError, match="SGD has differentiable=True"):
        GradientClipper(optimizer, 1.0)


def test_a_differentiable_group_added_later_is_refused_at_the_step():
    optimizer = optimizer_of()
    GradientClipper(optimizer, 1.0)
    weight = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [weight], "differentiable": True})
    with pytest.raises(AttachError, match="SGD has differentiable=True"):
        optimizer.step()
    assert gradient(optimizer) == [3.0, 4.0]


def test_lbfgs_cannot_skip():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(AttachError, match="LBFGS .* choose another policy than 'skip'"):
        GradientClipper(torch.optim.LBFGS([weight]), 1.0, nonfinite="skip")


def test_flattened_shards_are_refused():
    optimizer = optimizer_of()
    optimizer.param_groups[0]["params"][0]._fsdp_flattened = True
    with pytest.raises(NotAvailableError, match="FullyShardedDataParallel is not available"):
        GradientClipper(optimizer, 1.0)


@pytest.mark.parametrize("unscale", [True, False])
def test_under_a_scaler_an_ordinary_optimizer_sees_the_true_norm(unscale):
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    weight = optimizer.param_groups[0]["params"][0]
    scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert clipper.last.norm.item() == 5.0
    assert weight.tolist() == pytest.approx([0.4, 0.2], rel=1e-6)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copied_optimizer_is_free_and_can_be_attached_again(copier):
    optimizer = optimizer_of()
    GradientClipper(optimizer, 1.0)
    twin = copier(optimizer)
    weight = twin.param_groups[0]["params"][0]
    weight.grad = torch.tensor([3.0, 4.0])
    GradientClipper(twin, 0.5)
    twin.step()
    assert weight.grad.tolist() == pytest.approx([0.3, 0.4])


def test_other_hooks_stay_when_a_clipper_is_detached():
    optimizer = optimizer_of()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    clipper.detach()
    optimizer.step()
    assert calls == ["before", "after"]


def test_a_closure_given_as_none_counts_as_absent():
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert clipper.steps == 2


def test_an_exception_in_a_closure_leaves_the_optimizer_unstepped():
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)

    def closure() -> float:
        raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["params"][0].tolist() == [1.0, 1.0]
    assert clipper.steps == 0
    optimizer.step()
    assert clipper.steps == 1

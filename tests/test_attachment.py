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


# A step within a step


class Stepping(torch.optim.SGD):
    """A subclass that steps through its parent, as many do."""

    def step(self, closure=None):
        loss = super().step(closure)
        if self.defaults["weight_decay"]:
            raise OSError("after the parent")
        return loss


@pytest.fixture
def _hooked_parent():
    """The parent's own step calls hooks from the first instance on."""
    optimizer_of(torch.optim.SGD)
    assert torch.optim.SGD.step.hooked


@pytest.mark.usefixtures("_hooked_parent")
@pytest.mark.parametrize("kind", [Stepping, type("Twice", (Stepping,), {"step": Stepping.step})])
def test_a_step_through_the_parent_is_clipped_and_counted_once(kind):
    optimizer = optimizer_of(kind)
    calls = []
    clipper = GradientClipper(optimizer, lambda step: calls.append(step) or 1.0)
    for _ in range(3):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    assert calls == [0, 1, 2]
    assert clipper.steps == 3


@pytest.mark.usefixtures("_hooked_parent")
def test_a_closure_is_wrapped_once_in_a_step_through_the_parent():
    optimizer = optimizer_of(Stepping)
    calls = []
    clipper = GradientClipper(optimizer, lambda step: calls.append(step) or 1.0)

    def closure():
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert optimizer.step(closure=closure) == 7.0
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    assert calls == [0, 1]
    assert clipper.steps == 2


@pytest.mark.usefixtures("_hooked_parent")
def test_after_a_step_through_the_parent_that_raised_the_next_is_clipped_again():
    optimizer = optimizer_of(Stepping, weight_decay=1.0)
    clipper = GradientClipper(optimizer, 1.0)
    for _ in range(2):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
        with pytest.raises(OSError, match="after the parent"):
            optimizer.step()
        assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    optimizer.defaults["weight_decay"] = 0
    optimizer.step()
    assert clipper.steps == 1


class Lookahead(torch.optim.Optimizer):
    """A wrapper that is an optimizer itself and steps the one inside."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base_optimizer = base
        super().__init__([nn.Parameter(torch.ones(1))], {})

    def step(self, closure=None):
        return self.base_optimizer.step(closure)


def test_of_a_wrapper_that_is_an_optimizer_the_inner_one_is_clipped():
    optimizer = optimizer_of()
    wrapper = Lookahead(optimizer)
    clipper = GradientClipper(wrapper, 1.0)
    wrapper.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
    clipper.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    assert clipper.steps == 2


# What can't be clipped


class Ignoring(torch.optim.SGD):
    """Takes a closure and never calls it."""

    def step(self, closure=None):
        return super().step()


def test_a_closure_that_is_never_called_is_an_error():
    optimizer = optimizer_of(Ignoring)
    clipper = GradientClipper(optimizer, 1.0)
    with pytest.raises(AttachError, match=r"Ignoring.step\(\) never called the closure"):
        optimizer.step(lambda: 1.0)
    optimizer.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    assert clipper.steps == 1


def test_a_step_inside_backward_is_refused():
    optimizer = optimizer_of()
    [weight] = optimizer.param_groups[0]["params"]
    weight.grad = None
    clipper = GradientClipper(optimizer, 1.0)
    weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(AttachError, match=r"SGD steps inside backward\(\)"):
        (weight * 5).sum().backward()
    assert weight.tolist() == [1.0, 1.0]
    assert gradient(optimizer) == [5.0, 5.0]
    assert clipper.steps == 0


@pytest.mark.parametrize("where", ["group", "attribute"])
def test_an_optimizer_that_clips_by_itself_gets_a_warning(where):
    optimizer = optimizer_of()
    if where == "group":
        optimizer.param_groups[0]["max_grad_norm"] = 1.0
    else:
        optimizer.max_grad_norm = 1.0
    with pytest.warns(UserWarning, match="SGD clips by itself with max_grad_norm=1.0") as found:
        GradientClipper(optimizer, 1.0)
    assert found[0].filename == __file__


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_an_optimizer_whose_own_clipping_is_off_gets_none(off):
    optimizer = optimizer_of()
    optimizer.param_groups[0]["max_grad_norm"] = off
    optimizer.max_grad_norm = off
    GradientClipper(optimizer, 1.0)


# Compiled


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
@pytest.mark.parametrize("policy", ["zero", "skip"])
def test_a_compiled_step_is_clipped_and_compiles_what_it_would_without(policy):
    graphs = {True: [], False: []}
    for clips, found in graphs.items():

        def backend(module, _, found=found):
            found.append([str(node.target) for node in module.graph.nodes])
            return module

        torch._dynamo.reset()
        optimizer = optimizer_of(torch.optim.Adam)
        clipper = GradientClipper(optimizer, 1.0, nonfinite=policy) if clips else None
        step = torch.compile(optimizer.step, backend=backend)
        for _ in range(3):
            optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
            step()
        if clipper is not None:
            assert gradient(optimizer) == pytest.approx([0.6, 0.8])
            optimizer.param_groups[0]["params"][0].grad = torch.full((2,), float("nan"))
            step()
            assert clipper.steps == 4
            assert clipper.skipped == (policy == "skip")
            assert optimizer.param_groups[0]["params"][0].isfinite().all()
    torch._dynamo.reset()
    assert graphs[True] == graphs[False]
    assert len(graphs[True]) == 1

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from gradclip import AttachError, GradientClipper


def optimizer_of(kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([3.0, 4.0])
    return kind([weight], lr=1.0, **options)


def gradient(optimizer: torch.optim.Optimizer) -> list[float]:
    return optimizer.param_groups[0]["params"][0].grad.tolist()


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


class Deeper(Stepping):
    def step(self, closure=None):
        return super().step(closure=closure)


@pytest.fixture
def _hooked_parent():
    """The parent's own step calls hooks from the first instance on."""
    for kind in (torch.optim.SGD, Stepping):
        optimizer_of(kind)
        assert kind.step.hooked


@pytest.mark.usefixtures("_hooked_parent")
@pytest.mark.parametrize("kind", [Stepping, Deeper])
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


class Rescaling(torch.optim.SGD):
    """Changes its gradients before it steps through its parent."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.mul_(100)
        return super().step(closure)


@pytest.mark.usefixtures("_hooked_parent")
def test_what_a_step_changes_before_its_parent_steps_is_clipped_again():
    optimizer = optimizer_of(Rescaling)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    assert optimizer.param_groups[0]["params"][0].tolist() == pytest.approx([0.4, 0.2])
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(100.0)


class Clearing(torch.optim.SGD):
    """Clears its gradients after it stepped through its parent."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.zero_grad()
        return loss


@pytest.mark.usefixtures("_hooked_parent")
def test_a_skipped_gradient_that_a_step_clears_does_not_come_back():
    optimizer = optimizer_of(Clearing)
    [weight] = optimizer.param_groups[0]["params"]
    weight.grad.fill_(float("nan"))
    clipper = GradientClipper(optimizer, 1.0, nonfinite="skip")
    optimizer.step()
    assert weight.grad is None
    (weight * 0.1).sum().backward()
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.9, 0.9])
    assert (clipper.steps, clipper.skipped) == (2, 1)


class Decaying(torch.optim.SGD):
    """Writes its parameters whether they have gradients or not."""

    def step(self, closure=None):
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(0.5)
        return super().step(closure)


@pytest.mark.usefixtures("_hooked_parent")
def test_a_skipped_step_that_writes_parameters_all_the_same_gets_a_warning():
    optimizer = optimizer_of(Decaying)
    GradientClipper(optimizer, 1.0, exceed="skip")
    with pytest.warns(UserWarning, match="Decaying changed parameters in a step that was to be"):
        optimizer.step()
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([0.3, 0.4])
    optimizer.step()


class Forgiving(torch.optim.SGD):
    """Goes on when its parent's step raises."""

    def step(self, closure=None):
        try:
            return super().step(closure)
        except OSError:
            return None


@pytest.mark.usefixtures("_hooked_parent")
def test_a_step_whose_inner_step_raised_is_counted():
    optimizer = optimizer_of(Forgiving)
    clipper = GradientClipper(optimizer, 1.0)
    calls = []

    def fail_inside(*_):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise OSError

    optimizer.register_step_pre_hook(fail_inside)
    optimizer.step()
    optimizer.step()
    assert len(calls) == 4
    assert clipper.steps == 2


# Other hooks


@pytest.mark.parametrize("arguments", [lambda a, k: (a, dict(k)), lambda a, k: (tuple(a), {})])
def test_a_skip_outlives_a_later_hook_with_arguments_of_its_own(arguments):
    optimizer = optimizer_of(torch.optim.Adam)
    [weight] = optimizer.param_groups[0]["params"]
    held = weight.grad
    clipper = GradientClipper(optimizer, 1.0, exceed="skip")
    optimizer.register_step_pre_hook(lambda _, args, kwargs: arguments(args, kwargs))
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]
    assert weight.grad is held
    assert clipper.skipped == 1


def test_what_was_computed_after_a_skipped_step_that_raised_stays():
    optimizer = optimizer_of()
    [weight] = optimizer.param_groups[0]["params"]
    GradientClipper(optimizer, 1.0, exceed="skip")

    def fail(*_):
        raise OSError

    hook = optimizer.register_step_pre_hook(fail)
    try:
        optimizer.step()
    except OSError as error:
        kept = error  # and with it what the step was called with
    optimizer.zero_grad()
    hook.remove()
    (weight * 0.1).sum().backward()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.95, 0.95])
    assert optimizer.param_groups[0]["lr"] == 0.5
    del kept
    assert gradient(optimizer) == pytest.approx([0.1, 0.1])


def test_post_hooks_registered_before_find_everything_put_back():
    optimizer = optimizer_of()
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(gradient(optimizer)))
    GradientClipper(optimizer, 1.0, exceed="skip")
    optimizer.step()
    assert seen == [[3.0, 4.0]]


def test_a_closure_may_take_arguments():
    class Passing(torch.optim.SGD):
        def step(self, closure=None):
            closure(4.0, first=3.0)
            return super().step()

    optimizer = optimizer_of(Passing)
    clipper = GradientClipper(optimizer, 1.0)

    def closure(second, *, first):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([first, second])

    optimizer.step(closure)
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    assert clipper.steps == 1


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


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_a_checkpoint_takes_to_make_state_is_not_seen(kind):
    """It sets gradients of 0 where there are none, for an optimizer without state."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    net = nn.Linear(2, 1)
    optimizer = kind(net.parameters(), lr=0.1)
    clipper = GradientClipper(optimizer, 1.0)
    get_state_dict(net, optimizer)
    assert (clipper.steps, clipper.last) == (0, None)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    get_state_dict(net, optimizer)
    assert clipper.steps == 1

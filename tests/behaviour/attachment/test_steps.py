"""One step from its first hook to its last: closures, other hooks, steps in steps, and errors."""

import math

import pytest
import torch
from torch import nn

from gradclip import AttachError, GradientClipper
from tests.support.clippers import CALLS, gradient, optimizer_of, step_by

CLIPPED = pytest.approx([0.6, 0.8])


def weight_of(optimizer: torch.optim.Optimizer) -> nn.Parameter:
    return optimizer.param_groups[0]["params"][0]


def test_a_closure_given_as_none_counts_as_absent():
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert clipper.steps == 2


class Passing(torch.optim.SGD):
    """Calls its closure with arguments."""

    def step(self, closure=None):
        closure(4.0, first=3.0)
        return super().step()


class Ignoring(torch.optim.SGD):
    """Takes a closure and never calls it."""

    def step(self, closure=None):
        return super().step()


def test_a_closure_may_take_arguments():
    optimizer = optimizer_of(Passing)
    clipper = GradientClipper(optimizer, 1.0)

    def closure(second, *, first):
        weight_of(optimizer).grad = torch.tensor([first, second])

    optimizer.step(closure)
    assert gradient(optimizer) == CLIPPED
    assert clipper.steps == 1


def test_a_closure_that_is_never_called_is_an_error():
    optimizer = optimizer_of(Ignoring)
    clipper = GradientClipper(optimizer, 1.0)
    with pytest.raises(AttachError, match=r"Ignoring.step\(\) never called the closure"):
        optimizer.step(lambda: 1.0)
    optimizer.step()
    assert gradient(optimizer) == CLIPPED
    assert clipper.steps == 1


# A step that takes the step of its parent class, whose hooks are the same


class Stepping(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        if self.defaults["weight_decay"]:
            raise OSError("after the parent")
        return loss


class Deeper(Stepping):
    def step(self, closure=None):
        return super().step(closure=closure)


class Rescaling(torch.optim.SGD):
    """Changes its gradients before it steps through its parent."""

    def step(self, closure=None):
        weight_of(self).grad.mul_(100)
        return super().step(closure)


class Indirect(torch.optim.SGD):
    """The same, in a way that its code does not show."""

    def step(self, closure=None):
        weight_of(self).grad.mul_(100)
        return getattr(torch.optim.SGD, "st" + "ep")(self, closure)


class EverySecond(torch.optim.SGD):
    """Steps every second time; the other times it decays at most."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        if self.count % 2 == 0:
            return super().step(closure)
        if self.defaults["weight_decay"]:
            with torch.no_grad():
                weight_of(self).mul_(0.5)
        return None


class Clearing(torch.optim.SGD):
    """Clears its gradients after it stepped through its parent."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.zero_grad()
        return loss


class Decaying(torch.optim.SGD):
    """Writes its parameters whether they have gradients or not."""

    def step(self, closure=None):
        with torch.no_grad():
            weight_of(self).mul_(0.5)
        return super().step(closure)


class Forgiving(torch.optim.SGD):
    """Goes on when its parent's step raises."""

    def step(self, closure=None):
        try:
            return super().step(closure)
        except OSError:
            return None


@pytest.fixture(autouse=True)
def _hooked_parents():
    """A class's own step calls hooks from its first instance on."""
    for kind in (torch.optim.SGD, Stepping):
        assert optimizer_of(kind).step.hooked


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [Stepping, Deeper])
def test_a_nested_step_is_clipped_and_counted_once(kind, call):
    optimizer, calls = optimizer_of(kind), []
    clipper = GradientClipper(optimizer, lambda step: calls.append(step) or 1.0)

    def closure() -> float:
        weight_of(optimizer).grad = torch.tensor([3.0, 4.0])
        return 7.0

    for _ in range(3):
        assert step_by(optimizer, call, closure) == (None if call == "step()" else 7.0)
        assert gradient(optimizer) == CLIPPED
    assert calls == [0, 1, 2]
    assert clipper.steps == 3


def test_after_an_outer_step_that_raised_the_next_is_clipped_again():
    optimizer = optimizer_of(Stepping, weight_decay=1.0)
    clipper = GradientClipper(optimizer, 1.0)
    for _ in range(2):
        weight_of(optimizer).grad = torch.tensor([3.0, 4.0])
        with pytest.raises(OSError, match="after the parent"):
            optimizer.step()
        assert gradient(optimizer) == CLIPPED
    optimizer.defaults["weight_decay"] = 0
    optimizer.step()
    assert clipper.steps == 1


@pytest.mark.parametrize("call", CALLS)
def test_the_innermost_step_clips(call):
    """Nothing is clipped before the outer step changes the gradients."""
    optimizer = optimizer_of(Rescaling)
    clipper = GradientClipper(optimizer, 1.0)

    def closure() -> None:
        weight_of(optimizer).grad = torch.tensor([3.0, 4.0])

    step_by(optimizer, call, closure)
    needed = 500.0 if call == "step()" else 5.0  # the parent calls the closure
    assert clipper.last.norm.item() == pytest.approx(needed)
    assert gradient(optimizer) == CLIPPED
    assert weight_of(optimizer).tolist() == pytest.approx([0.4, 0.2])
    assert clipper.steps == 1


def test_gradients_that_a_step_changes_unforeseen_are_clipped_again():
    """Where the code does not show that the parent's step is called."""
    optimizer = optimizer_of(Indirect)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert gradient(optimizer) == CLIPPED
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(100.0)


def test_a_step_that_does_not_reach_its_parents():
    """It counts for nothing, and raises if it changes parameters without being clipped."""
    optimizer = optimizer_of(EverySecond)
    clipper = GradientClipper(optimizer, 1.0)
    for step in range(4):
        weight_of(optimizer).grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        assert gradient(optimizer) == (CLIPPED if step % 2 else [3.0, 4.0])
    assert clipper.steps == 2
    weight_of(optimizer).grad = torch.tensor([3.0, 4.0])
    optimizer.defaults["weight_decay"] = 0.5
    with pytest.raises(AttachError, match=r"EverySecond.step\(\) has changed parameters without"):
        optimizer.step()
    optimizer.step()
    assert gradient(optimizer) == CLIPPED


def test_hooks_do_not_depend_on_other_optimizers():
    """A parent's step calls hooks although no optimizer of the parent's class was built."""

    class Parent(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    class Child(Parent):
        def step(self, closure=None):
            weight_of(self).grad.mul_(100)
            return super().step(closure)

    optimizer = optimizer_of(Child)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert gradient(optimizer) == CLIPPED
    assert (clipper.steps, clipper.last.norm.item()) == (1, pytest.approx(500.0))


def test_a_skipped_gradient_that_a_step_clears_does_not_come_back():
    optimizer = optimizer_of(Clearing)
    weight = weight_of(optimizer)
    weight.grad.fill_(math.nan)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="skip")
    optimizer.step()
    assert weight.grad is None
    (weight * 0.1).sum().backward()
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.9, 0.9])
    assert (clipper.steps, clipper.skipped) == (2, 1)


def test_a_skipped_step_that_writes_parameters_gets_a_warning():
    optimizer = optimizer_of(Decaying)
    GradientClipper(optimizer, 1.0, exceed="skip")
    with pytest.warns(UserWarning, match="Decaying changed parameters in a step that was") as found:
        optimizer.step()
    assert found[0].filename == __file__
    weight_of(optimizer).grad = torch.tensor([0.3, 0.4])
    optimizer.step()


def test_an_outer_step_is_counted_if_its_inner_step_raised():
    optimizer, calls = optimizer_of(Forgiving), []
    clipper = GradientClipper(optimizer, 1.0)

    def fail_inside(*_):
        calls.append(1)
        if len(calls) % 2 == 0:
            raise OSError

    optimizer.register_step_pre_hook(fail_inside)
    optimizer.step()
    optimizer.step()
    assert len(calls) == 4
    assert clipper.steps == 2


class Counting(torch.optim.SGD):
    """Counts in its groups, whether there are gradients or not, in every way that some do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["made"] = group.get("made", 0) + 1
            group["number"] += 1
            group["tensor"] += 1
            group["replaced"] = float(group["replaced"]) + 1
            group["name"] += "b"
        return super().step(closure)


def test_a_skipped_step_leaves_the_counters_in_groups():
    weight = nn.Parameter(torch.ones(2))
    counters = {"number": 0, "tensor": torch.zeros(()), "replaced": torch.zeros(1), "name": "a"}
    optimizer = Counting([{"params": [weight], **counters}], lr=0.1)
    GradientClipper(optimizer, 1.0, nonfinite="skip")
    for value, made, counted in ((math.nan, None, 0), (1.0, 1, 1), (math.inf, 1, 1)):
        weight.grad = torch.full((2,), value)
        optimizer.step()
        [group] = optimizer.param_groups
        assert group.get("made") == made
        assert group["number"] == group["tensor"] == group["replaced"] == counted
    assert group["name"] == "abbb"  # no number: it is left as the step has it


@pytest.mark.parametrize("arguments", [lambda a, k: (a, dict(k)), lambda a, k: (tuple(a), {})])
def test_a_skip_outlives_a_later_hook_with_arguments_of_its_own(arguments):
    optimizer = optimizer_of(torch.optim.Adam)
    weight = weight_of(optimizer)
    before = weight.grad
    clipper = GradientClipper(optimizer, 1.0, exceed="skip")
    optimizer.register_step_pre_hook(lambda _, args, kwargs: arguments(args, kwargs))
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0]
    assert weight.grad is before
    assert clipper.skipped == 1


@pytest.mark.parametrize("kept", [True, False], ids=["error kept", "error dropped"])
def test_a_skipped_step_that_raised(kept):
    """Its gradient is back at once, and what is computed or set afterwards stays."""
    optimizer = optimizer_of()
    weight = weight_of(optimizer)
    before = weight.grad
    GradientClipper(optimizer, 1.0, exceed="skip")

    def fail(*_):
        raise OSError

    hook = optimizer.register_step_pre_hook(fail)
    error = None
    try:
        optimizer.step()
    except OSError as raised:
        error = raised if kept else None  # and with it the arguments of the step
    assert kept or weight.grad is before
    optimizer.zero_grad()
    hook.remove()
    (weight * 0.1).sum().backward()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.95, 0.95])
    assert optimizer.param_groups[0]["lr"] == 0.5
    del error
    assert gradient(optimizer) == pytest.approx([0.1, 0.1])


def test_post_hooks_registered_before_find_everything_restored():
    optimizer, gradients = optimizer_of(), []
    optimizer.register_step_post_hook(lambda *_: gradients.append(gradient(optimizer)))
    GradientClipper(optimizer, 1.0, exceed="skip")
    optimizer.step()
    assert gradients == [[3.0, 4.0]]


def test_detaching_in_a_skipped_step_restores_the_gradients():
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0, exceed="skip")
    optimizer.register_step_pre_hook(lambda *_: clipper.detach())
    optimizer.step()
    assert gradient(optimizer) == [3.0, 4.0]
    assert weight_of(optimizer).tolist() == [-2.0, -3.0]  # it was not skipped any more


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
@pytest.mark.parametrize("policy", ["zero", "skip"])
def test_a_compiled_step_compiles_what_it_would_without_a_clipper(policy):
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
            weight_of(optimizer).grad = torch.tensor([3.0, 4.0])
            step()
        if clipper is not None:
            assert gradient(optimizer) == CLIPPED
            weight_of(optimizer).grad = torch.full((2,), math.nan)
            step()
            assert (clipper.steps, clipper.skipped) == (4, policy == "skip")
            assert weight_of(optimizer).isfinite().all()
    torch._dynamo.reset()
    assert graphs[True] == graphs[False]
    assert len(graphs[True]) == 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_a_checkpoint_takes_to_make_state_does_not_count(kind):
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

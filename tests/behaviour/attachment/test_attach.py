"""Which optimizers a clipper attaches to, which it refuses, and how it lets go."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from torch import nn

from gradclip import ArgumentError, AttachError, GradientClipper, JsonlSink, Ranks
from tests.support.clippers import gradient, optimizer_of


class Wrapper:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self) -> None:  # without an argument
        self.optimizer.zero_grad()


class Hookless(Wrapper, torch.optim.Optimizer):
    """A wrapper that passes isinstance without having gone through Optimizer.__init__."""


class Lookahead(torch.optim.Optimizer):
    """A wrapper that is an optimizer itself and steps the one inside."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base_optimizer = base
        super().__init__([nn.Parameter(torch.ones(1))], {})

    def step(self, closure=None):
        return self.base_optimizer.step(closure)


def with_flat_parameter() -> torch.optim.Optimizer:
    optimizer = optimizer_of()
    optimizer.param_groups[0]["params"][0]._fsdp_flattened = True
    return optimizer


def differentiable_group() -> dict:
    return {"params": [nn.Parameter(torch.ones(1))], "differentiable": True}


def with_differentiable_group() -> torch.optim.Optimizer:
    optimizer = optimizer_of()
    optimizer.add_param_group(differentiable_group())
    return optimizer


def twice() -> list[torch.optim.Optimizer]:
    optimizer = optimizer_of()
    return [optimizer, optimizer_of(), optimizer]


def lbfgs() -> torch.optim.Optimizer:
    return torch.optim.LBFGS([nn.Parameter(torch.ones(2))])


def scheduler() -> object:
    return torch.optim.lr_scheduler.StepLR(optimizer_of(), 1)


REFUSED = [
    (lambda: None, {}, "No optimizer was given: give a torch.optim.Optimizer"),
    (list, {}, "No optimizer was given"),
    (lambda: torch.optim.SGD, {}, "Found the class SGD: give a torch.optim.Optimizer"),
    (lambda: nn.Linear(1, 1), {}, "Found a Linear: give a torch.optim.Optimizer"),
    (lambda: iter([]), {}, "Found a list_iterator: give a torch.optim.Optimizer"),
    (scheduler, {}, "Found a StepLR, which holds an optimizer: give its .optimizer"),
    (lambda: Hookless(None), {}, "Hookless has no step hooks.*give the optimizer that it wraps"),
    (twice, {}, "The same SGD was given twice"),
    (lambda: optimizer_of(torch.optim.Adam, differentiable=True), {}, "Adam has differentiable=Tr"),
    (with_differentiable_group, {}, "SGD has differentiable=True"),
    (with_flat_parameter, {}, "ranks=gradclip.Ranks"),
    (lbfgs, {"nonfinite": "skip"}, "LBFGS .* choose another policy than 'skip'"),
    (lbfgs, {"exceed": "skip"}, "LBFGS .* choose another policy than 'skip'"),
    (lbfgs, {"ranks": Ranks()}, "LBFGS evaluates its closure .* leave out ranks="),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED, ids=[row[2] for row in REFUSED])
def test_refused(make, options, message):
    """Nothing stays attached."""
    given = make()
    with pytest.raises(AttachError, match=message):
        GradientClipper(given, 1.0, **options)
    for optimizer in given if isinstance(given, list) else [given]:
        assert not getattr(optimizer, "_optimizer_step_pre_hooks", None)


@pytest.mark.parametrize("given", [1.0, "auto", True, torch.amp.GradScaler, nn.Linear(1, 1)])
def test_no_grad_scaler(given):
    optimizer = optimizer_of()
    with pytest.raises(ArgumentError, match="grad_scaler is a .*give the torch.amp.GradScaler"):
        GradientClipper(optimizer, 1.0, grad_scaler=given)
    GradientClipper(optimizer, 1.0)  # nothing was attached


@pytest.mark.parametrize(
    "wrapper",
    [lambda inner: [inner], Wrapper, Hookless, lambda inner: Wrapper(Hookless(inner)), Lookahead],
    ids=["list", "wrapper", "hookless", "two wrappers", "optimizer"],
)
def test_the_optimizer_inside_is_clipped(wrapper):
    """Steps of the clipper go through the wrapper."""
    optimizer = optimizer_of()
    given = wrapper(optimizer)
    clipper = GradientClipper(given, 1.0)
    optimizer.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
    assert clipper.step(lambda: 7.0) == 7.0
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    assert clipper.steps == 2
    if isinstance(given, Wrapper):
        clipper.zero_grad()
        assert optimizer.param_groups[0]["params"][0].grad is None


def test_a_clipper_that_nobody_holds_is_replaced(tmp_path):
    """As in a cell that is run again; it is closed, and the new one alone clips."""
    optimizer = optimizer_of()
    for threshold in (4.0, 3.0, 2.0):
        GradientClipper(optimizer, threshold, log=JsonlSink(tmp_path / "a.jsonl"))
        optimizer.step()
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    norms = [json.loads(line)["norm"] for line in lines]
    assert norms == pytest.approx([5.0, 4.0])  # the third has not written yet
    assert gradient(optimizer) == pytest.approx([1.2, 1.6])
    clipper = GradientClipper([optimizer, other := optimizer_of()], 1.0)
    for held in (clipper, clipper.step, [clipper]):
        with pytest.raises(AttachError, match="Another GradientClipper is attached"):
            GradientClipper([optimizer, other], 1.0)
        del held
    del clipper
    with pytest.raises(AttachError, match="Another GradientClipper is attached"):
        GradientClipper(optimizer, 1.0)  # the other optimizer would be clipped no more
    with pytest.raises(ArgumentError, match="scope"):
        GradientClipper([optimizer, other], 1.0, scope=lambda name, parameter: 1.5)
    optimizer.step()
    assert gradient(optimizer) == pytest.approx([1.2 / 29**0.5, 1.6 / 29**0.5])  # as before
    assert GradientClipper([optimizer, other], 1.0).steps == 0


def test_a_clipper_that_a_function_holds_is_not_replaced():
    """Variables of running functions count, and so do those of a with statement."""
    optimizer = optimizer_of()

    def attach_again():
        with pytest.raises(AttachError, match="Another GradientClipper is attached"):
            GradientClipper(optimizer, 2.0)

    def hold():
        clipper = GradientClipper(optimizer, 1.0)
        attach_again()
        clipper.detach()

    hold()
    with GradientClipper(optimizer, 1.0):
        attach_again()
    GradientClipper(optimizer, 2.0)


@pytest.mark.parametrize("wrapper", [lambda inner: inner, Wrapper])
def test_a_second_clipper_is_refused(wrapper):
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)
    with pytest.raises(AttachError, match="Another GradientClipper is attached to this SGD: det"):
        GradientClipper(wrapper(optimizer), 2.0)
    optimizer.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    assert clipper.steps == 1
    clipper.detach()
    GradientClipper(optimizer, 2.0)


def test_a_differentiable_group_added_later_is_refused_at_the_step():
    optimizer = optimizer_of()
    GradientClipper(optimizer, 1.0)
    optimizer.add_param_group(differentiable_group())
    with pytest.raises(AttachError, match="SGD has differentiable=True"):
        optimizer.step()
    assert gradient(optimizer) == [3.0, 4.0]


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


@pytest.mark.parametrize("own", [1.0, 0, 0.0, None])
@pytest.mark.parametrize("where", ["group", "attribute"])
def test_an_optimizer_that_clips_by_itself(where, own, recwarn):
    """It gets a warning, unless its own clipping is off."""
    optimizer = optimizer_of()
    if where == "group":
        optimizer.param_groups[0]["max_grad_norm"] = own
    else:
        optimizer.max_grad_norm = own
    GradientClipper(optimizer, 1.0)
    messages = [str(warning.message) for warning in recwarn]
    assert [m[: m.index(",")] for m in messages] == (
        ["SGD clips by itself with max_grad_norm=1.0"] if own else []
    )
    assert all(warning.filename == __file__ for warning in recwarn)


def test_other_hooks_stay_when_a_clipper_is_detached():
    optimizer, calls = optimizer_of(), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    clipper.detach()
    optimizer.step()
    assert calls == ["before", "after"]
    assert gradient(optimizer) == [3.0, 4.0]


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_clipper_is_refused(copier):
    with pytest.raises(AttachError, match="cannot be copied or pickled"):
        copier(GradientClipper(optimizer_of(), 1.0))


def test_a_clipper_lives_as_long_as_its_optimizer():
    """Although nobody else holds it."""
    optimizer = optimizer_of()
    reference = weakref.ref(GradientClipper(optimizer, 1.0))
    gc.collect()
    optimizer.step()
    assert gradient(optimizer) == pytest.approx([0.6, 0.8])
    del optimizer
    gc.collect()
    assert reference() is None

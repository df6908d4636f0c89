from __future__ import annotations

import pytest
import torch
from torch import nn

from gradclip import AttachError, GradientClipper, Ranks


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


def test_lbfgs_cannot_keep_step_with_other_ranks():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(AttachError, match="LBFGS evaluates its closure .* leave out ranks="):
        GradientClipper(torch.optim.LBFGS([weight]), 1.0, ranks=Ranks())


def test_flattened_shards_are_refused():
    optimizer = optimizer_of()
    optimizer.param_groups[0]["params"][0]._fsdp_flattened = True
    with pytest.raises(AttachError, match="ranks=gradclip.Ranks"):
        GradientClipper(optimizer, 1.0)


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


def test_a_scheduler_is_no_wrapper():
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer_of(), 1)
    with pytest.raises(AttachError, match="Found a StepLR, which holds an optimizer: give its .op"):
        GradientClipper(scheduler, 1.0)


def test_a_step_that_calls_no_hooks_is_refused():
    class Replaced(torch.optim.SGD):
        pass

    optimizer = optimizer_of(Replaced)
    Replaced.step = lambda self, closure=None: None
    with pytest.raises(AttachError, match="Replaced.step was replaced after the optimizer was bui"):
        GradientClipper(optimizer, 1.0)


def test_a_wrapper_whose_zero_grad_takes_nothing_can_be_cleared():
    class Plain(Wrapper):
        step = None

        def zero_grad(self) -> None:
            self.optimizer.zero_grad()

    optimizer = optimizer_of()
    GradientClipper(Plain(optimizer), 1.0).zero_grad()
    assert optimizer.param_groups[0]["params"][0].grad is None

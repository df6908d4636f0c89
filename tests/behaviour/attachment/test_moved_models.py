"""Models that are moved, converted, swapped or loaded after a clipper was attached."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from gradclip import GradientClipper, Scope
from gradclip.thresholds import MovingAverage, RelativeToWeights
from tests.support.trainings import momentum, net_of
from tests.support.twins import assert_tensors_close, clip_by_hand, parameters_of, values_of


def swapped(move, monkeypatch) -> None:
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    move()
    monkeypatch.undo()


def assign(net: nn.Module, optimizer: Optimizer) -> None:
    """Load new parameters, and give them to the optimizer as well."""
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    optimizer.param_groups[0]["params"][:] = net.parameters()
    optimizer.state.clear()


def swap_tensors(net: nn.Module) -> None:
    for parameter in net.parameters():
        other = nn.Parameter(parameter.detach() + 1)
        other.grad, parameter.grad = parameter.grad, None
        torch.utils.swap_tensors(parameter, other)


def to_empty(net: nn.Module) -> None:
    net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.25)


MOVES = {
    "the same device": lambda net, optimizer: net.cpu(),
    "a wider dtype": lambda net, optimizer: net.double(),
    "empty": lambda net, optimizer: to_empty(net),
    "new parameters": assign,
    "a loaded optimizer": lambda net, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "swapped tensors": lambda net, optimizer: swap_tensors(net),
}
SWAPS = {
    "a wider dtype": lambda net: net.double(),
    "empty": to_empty,
    "loaded": lambda net: net.load_state_dict(copy.deepcopy(net.state_dict())),
    "assigned": lambda net: net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True),
}
either_gradient = pytest.mark.parametrize("gradients", ["kept", "dropped"])


def train(net: nn.Module, *optimizers: Optimizer) -> None:
    """Compute the gradients of a step."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    weight = next(net.parameters())
    batch = torch.linspace(-1, 1, 24).reshape(4, 6).to(weight)
    (net(batch).square().sum() * 50).backward()


def check_moved(move, optimizers_of, gradients="kept", **options) -> None:
    """Move a model between steps; compare with the same model clipped by hand."""
    nets = [net_of(), net_of()]
    ours, theirs = map(optimizers_of, nets)
    clipper = GradientClipper(ours, 1.0, **options)
    for step in range(4):
        for net, optimizers in zip(nets, (ours, theirs), strict=True):
            if step == 2:
                if gradients == "dropped":
                    net.zero_grad()
                move(net, *optimizers)
            train(net, *optimizers)
        norm = clip_by_hand(*theirs)
        assert norm > 2
        for optimizer in (*ours, *theirs):
            optimizer.step()
        assert clipper.last.norm.item() == pytest.approx(norm)
    assert clipper.steps == 4
    assert_tensors_close(values_of(*ours), values_of(*theirs))


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "by name"])
def test_a_model_is_moved_between_steps(move, named):
    """A move changes nothing of what is clipped, whether parameters are looked up or not."""
    options = {"scope": Scope(lambda name, _: "all")} if named else {}
    check_moved(MOVES[move], lambda net: [momentum(net)], **options)


@pytest.mark.parametrize("swap", SWAPS)
@either_gradient
def test_a_move_swaps_tensors(swap, gradients, monkeypatch):
    """torch swaps no tensor that has a weak reference."""

    def move(net, *_):
        swapped(lambda: SWAPS[swap](net), monkeypatch)

    check_moved(move, lambda net: [momentum(net)], gradients)


@either_gradient
def test_a_move_swaps_tensors_of_several_optimizers(gradients, monkeypatch):
    """Nor has a gradient a weak reference that was clipped together with others."""

    def move(net, *_):
        swapped(net.double, monkeypatch)

    def optimizers_of(net):
        return [SGD([parameter], lr=0.05) for parameter in net.parameters()]

    check_moved(move, optimizers_of, gradients)


@pytest.mark.parametrize("rule", [MovingAverage, RelativeToWeights])
def test_labels_and_rules_outlast_a_swap(rule, monkeypatch):
    """A swapped parameter keeps its name, its norm and what its rule has learned."""
    net = net_of()
    optimizer = momentum(net)
    threshold = rule(1.05, warmup=2) if rule is MovingAverage else rule(0.01)
    clipper = GradientClipper(optimizer, threshold, scope="parameter", model=net)
    labels = clipper.labels
    for step in range(6):
        if step == 3:
            swapped(net.double, monkeypatch)
        train(net, optimizer)
        optimizer.step()
        weights = parameters_of(optimizer)
        after = [weight.grad.double().norm().item() for weight in weights]
        assert clipper.last.clipped_norm.tolist() == pytest.approx(after)
    assert clipper.labels == labels
    assert clipper.clip_rate() > 0.2
    assert clipper.steps == 6

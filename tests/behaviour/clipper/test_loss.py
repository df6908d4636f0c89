"""The loss of a step: who gives it, which of several counts, and who sees it."""

import math
import pickle

import numpy as np
import pytest
import torch

from gradclip import ArgumentError, AttachError, GradientClipper, MemorySink, Threshold
from tests.support.clippers import CALLS, gradient, optimizer_of, sgd, step_by
from tests.support.graphs import GraphTraining, replay_batches

GIVEN = {
    "float": 2.5,
    "int": 3,
    "numpy": np.float32(1.5),
    "0-d": torch.tensor(2.5),
    "one element": torch.tensor([[2.5]]),
    "half": torch.tensor(2.5).bfloat16(),
    "with a graph": torch.tensor(2.5, requires_grad=True) * 2,
    "NaN": torch.tensor(math.nan),
    "integer tensor": torch.tensor(7),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_a_record_has_the_loss_that_was_assigned(given, route):
    """Detached, in float64; the next record has none."""
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)
    clipper.loss = given
    optimizer.step()
    loss = clipper.last.loss
    assert (loss.shape, loss.dtype, loss.requires_grad) == ((), torch.float64, False)
    assert loss.item() == pytest.approx(torch.as_tensor(given).detach().item(), nan_ok=True)
    assert clipper.loss is None
    optimizer.step()
    assert clipper.last.loss is None


def test_a_later_change_of_the_loss_changes_no_record(route):
    """As where a loop adds up its losses in one tensor."""
    optimizer, loss = optimizer_of(), torch.tensor(2.0, dtype=torch.float64)
    clipper = GradientClipper(optimizer, 1.0)
    clipper.loss = loss
    loss += 1
    optimizer.step()
    loss += 1
    assert clipper.last.loss.item() == 2.0


def test_the_last_loss_before_the_step_counts():
    """Of accumulated batches; None takes it back."""
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)
    for losses in ((1.0, 2.0, 3.0), (1.0, None)):
        for loss in losses:
            clipper.loss = loss
        optimizer.step()
        found = clipper.last.loss
        assert (found if found is None else found.item()) == losses[-1]


REFUSED = [
    (torch.ones(2), r"loss is a tensor of shape \(2,\): give the one number of the step, such as"),
    (torch.ones(0), r"loss is a tensor of shape \(0,\): give the one number"),
    (torch.ones(1).to_sparse(), r"loss is a sparse tensor of shape \(1,\): give the one number"),
    (torch.ones(()) > 0, r"loss is a tensor of torch.bool: give a real number, such as"),
    (torch.ones(()) + 0j, r"loss is a tensor of torch.complex64: give a real number, such as"),
    ("2.5", r"loss is '2.5' of type str: give a number or a tensor of one element, or None"),
    (True, r"loss is True of type bool: give a number or a tensor of one element"),
    (2j, r"loss is 2j of type complex: give a number or a tensor of one element"),
    ([1.0], r"loss is \[1.0\] of type list: give a number or a tensor of one element"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_what_is_no_loss_is_refused(given, said):
    """What was assigned before stays; a closure may return it, and gives no loss then."""
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)
    clipper.loss = 1.0
    with pytest.raises(ArgumentError, match=f"^{said}"):
        clipper.loss = given
    assert clipper.loss == 1.0
    clipper.loss = None
    optimizer.step(lambda: given)
    assert clipper.last.loss is None


@pytest.mark.parametrize("call", CALLS[1:])
@pytest.mark.parametrize("forwards", [False, True])
def test_the_loss_of_a_closure_counts_by_itself(call, forwards, route):
    """Unless one was assigned, before the step or within the closure."""
    optimizer, losses = optimizer_of(), iter([2.0, 3.0, 4.0])
    clipper = GradientClipper(optimizer, 1.0)
    found = []
    for assigned in (None, 9.0, "within"):

        def closure(assigned=assigned):
            if assigned == "within":
                clipper.loss = 8.0
            return torch.tensor(next(losses), requires_grad=True)

        clipper.loss = None if assigned == "within" else assigned
        step_by(clipper if forwards and "=" not in call else optimizer, call, closure)
        found.append(clipper.last.loss.item())
    assert found == [2.0, 9.0, 8.0]


def test_the_loss_is_that_of_the_last_evaluation():
    """As the norm of the record."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=4)
    clipper, losses = GradientClipper(optimizer, None), []

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    assert len(losses) > 2
    assert clipper.last.loss.item() == losses[-1]
    assert clipper.last.norm.item() == pytest.approx(2 * math.sqrt(losses[-1]))


def test_optimizers_of_one_backward_pass_share_the_loss():
    """The record of their joint norm has it, and the next backward pass needs another one."""
    optimizers, sink = [optimizer_of(), optimizer_of()], MemorySink()
    with GradientClipper(optimizers, 1.0, log=sink) as clipper:
        for loss in (2.0, None):
            for optimizer in optimizers:
                optimizer.param_groups[0]["params"][0].grad = torch.tensor([3.0, 4.0])
            clipper.loss = loss
            clipper.step()
    assert [step.loss for step in sink.steps] == [2.0, None]


def test_a_step_that_a_scaler_skips_has_no_loss_in_the_logs():
    """The losses stay with their steps, also where the device alone knows of the overflow."""
    training = GraphTraining(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    losses = []
    for index, batch in enumerate(replay_batches(5)):
        training.optimizer.zero_grad()
        loss = training.model(batch).square().mean() * (math.inf if index == 2 else 1.0)
        scaler.scale(loss).backward()
        training.clipper.loss = loss
        scaler.step(training.optimizer)
        scaler.update()
        losses.append(loss.item())
    del losses[2]
    assert training.field("loss") == losses


def test_a_record_can_be_pickled_with_its_loss():
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, 1.0)
    clipper.loss = 2.5
    optimizer.step()
    last = pickle.loads(pickle.dumps(clipper.last))
    assert last.loss.item() == 2.5
    assert "loss=tensor(2.5000" in repr(last)


# Rules


class Watching(Threshold):
    """Keeps the losses that it sees, and writes to them."""

    def __init__(self):
        self.seen = []

    def thresholds(self, norms, context):
        self.see(norms, context.loss)
        return torch.ones_like(norms)

    def observe(self, norms, clipped_norms, context):
        self.see(norms, context.loss)

    def see(self, norms, loss):
        if loss is not None:
            assert (loss.shape, loss.dtype, loss.device) == ((), norms.dtype, norms.device)
            self.seen.append(loss.clone())
            loss.zero_()
        else:
            self.seen.append(None)


@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("given", [2.5, torch.tensor(2.5)], ids=["number", "tensor"])
def test_a_rule_sees_the_loss(scope, given, route):
    """Of shape (), beside any number of norms, and None where there is none."""
    optimizer, rule = sgd([3.0, 4.0], [1.0]), Watching()
    clipper = GradientClipper(optimizer, rule, scope=scope)
    clipper.loss = given
    optimizer.step()
    assert [loss.item() for loss in rule.seen] == [2.5, 2.5]
    assert clipper.last.loss.item() == 2.5, "what a rule writes changes no record"
    optimizer.step()
    assert rule.seen[2:] == [None, None]


class Needing(Watching):
    """Cannot do without a loss."""

    needs_loss = True


def test_a_rule_that_needs_the_loss_refuses_a_step_without():
    """The gradients stay as they are, and the step can be taken again with a loss."""
    optimizer = optimizer_of()
    clipper = GradientClipper(optimizer, Needing())
    said = r"Needing object at .* decides by the loss of the step, and there is none: assign "
    with pytest.raises(ArgumentError, match=rf"{said}clipper.loss = loss before optimizer.step"):
        optimizer.step()
    assert (gradient(optimizer), clipper.steps) == ([3.0, 4.0], 0)
    clipper.loss = 2.5
    optimizer.step()
    assert clipper.steps == 1


# CUDA graphs


def test_replays_have_their_own_losses(tape, captured):
    """Those of the memory in which the captured forward pass computes it."""
    given = replay_batches(7)
    training = GraphTraining(1.0)
    training.gives_loss = True
    training.replayed(given, tape, captured)
    eager = GraphTraining(1.0)
    eager.gives_loss = True
    eager.eager(given)
    assert training.field("loss") == pytest.approx(eager.field("loss"), rel=1e-6)


def test_replays_without_a_loss_have_none(tape, captured):
    training = GraphTraining(1.0).replayed(replay_batches(6), tape, captured)
    assert training.field("loss") == [None] * 6


def test_a_loss_from_before_the_capture_is_refused(tape, captured):
    """Every replay would log it again; so would a number of the host."""
    training = GraphTraining(1.0).eager(replay_batches(3))
    training.clipper.loss = torch.tensor(2.0)
    with captured(), tape, pytest.raises(AttachError, match="assigned before the CUDA graph was"):
        training.step()
    with captured(), pytest.raises(AttachError, match="is a number on the host, 2.0, and a CUDA"):
        training.clipper.loss = 2.0

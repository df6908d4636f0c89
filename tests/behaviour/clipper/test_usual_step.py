"""The usual step: one optimizer, plain gradients on the CPU, one norm."""

import sys

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, MemorySink
from gradclip.thresholds import ZScore
from tests.support.calls import python_calls
from tests.support.clippers import sgd, stepped

few_calls = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="this version of torch has no exchange interface of DLPack",
)


@few_calls
@pytest.mark.parametrize(
    ("threshold", "most"), [(1e9, 50), (1e-9, 56), (ZScore(), 80)], ids=["under", "clip", "learn"]
)
def test_a_step_makes_few_python_calls(threshold, most, monkeypatch):
    # Once it is imported, two more calls look for a checkpoint that is being made.
    monkeypatch.delitem(sys.modules, "torch.distributed.checkpoint.state_dict", raising=False)
    optimizer = sgd(*[[1.0, 1.0, 1.0]] * 6, lr=0.0)
    with GradientClipper(optimizer, threshold) as clipper:
        if clipper.engine != "native":
            pytest.skip("the native engine was not built")
        for _ in range(3):
            optimizer.step()
        calls = python_calls(optimizer.step)
    assert 20 < len(calls) < most, calls


@few_calls
def test_several_optimizers_make_as_many_calls_for_few_gradients_as_for_many(monkeypatch):
    """No line of Python runs for each gradient."""
    monkeypatch.delitem(sys.modules, "torch.distributed.checkpoint.state_dict", raising=False)
    counts = []
    for half in (2, 20):
        optimizers = [sgd(*[[1.0, 1.0, 1.0]] * half, lr=0.0) for _ in range(2)]
        with GradientClipper(optimizers, 1.0) as clipper:
            clipper.step()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    torch._foreach_mul_([p.grad for p in group["params"]], 2.0)
            counts.append(len(python_calls(clipper.step)))
    assert counts[0] == counts[1] < 250


def test_what_is_read_of_a_record_is_made_for_the_reader():
    """Nobody can change a record by changing the tensors that it returns."""
    last = stepped(sgd([3.0, 4.0])).last
    last.norm.zero_()
    last.norms.zero_()
    assert (last.norm.item(), last.norms.tolist()) == (5.0, [5.0])
    assert last.coefficient.item() == 0.2


@pytest.mark.parametrize("unusual", ["sparse", "absent", "strided", "half"])
def test_steps_of_both_kinds_follow_each_other(unusual):
    """Gradients may be plain at one step and not at the next; records and rules go on."""
    parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
    grads = {
        "sparse": lambda: torch.eye(2).to_sparse(),
        "absent": lambda: None,
        "strided": lambda: torch.eye(4)[::2, ::2],
        "half": lambda: torch.eye(2),
    }
    if unusual == "half":
        parameters[1].data = parameters[1].data.half()
        grads["half"] = lambda: torch.eye(2).half()
    sink = MemorySink()
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    with GradientClipper(optimizer, ZScore(warmup=1), log=sink) as clipper:
        for step in range(6):
            parameters[0].grad = torch.eye(2) * (step + 1)
            parameters[1].grad = grads[unusual]() if step % 2 else None
            if step % 2 == 0 and unusual != "half":
                parameters[1].grad = torch.eye(2)
            clipper.step()
        clipper.flush()
        assert clipper.steps == 6
        assert int(clipper.state_dict()["threshold"]["counts"]) == 6
    assert [row.step for row in sink.steps] == [*range(6)]

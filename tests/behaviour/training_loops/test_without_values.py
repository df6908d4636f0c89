"""Meta and fake tensors, on which a program shows what memory it needs: everything passes."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import gradclip
from gradclip import GradientClipper, JsonlSink, MemorySink, TensorBoardSink
from gradclip.thresholds import Threshold
from tests.support.rules import RULES

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "meta": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
}


@pytest.fixture(params=MODES)
def without_values(request) -> Iterator[None]:
    with MODES[request.param]():
        yield


class Comparing(Threshold):
    """A rule of a user's own that reads values."""

    def thresholds(self, norms: Tensor, _: object) -> Tensor:
        return norms if norms.sum().item() > 1 else 2 * norms


def closed_after_steps(max_norm: Any, *, several: bool = False, **options: Any) -> GradientClipper:
    """Return a clipper after three steps, closed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizers = [torch.optim.AdamW(each.parameters()) for each in (model if several else [model])]
    clipper = GradientClipper(optimizers, max_norm, **options)
    for _ in range(3):
        clipper.zero_grad()
        loss = model(torch.ones(3, 4)).sum()
        loss.backward()
        clipper.loss = loss
        clipper.step()
    clipper.flush()
    clipper.close()
    return clipper


OPTIONS = [
    {},
    {"several": True},
    {"scope": "unit"},
    {"scope": "parameter", "nonfinite": "raise", "norm_type": float("inf")},
    {"max_value": 0.1, "exceed": "skip", "skip_limit": 1},
]


@pytest.mark.usefixtures("without_values")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rule", [*RULES, Comparing, lambda: lambda step: 1.0], ids=str)
def test_every_step_is_taken_and_counted(rule, options):
    """And its record has the shape of a usual one."""
    clipper = closed_after_steps(RULES[rule]() if rule in RULES else rule(), **options)
    assert (clipper.steps, clipper.skipped, clipper.clip_rate()) == (3, 0, 0.0)
    norm = clipper.last.norm
    assert norm.dtype == torch.float64
    assert norm.shape == (() if len(clipper.labels) == 1 else (len(clipper.labels),))
    assert clipper.last.clipped_norm.shape == clipper.last.threshold.shape == norm.shape
    assert clipper.state_dict()["steps"] == 3


@pytest.mark.usefixtures("without_values")
def test_sinks_pass_and_write_no_step(tmp_path):
    memory, rows = MemorySink(per_parameter="all"), tmp_path / "rows.jsonl"
    log = [memory, JsonlSink(rows, per_parameter=2), TensorBoardSink(tmp_path), str(tmp_path / "a")]
    closed_after_steps(1.0, log=log)
    assert [*memory.steps] == []
    assert not rows.exists()


@pytest.mark.usefixtures("without_values")
def test_micro_batches_pass():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientClipper(optimizer, 1.0) as clipper:
        for _ in range(2):
            with clipper.micro_batch(of=2):
                model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    assert (clipper.steps, clipper.last.norm.shape) == (1, ())


@pytest.mark.usefixtures("without_values")
def test_the_functions_pass():
    model = nn.Linear(4, 2)
    model(torch.ones(3, 4)).sum().backward()
    parameters = [*model.parameters()]
    gradients = [parameter.grad for parameter in parameters]
    norms = [
        gradclip.clip_grad_norm_(parameters, 1.0),
        gradclip.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True),
        gradclip.clip_gradients_(gradients, 1.0),
        gradclip.clip_gradients(gradients, 1.0)[1],
        gradclip.get_total_norm(gradients, float("inf")),
        gradclip.clip_grad_units_(parameters),
    ]
    assert [(norm.shape, norm.dtype) for norm in norms] == [((), torch.float64)] * 6
    gradclip.clip_grads_with_norm_(parameters, 1.0, norms[0])
    gradclip.clip_grad_value_(parameters, 1.0)


def test_a_parameter_on_the_meta_device_does_not_hide_the_others():
    """As in a model of which a part is offloaded."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2, device="meta")), weight], lr=0.1)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert clipper.last.norm.item() == 5.0
    assert weight.grad.norm().item() == pytest.approx(1.0)


SCRIPT = """
import torch, gradclip
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode():
    gradclip.GradientClipper, gradclip.clip_grad_norm_
weight = torch.nn.Parameter(torch.zeros(2))
weight.grad = torch.tensor([3.0, 4.0])
tensor = gradclip.clip_grad_norm_(weight, 1.0)
print(type(tensor).__name__, tensor.item())
constants = [(n, v) for m, c in list(__import__("sys").modules.items()) if m.startswith("gradclip")
             for n, v in vars(c).items() if isinstance(v, torch.Tensor)]
print({type(value).__name__ for name, value in constants})
"""


@pytest.mark.slow
def test_modules_imported_in_a_fake_mode_hold_real_tensors():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["Tensor 5.0", "{'Tensor'}"]


@pytest.mark.filterwarnings("ignore")
def test_dtensors_without_values_pass():
    """As where FSDP2's memory is estimated, with torch's backend for one of many ranks."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (4,))
        with FakeTensorMode():
            weight = nn.Parameter(DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)]))
            weight.grad = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
            assert gradclip.clip_grad_norm_(weight, 1.0).shape == ()
            optimizer = torch.optim.SGD([weight], lr=0.1)
            with GradientClipper(optimizer, 1.0, scope="unit") as clipper:
                optimizer.step()
            assert clipper.last.norm.shape == (8,)
    finally:
        distributed.destroy_process_group()

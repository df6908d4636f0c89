"""A clipper on what Accelerate returns, against loops that are clipped by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate", reason="there is no accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402

from gradclip import AttachError, GradientClipper, MemorySink, clip_grad_norm_  # noqa: E402
from gradclip.thresholds import Percentile  # noqa: E402

THRESHOLD = 1.0
SCALES = (0.3, 3.0, 30.0)
"""By what losses are multiplied, in turn, so that some gradients are too long and some are not."""


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def data(batches: int = 12, size: int = 8) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(batches * size, 9, generator=generator)
    scales = torch.tensor(SCALES).repeat_interleave(size).repeat(batches // len(SCALES))
    return TensorDataset(rows[:, :6], rows[:, 6:], scales)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    inputs, wanted, scales = batch
    return ((model(inputs) - wanted).square().mean(1) * scales).mean()


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(*, accumulate: int = 1, bf16: bool = False, again: float | None = None) -> Any:
    """Train without Accelerate; return the model, and the norms before each clipping."""
    model = model_of()
    optimizer = momentum(model)
    batches = [*DataLoader(data(), batch_size=8)]
    norms = []
    for first in range(0, len(batches), accumulate):
        parts = batches[first : first + accumulate]
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(model, part)
            (loss / accumulate).backward()
        if again is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), again)
        norms.append(float(clip_grad_norm_(model.parameters(), THRESHOLD)))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


def prepared(**options: Any) -> Any:
    accelerator = Accelerator(cpu=True, **options)
    model = model_of()
    loader = DataLoader(data(), batch_size=8)
    return accelerator, *accelerator.prepare(model, momentum(model), loader)


@pytest.mark.parametrize("given", ["wrapper", "inner"])
def test_the_optimizer_inside_is_clipped(given):
    accelerator, model, optimizer, loader = prepared()
    assert isinstance(optimizer, AcceleratedOptimizer)
    sink = MemorySink()
    given = optimizer if given == "wrapper" else optimizer.optimizer
    clipper = GradientClipper(given, THRESHOLD, model=model, log=sink)
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch))
        optimizer.step()
    clipper.close()
    expected, norms = by_hand()
    assert [step.norm for step in sink.steps] == norms
    assert min(norms) < THRESHOLD < max(norms)
    assert torch.equal(values(model), values(expected))


def test_a_clipper_attached_before_prepare_stays():
    accelerator = Accelerator(cpu=True)
    model = model_of()
    optimizer = momentum(model)
    clipper = GradientClipper(optimizer, THRESHOLD)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(data(), batch_size=8)
    )
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch))
        optimizer.step()
    expected, norms = by_hand()
    assert clipper.steps == len(norms)
    assert torch.equal(values(model), values(expected))
    with pytest.raises(AttachError, match="Another GradientClipper"):
        GradientClipper(optimizer, THRESHOLD)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_only_the_step_that_is_taken_clips_what_was_accumulated(bf16):
    accelerator, model, optimizer, loader = prepared(
        gradient_accumulation_steps=3, mixed_precision="bf16" if bf16 else "no"
    )
    sink = MemorySink()
    clipper = GradientClipper(optimizer, THRESHOLD, log=sink)
    for index, batch in enumerate(loader):
        with accelerator.accumulate(model), accelerator.autocast():
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert clipper.steps == (index + 1) // 3
    clipper.close()
    expected, norms = by_hand(accumulate=3, bf16=bf16)
    assert [step.norm for step in sink.steps] == pytest.approx(norms, rel=1e-6)
    assert max(norms) > THRESHOLD
    torch.testing.assert_close(values(model), values(expected), rtol=1e-5, atol=1e-6)


def test_where_accelerate_clips_too_the_clipper_sees_what_that_has_left():
    accelerator, model, optimizer, loader = prepared()
    sink = MemorySink()
    clipper = GradientClipper(optimizer, THRESHOLD, log=sink)
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch))
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    assert clipper.clip_rate() == 0  # all that is too long was cut before
    clipper.close()
    expected, norms = by_hand(again=0.5)
    assert [step.norm for step in sink.steps] == pytest.approx(norms, rel=1e-6)
    assert max(norms) == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(values(model), values(expected), rtol=1e-5, atol=1e-6)


def test_a_norm_asked_of_accelerate_without_a_limit_changes_nothing():
    accelerator, model, optimizer, loader = prepared()
    sink = MemorySink()
    clipper = GradientClipper(optimizer, THRESHOLD, log=sink)
    asked = []
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch))
        asked.append(float(accelerator.clip_grad_norm_(model.parameters(), float("inf"))))
        optimizer.step()
    clipper.close()
    expected, norms = by_hand()
    assert [step.norm for step in sink.steps] == norms == pytest.approx(asked, rel=1e-6)
    assert torch.equal(values(model), values(expected))


@pytest.mark.parametrize("asks", [False, True], ids=["as it is", "unscaled before"])
def test_under_a_grad_scaler_the_norms_are_true_and_overflows_do_not_count(asks):
    accelerator, model, _, loader = prepared()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    accelerator.scaler = scaler
    optimizer = accelerator.prepare(momentum(model))
    sink = MemorySink()
    clipper = GradientClipper(optimizer, THRESHOLD, log=sink)
    skipped = []
    batches = [*loader]
    for batch in (batches[2], *batches):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch))
        if asks:
            scaler.unscale_(optimizer.optimizer)
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [True] + [False] * 12
    assert clipper.steps == 12
    clipper.close()
    expected, norms = by_hand()
    assert [step.norm for step in sink.steps] == pytest.approx(norms, rel=1e-6)
    torch.testing.assert_close(values(model), values(expected), rtol=1e-5, atol=1e-6)


def test_the_clipper_is_saved_and_loaded_with_the_accelerators_state(tmp_path):
    def begun() -> Any:
        accelerator, model, optimizer, loader = prepared()
        clipper = GradientClipper(optimizer, Percentile(30, window=4), model=model)
        accelerator.register_for_checkpointing(clipper)
        return accelerator, model, optimizer, clipper, [*loader]

    def train(accelerator: Any, model: Any, optimizer: Any, batches: list[Any]) -> None:
        for batch in batches:
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, batch))
            optimizer.step()

    accelerator, model, optimizer, clipper, batches = begun()
    train(accelerator, model, optimizer, batches[:5])
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optimizer, batches[5:])

    accelerator, resumed, optimizer, continued, batches = begun()
    accelerator.load_state(str(tmp_path))
    assert continued.steps == 5
    train(accelerator, resumed, optimizer, batches[5:])
    assert str(continued.state_dict()) == str(clipper.state_dict())
    assert torch.equal(values(resumed), values(model))


SCRIPT = """
    import json, os, sys, torch
    from importlib.util import module_from_spec, spec_from_file_location
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from gradclip import GradientClipper, MemorySink
    from gradclip.thresholds import Percentile

    spec = spec_from_file_location("tests_here", sys.argv[1])
    here = module_from_spec(spec)
    spec.loader.exec_module(here)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = here.model_of()
    model, optimizer, loader = accelerator.prepare(
        model, here.momentum(model), DataLoader(here.data(), batch_size=4)
    )
    sink = MemorySink()
    clipper = GradientClipper(optimizer, here.THRESHOLD, model=model, log=sink)
    for batch in loader:
        optimizer.zero_grad()
        accelerator.backward(here.loss_of(model, batch))
        optimizer.step()
    clipper.close()
    found = {
        "processes": accelerator.num_processes,
        "norms": [step.norm for step in sink.steps],
        "weights": here.values(model).tolist(),
    }
    with open(f"{sys.argv[2]}/{accelerator.process_index}.json", "w") as file:
        json.dump(found, file)
    accelerator.end_training()
    os._exit(0)  # see tests/support/torchrun.py
"""


@pytest.mark.slow
def test_two_processes_have_the_norms_of_one_with_the_whole_batch(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    # Its launcher starts several processes on the CPU through MPI alone; the one for several GPUs
    # needs no MPI, and the script says that it wants the CPU.
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    options = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    ports = ["--main_process_port=0", "--dynamo_backend=no"]
    subprocess.run(
        [*command, *options, *ports, str(script), __file__, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"},
        check=True,
        timeout=300,
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["processes"] == 2
    expected, norms = by_hand()
    assert min(norms) < THRESHOLD < max(norms)
    assert ranks[0]["norms"] == pytest.approx(norms, rel=1e-5)
    assert ranks[0]["weights"] == pytest.approx(values(expected).tolist(), rel=1e-4, abs=1e-6)

"""A clipper on the optimizers that Accelerate returns, against training by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate", reason="there is no accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402

from gradclip import AttachError, GradientClipper, MemorySink  # noqa: E402
from tests.support.trainings import (  # noqa: E402
    BATCHES,
    THRESHOLD,
    assert_close,
    by_hand,
    loader,
    loss_of,
    momentum,
    net_of,
    norms_of,
    rule_of,
    values,
)


def prepared(**options: Any) -> Any:
    accelerator = Accelerator(cpu=True, **options)
    net = net_of()
    return accelerator, *accelerator.prepare(net, momentum(net), loader())


def train_accelerated(
    accelerator: Any, net: Any, optimizer: Any, batches: Any, own: float = 0.0
) -> list[Any]:
    """Train, with a clipping by Accelerate itself if asked for; return what that returned."""
    returned = []
    for batch in batches:
        optimizer.zero_grad()
        accelerator.backward(loss_of(net, batch))
        if own:
            returned.append(float(accelerator.clip_grad_norm_(net.parameters(), own)))
        optimizer.step()
    return returned


@pytest.mark.parametrize("given", ["wrapper", "inner", "before prepare"])
def test_the_optimizer_inside(given):
    """It is clipped, whichever of the two the clipper was given, and when."""
    accelerator = Accelerator(cpu=True)
    net, sink = net_of(), MemorySink()
    inner = momentum(net)
    if given == "before prepare":
        clipper = GradientClipper(inner, THRESHOLD, log=sink)
    net, optimizer, batches = accelerator.prepare(net, inner, loader())
    assert isinstance(optimizer, AcceleratedOptimizer)
    if given != "before prepare":
        held = optimizer if given == "wrapper" else optimizer.optimizer
        clipper = GradientClipper(held, THRESHOLD, log=sink)
    with pytest.raises(AttachError, match="Another GradientClipper"):
        GradientClipper(optimizer, THRESHOLD)
    train_accelerated(accelerator, net, optimizer, batches)
    clipper.close()
    expected, norms = by_hand()
    assert norms_of(sink) == pytest.approx(norms, rel=1e-6)
    assert min(norms) < THRESHOLD < max(norms)
    assert torch.equal(values(net), values(expected))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_accumulated_batches(bf16):
    """The step that is taken clips their sum."""
    accelerator, net, optimizer, batches = prepared(
        gradient_accumulation_steps=2, mixed_precision="bf16" if bf16 else "no"
    )
    clipper = GradientClipper(optimizer, THRESHOLD, log=(sink := MemorySink()))
    for index, batch in enumerate(batches):
        with accelerator.accumulate(net), accelerator.autocast():
            accelerator.backward(loss_of(net, batch))
            optimizer.step()
            optimizer.zero_grad()
        assert clipper.steps == (index + 1) // 2
    clipper.close()
    expected, norms = by_hand(accumulate=2, bf16=bf16)
    assert norms_of(sink) == pytest.approx(norms, rel=1e-6)
    assert max(norms) > THRESHOLD
    assert_close(net, expected)


@pytest.mark.parametrize("own", [0.5, float("inf")])
def test_the_clipping_of_accelerate(own):
    """The clipper measures after it; a norm that it was only asked for changes nothing."""
    accelerator, net, optimizer, batches = prepared()
    clipper = GradientClipper(optimizer, THRESHOLD, log=(sink := MemorySink()))
    returned = train_accelerated(accelerator, net, optimizer, batches, own)
    clipper.close()
    expected, norms = by_hand(before=own)
    assert norms_of(sink) == pytest.approx(norms, rel=1e-6)
    assert max(norms) == pytest.approx(min(own, max(returned)), rel=1e-4)
    assert (clipper.clip_rate() == 0) == (own < THRESHOLD)
    assert_close(net, expected)


@pytest.mark.parametrize("asks", [False, True], ids=["as it is", "unscaled before"])
def test_grad_scaler(asks):
    """Norms are true, and overflows do not count."""
    accelerator, net, _, batches = prepared()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    accelerator.scaler = scaler
    optimizer = accelerator.prepare(momentum(net))
    clipper = GradientClipper(optimizer, THRESHOLD, log=(sink := MemorySink()))
    skipped, batches = [], [*batches]
    for batch in (batches[3], *batches):
        optimizer.zero_grad()
        accelerator.backward(loss_of(net, batch))
        if asks:
            scaler.unscale_(optimizer.optimizer)
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
    assert skipped == [True] + [False] * BATCHES
    assert clipper.steps == BATCHES
    clipper.close()
    expected, norms = by_hand()
    assert norms_of(sink) == pytest.approx(norms, rel=1e-6)
    assert_close(net, expected)


def test_saved_states(tmp_path):
    """The clipper is saved and loaded with the accelerator's state."""
    runs = []
    for _ in range(2):
        accelerator, net, optimizer, batches = prepared()
        clipper = GradientClipper(optimizer, rule_of(), model=net)
        accelerator.register_for_checkpointing(clipper)
        runs.append((net, clipper))
        if len(runs) == 1:
            train_accelerated(accelerator, net, optimizer, [*batches][:5])
            accelerator.save_state(str(tmp_path))
        else:
            accelerator.load_state(str(tmp_path))
            assert clipper.steps == 5
        train_accelerated(accelerator, net, optimizer, [*batches][5:])
    (whole, clipper), (resumed, continued) = runs
    assert str(continued.state_dict()) == str(clipper.state_dict())
    assert torch.equal(values(resumed), values(whole))


SCRIPT = """
import json, os, sys, torch
from accelerate import Accelerator
from gradclip import GradientClipper, MemorySink
from tests.integrations import test_accelerate
from tests.support import trainings

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
net = trainings.net_of()
batches = trainings.loader(trainings.SIZE // 2)  # each process takes every second of these
net, optimizer, batches = accelerator.prepare(net, trainings.momentum(net), batches)
clipper = GradientClipper(optimizer, trainings.THRESHOLD, model=net, log=(sink := MemorySink()))
test_accelerate.train_accelerated(accelerator, net, optimizer, batches)
clipper.close()
kept = {
    "processes": accelerator.num_processes,
    "norms": trainings.norms_of(sink),
    "weights": trainings.values(net).tolist(),
}
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(kept, file)
accelerator.end_training()
os._exit(0)  # see tests/support/torchrun.py
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """They have the norms of one with the whole batch."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # Its launcher starts several processes on the CPU through MPI alone; the one for several GPUs
    # needs no MPI, and the script says that it wants the CPU.
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    options = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    ports = ["--main_process_port=0", "--dynamo_backend=no"]
    subprocess.run(
        [*command, *options, *ports, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"},
        check=True,
        timeout=300,
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["processes"] == 2
    expected, norms = by_hand()
    assert ranks[0]["norms"] == pytest.approx(norms, rel=1e-5)
    assert ranks[0]["weights"] == pytest.approx(values(expected).tolist(), rel=1e-4, abs=1e-6)

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common.models import GPT2
from benchmarks.common.shapes import gpt2
from benchmarks.cuda import (
    report as cuda_report,
)
from benchmarks.cuda import (
    rivals as cuda_rivals,
)
from benchmarks.cuda import (
    run as cuda,
)
from benchmarks.cuda import (
    timing as cuda_timing,
)
from gradclip import engines
from gradclip.engines import engine_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("name", "tensors", "elements", "size"),
    [
        ("gpt2", 148, 124_439_808, 4),
        ("gpt2-xl", 580, 1_557_611_200, 4),
        ("llama3-8b", 291, 8_030_261_248, 2),
        ("tiny", 1000, 128_068, 4),
    ],
)
def test_the_sets_have_the_sizes_of_their_models(name, tensors, elements, size):
    chosen = cuda.SETS[name]
    shapes = chosen.shapes()
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) == elements
    assert chosen.dtype.itemsize == size
    assert sum(map(math.prod, chosen.toy())) < 20_000


def test_tiny_tensors_have_all_sizes_up_to_256():
    assert {math.prod(shape) for shape in cuda.SETS["tiny"].shapes()} == {*range(1, 257)}


def test_the_model_that_is_trained_is_gpt2():
    with torch.device("meta"):
        model = GPT2()
    assert Counter(tuple(p.shape) for p in model.parameters()) == Counter(gpt2())


@pytest.mark.parametrize(("regime", "passes"), [("norm", 1), ("under", 1), ("clipping", 3)])
def test_the_share_of_bandwidth_counts_the_passes_that_are_needed(regime, passes):
    share = cuda.share_of_bandwidth(regime, 500, seconds=2.0, bandwidth=1000.0)
    assert share == passes * 500 / 2.0 / 1000.0


def test_a_copy_reads_and_writes(monkeypatch):
    medians = iter([2.0, 4.0])
    monkeypatch.setitem(cuda_timing.COPIED, "cpu", (1000, 4000))
    monkeypatch.setattr(
        cuda_timing,
        "device_and_host_medians",
        lambda *_: ({"copy": next(medians)}, {}),
    )
    assert cuda_timing.copy_bandwidth(CPU, 1.0) == 2 * 4000 / 4.0


def test_the_report_is_markdown_and_says_that_toys_mean_nothing(capsys, tmp_path):
    output = tmp_path / "results" / "toy.md"
    sets = ["--sets", "llama3-8b", "tiny"]
    cuda.main([*sets, "--seconds", "0.01", "--no-compile", "--output", str(output)])
    printed = capsys.readouterr().out
    assert printed == output.read_text()
    assert "These numbers mean nothing" in printed.splitlines()[0]
    for regime in cuda.NORMS:
        assert f"| llama3-8b | bfloat16 | {regime} |" in printed
        assert f"| tiny | {regime} |" in printed
    assert "| GradientClipper with log |" in printed
    assert "| clip and log, added to a training step | <= 0.01 |" in printed
    assert "- apex (llama3-8b, tiny): not installed" in printed
    widths = {line.count("|") for line in printed.split("\n\n")[3].splitlines()}
    assert len(widths) == 1


def test_the_report_is_one_json_object(capsys):
    cuda.main(["--sets", "tiny", "--seconds", "0.01", "--no-training", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["machine"]["meaningless"] is True
    assert [row["regime"] for row in result["rows"]] == [*cuda.NORMS]
    assert result["training"] == {}
    assert set(result["left_out"]["tiny"]) == {"apex", "transformer engine"}
    elements = sum(map(math.prod, cuda.SETS["tiny"].toy()))
    for row in result["rows"]:
        rivals = {"torch", "gradclip"}
        if row["regime"] != "norm":
            rivals |= {"compiled", "hook"}
        for of_rivals in ("device_ms", "host_us", "device_ratio", "host_ratio", "share"):
            assert set(row[of_rivals]) == rivals
        assert row["device_ratio"]["torch"] == 1
        assert (row["elements"], row["bytes"]) == (elements, 4 * elements)
        seconds = row["device_ms"]["gradclip"] / 1e3
        assert row["share"]["gradclip"] == pytest.approx(
            cuda.PASSES[row["regime"]] * row["bytes"] / seconds / result["copy_bandwidth"]
        )
        assert row["error"]["gradclip"] < 1e-7
    assert [target["what"] for target in result["targets"]] == [
        f"tiny, {regime}, {where}, of torch's"
        for regime in ("under", "clipping")
        for where in ("device", "host")
    ]


def test_what_was_measured_before_a_failure_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(cuda.cuda_training, "measure_training", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cuda.main(["--sets", "tiny", "--seconds", "0.01", "--no-compile"])
    assert "| tiny | float32 | clipping |" in capsys.readouterr().out


def row(name: str, regime: str, ratio: float, share: float = 0.5, size: int = 10**9) -> dict:
    return {
        "set": name,
        "regime": regime,
        "bytes": size,
        "device_ratio": {"torch": 1.0, "gradclip": ratio},
        "host_ratio": {"torch": 1.0, "gradclip": ratio},
        "share": {"gradclip": share},
    }


def test_targets_are_met_or_not():
    rows = [
        row("gpt2-xl", "norm", 0.9, share=0.9),
        row("llama3-8b", "norm", 0.9, share=0.8),
        row("gpt2", "norm", 0.9, size=10**8),
        row("gpt2", "under", 0.45),
        row("gpt2", "clipping", 0.99),
        row("tiny", "under", 0.45),
        {**row("gpt2", "under", 0.1), "device_ratio": {"torch": 1.0}},
    ]
    training = {"overhead": {cuda_report.LOGGED: 0.02}}
    found = cuda_report.targets({"rows": rows, "training": training})
    assert [(target["what"], target["limit"], target["met"]) for target in found] == [
        ("gpt2-xl, norm, of bandwidth", 0.85, True),
        ("llama3-8b, norm, of bandwidth", 0.85, False),
        ("gpt2, under, device, of torch's", 0.40, False),
        ("gpt2, clipping, device, of torch's", 1.0, True),
        ("tiny, under, device, of torch's", 0.50, True),
        ("tiny, under, host, of torch's", 0.50, True),
        ("clip and log, added to a training step", 0.01, False),
    ]


def test_gradients_have_the_norm_that_is_drawn_and_are_rewritten():
    gradients = cuda_rivals.DeviceGradients([(100, 30), (7,)], torch.float32, CPU)
    gradients.draw(2.0)
    assert gradients.norm() == pytest.approx(2.0, rel=0.1)
    before = [gradient.clone() for gradient in gradients.held]
    gradients.rewrite()
    assert not any(map(torch.equal, before, gradients.held))


def multi_tensor_kernels(scale: float) -> SimpleNamespace:
    """What apex offers, with kernels that scale by so much more than they should."""
    return SimpleNamespace(
        multi_tensor_applier=lambda kernel, flag, lists, *options: kernel(lists, *options),
        multi_tensor_l2norm=lambda lists, _: (torch.nn.utils.get_total_norm(lists[0]), None),
        multi_tensor_scale=lambda lists, by: torch._foreach_mul_(lists[1], by * scale),
    )


def test_rivals_that_fail_or_clip_wrongly_are_left_out(monkeypatch):
    kernels = {"right": multi_tensor_kernels(1.0), "wrong": multi_tensor_kernels(0.5)}
    packages = {"right": ("right", "right"), "wrong": ("wrong", "wrong"), "none": ("none", "none")}
    monkeypatch.setattr(cuda_rivals, "PACKAGES", packages)
    for name, module in kernels.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(cuda_rivals, "compiled", lambda _: 1 / 0)
    gradients = cuda_rivals.DeviceGradients([(100, 30)], torch.float32, CPU)
    found, left_out = cuda_rivals.clipping_rivals(gradients, lambda: None)
    assert [*found] == ["torch", "right", "gradclip"]
    assert left_out["compiled"] == "ZeroDivisionError: division by zero"
    assert left_out["wrong"].startswith("ValueError: clipped to 0.5000")
    assert left_out["none"].startswith("not installed")
    assert left_out["hook"].startswith("ValueError: clipped to")


def test_a_deadline_interrupts():
    with pytest.raises(TimeoutError, match="more than 0.01 s"), cuda_rivals.deadline(0.01):
        time.sleep(10)
    with cuda_rivals.deadline(0.01):
        pass
    time.sleep(0.02)


def test_a_device_sleeps_until_all_work_is_queued(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(cycles))
    taken = cuda_timing.by_events(
        lambda: done.append("call"), lambda: done.append("prepare"), asleep=0.5
    )
    assert taken == 3e-3
    assert done == ["prepare", 10**9, "record", "call", "record", "wait"]


def test_the_triton_engine_serves_toys_only_while_it_is_measured(monkeypatch):
    stand_in = engines._ENGINES["reference"]
    monkeypatch.setattr(engines, "_load_triton", lambda: None)
    monkeypatch.setitem(engines._ENGINES, "triton", stand_in)
    before = engine_for("auto", CPU)
    with cuda.engine_under_test(CPU):
        assert engine_for("auto", CPU) is before
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with cuda.engine_under_test(CPU):
        assert engine_for("auto", CPU) is stand_in
    assert engine_for("auto", CPU) is before


@pytest.mark.slow
def test_the_benchmark_runs_with_interpreted_kernels():
    command = [sys.executable, "-m", "benchmarks.cuda.run", "--sets", "tiny", "--seconds", "0.01"]
    run = subprocess.run(
        [*command, "--no-compile", "--no-training", "--json"],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
    )
    result = json.loads(run.stdout)
    assert result["machine"]["interpreted"] is True
    assert result["machine"]["engine"] == "triton"
    assert "gradclip" in result["rows"][-1]["device_ms"]

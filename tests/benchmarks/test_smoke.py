"""Every benchmark runs on a toy and prints its tables."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.common.timing import interleaved_medians
from benchmarks.cost import (
    bandwidth,
    clip,
    distributed,
    instructions,
    logging,
    page,
    thresholds,
    weights,
)
from benchmarks.cuda import check
from benchmarks.cuda import run as cuda
from benchmarks.experiments import micro_batches
from benchmarks.experiments.learning_rates import networks
from benchmarks.experiments.learning_rates import run as learning_rates
from benchmarks.experiments.learning_rates.curves import ARMS
from benchmarks.experiments.spikes import run as spikes
from benchmarks.experiments.spikes import training as spike_training
from benchmarks.experiments.temporal_order import run as temporal_order
from benchmarks.experiments.temporal_order import training as temporal_training
from benchmarks.experiments.without_tuning import arms as without_tuning_arms
from benchmarks.experiments.without_tuning import run as without_tuning
from benchmarks.peers import run as peers
from benchmarks.peers.packages import PEERS
from benchmarks.peers.ways import adaptive_ways, fixed_ways
from tests.support.browser import missing


@pytest.fixture(autouse=True)
def torch_as_before():
    """No benchmark changes torch's state for what runs after it."""
    threads = torch.get_num_threads()
    yield
    torch.compiler.reset()
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads


@pytest.fixture
def printed_by(capsys):
    """Run a benchmark; return what it printed."""

    def printed_by(benchmark, options):
        benchmark.main(options.split())
        return capsys.readouterr().out

    return printed_by


def test_clip(printed_by, tmp_path):
    """What is printed is saved, with the command that wrote it."""
    path = tmp_path / "results" / "cost.md"
    printed = printed_by(clip, f"--sets small --seconds 0.1 --save {path}")
    assert path.read_text() == printed
    for part in ("`make bench`", "| Percentile(10) |", "| small | bfloat16 | clipping |"):
        assert part in printed
    assert "Clipping small by its inf-norm takes" in printed
    assert "| 60 of 4,096 |" in printed


@pytest.mark.slow
def test_clip_in_several_processes(printed_by):
    printed = printed_by(clip, "--sets small --dtypes float32 --seconds 0.05 --runs 2")
    assert "Medians of 2 runs" in printed
    assert len(re.findall(r"^\| small \| float32 \| \w+ \| \d+ \|", printed, re.MULTILINE)) == 2


def test_medians_of_runs():
    """Of each number; all else is that of the first run."""
    runs = [{"name": "a", "rows": [{"ratio": ratio}, [1.0, "b"]]} for ratio in (3.0, 1.0, 2.0)]
    assert clip.median_of(runs) == {"name": "a", "rows": [{"ratio": 2.0}, [1.0, "b"]]}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells memory")
def test_weights(printed_by):
    """The memory of a copy of the weights, within a few pages."""
    printed = printed_by(weights, "--sets LSTM --seconds 0.1")
    [row] = [line for line in printed.splitlines() if "LSTM" in line]
    held, added = map(float, re.findall(r"\d+\.\d+", row)[-2:])
    assert added == pytest.approx(held, rel=0.2)


def test_page(printed_by):
    """A toy page is written and, where there is a browser, opened."""
    printed = printed_by(page, "--steps 3000 --runs 2 --each 500")
    assert "3,000 steps from event files" in printed
    assert "2 runs of 500 steps" in printed
    assert ("first picture" in printed) != bool(missing())


@pytest.mark.slow
@pytest.mark.skipif(not instructions.available(), reason="there is no valgrind")
def test_instructions_repeat_and_are_fewer_than_torchs():
    counted = instructions.count(calls=32)
    assert counted["function"] < counted["function, torch operators"] < counted["torch"]
    assert instructions.count(calls=32) == pytest.approx(counted, rel=2e-2)


def test_bandwidth(monkeypatch):
    """Memory is read by a loop in C where there is a compiler."""
    monkeypatch.setattr(bandwidth, "BYTES", 1 << 20)
    assert ("a loop in C" in bandwidth.readers()) == bool(shutil.which("gcc"))
    assert bandwidth.read_bandwidth(0.01)[0] > 0
    monkeypatch.setenv("CC", "no-such-compiler")
    assert list(bandwidth.readers()) == ["torch.dot"]


def test_every_timed_call_is_prepared_for():
    calls = []
    rivals = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    interleaved_medians(rivals, lambda: calls.append("prepare"), 0.0)
    assert calls[::2] == ["prepare"] * 12
    rounds = {"".join(calls[start + 1 : start + 4 : 2]) for start in range(0, 24, 4)}
    assert rounds == {"ab", "ba"}


def test_thresholds(printed_by):
    printed = printed_by(thresholds, "--seconds 0.01 --steps 3 30 --counts 1 7 --sets small")
    assert all(f"| {rule} | {count} |" in printed for rule in thresholds.RULES for count in (1, 7))
    assert all(f"| {scope} | bfloat16 |" in printed for scope in ("global", "parameter", "unit"))
    assert all(f"| {peer} |" in printed for peer in PEERS)


@pytest.mark.slow
def test_logging(printed_by):
    printed = printed_by(logging, "--seconds 0.01")
    assert all(name in printed for name in ("no log", "5 largest", "all, JSON", "by hand, all"))


@pytest.mark.slow
def test_distributed(printed_by, tmp_path):
    """Of gradclip, one collective a step."""
    saved = tmp_path / "results" / "distributed.md"
    printed = printed_by(distributed, f"--ranks 2 --parameters 8 --rounds 2 --save {saved}")
    assert printed == saved.read_text()
    rows = [line.split("|") for line in printed.splitlines() if re.match(r"\| *\d", line)]
    assert [row[3].strip() for row in rows] == ["under", "clipping"]
    assert all([int(cell) for cell in row[8:10]] == [1, 1] for row in rows)


@pytest.mark.slow
def test_peers(capsys, tmp_path):
    """Every way to clip is in every table."""
    saved = tmp_path / "results" / "peers.md"
    options = ["--hard", "1e4 elements of 1e20", "--hazards", "one NaN", "--backend", "eager"]
    peers.main(["--sets", "small", "--seconds", "0.01", "--save", str(saved), *options])
    printed = capsys.readouterr().out
    assert saved.read_text() in printed
    heads = re.findall(r"^\| (?:set|gradients|hazard) \|.*", printed, re.M)
    for way in (*fixed_ways("eager"), *adaptive_ways()):
        assert sum(f" {way.name} |" in head for head in heads) == 3 - (way.name == "torch")


def test_cuda_without_a_device(printed_by, tmp_path, monkeypatch):
    """Toys on the CPU, whose report says that its numbers mean nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    output = tmp_path / "results" / "toy.md"
    printed = printed_by(cuda, f"--seconds 0.01 --no-compile --sets tiny --output {output}")
    assert printed == output.read_text()
    assert "These numbers mean nothing" in printed.splitlines()[0]
    assert all(f"| tiny | {regime} |" in printed for regime in cuda.NORMS)
    assert "| clip and log, added to a training step | <= 0.01 |" in printed
    options = "--seconds 0.01 --no-compile --sets llama3-8b --no-training --json"
    result = json.loads(printed_by(cuda, options))
    assert result["machine"]["meaningless"] is True
    assert [row["regime"] for row in result["rows"]] == [*cuda.NORMS]
    assert all(row["error"]["gradclip"] < 1e-7 for row in result["rows"])


def test_the_device_check_without_a_device(tmp_path, monkeypatch):
    """Tests that need a device are skipped, and toys are measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "cuda.md"
    options = "--tests tests/behaviour/devices/test_cuda.py --sets tiny --seconds 0.01"
    options += " --no-training --no-compile"
    assert check.main([*options.split(), "--output", str(output)]) == 0
    written = output.read_text()
    for part in ("`make device-check`", "no GPU", "skipped", "| tiny | clipping |"):
        assert part in written
    assert check.run(["timeit", "-n1", "-r1", "while True: pass"], 1.0)[0] == 124


def test_spikes(printed_by, tmp_path, monkeypatch):
    spike_training.text.cache_clear()
    for name, value in {"BATCH": 2, "LENGTH": 4, "EVALUATED": 3}.items():
        monkeypatch.setattr(spike_training, name, value)
    monkeypatch.setattr(spikes, "LONGEST", 12 - spikes.first_corrupted(12))
    saved = tmp_path / "results" / "spikes.md"
    printed = printed_by(spikes, f"--seeds 2 --steps 12 --models rnn --processes 1 --save {saved}")
    spike_training.text.cache_clear()
    assert printed == saved.read_text()
    pairs = itertools.product(spike_training.CORRUPTIONS, spike_training.ARMS)
    rows = [f"\n| {corruption} | {arm} | " for corruption, arm in pairs]
    assert [printed.count(row) for row in rows] == [1] * len(rows)
    assert "| 1 NaN | no clipping | diverged |" in printed
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_temporal_order(capsys, tmp_path, monkeypatch):
    """The same command with more updates goes on where it ended."""
    monkeypatch.setattr(temporal_training, "TEST", 200)
    monkeypatch.setattr(temporal_training, "VALIDATION", 50)
    saved = tmp_path / "results" / "order.md"
    options = "--lengths 10 20 --seeds 2 --check-every 2"
    options = [*options.split(), "--checkpoint", str(tmp_path / "kept"), "--save", str(saved)]
    temporal_order.main([*options, "--updates", "2"])
    capsys.readouterr()
    temporal_order.main([*options, "--updates", "4"])
    printed = capsys.readouterr()
    assert printed.err.count("4 updates") == 2
    assert "2 updates" not in printed.err
    text, arms = saved.read_text(), temporal_training.ARMS
    assert text.startswith(printed.out)
    rows = [f"| {n} | {arm} | 0/2 | 0.00 to 0.66 |" for n in (10, 20) for arm in arms]
    assert all(row in text for row in rows)
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_without_tuning(printed_by, monkeypatch, tmp_path):
    """On a short task; a second run reads the outcomes, and computes nothing again."""
    task = replace(without_tuning.TASKS["heavy tails"], steps=40)
    monkeypatch.setitem(without_tuning.SETS, "design", (task,))
    monkeypatch.setitem(without_tuning.TASKS, task.name, task)
    monkeypatch.setattr(without_tuning_arms, "PACKAGES", ())
    arms = [arm for arm in without_tuning_arms.ARMS if arm not in PEERS]
    monkeypatch.setattr(without_tuning, "ARMS", arms)
    options = f"--sets design --seeds 2 --processes 1 --outcomes {tmp_path / 'outcomes'}"
    printed = printed_by(without_tuning, options)
    assert len((tmp_path / "outcomes").read_text().splitlines()) == 2 * len(arms)
    monkeypatch.setattr(without_tuning, "train", None)
    assert printed_by(without_tuning, options) == printed
    assert re.search(r"^\| \*\*auto\*\* \| -?[\d.]+ ± [\d.]+ \|$", printed, re.MULTILINE)
    assert all(f"| {arm} | " in printed for arm in arms)


@pytest.mark.slow
@pytest.mark.parametrize("name", without_tuning.TASKS)
def test_every_training_without_tuning_learns(name):
    """With the rule without a number, or with a fixed one where it diverges, better than chance."""
    arm = {"residual": "1", "multiplicative": "0.316"}.get(name, "auto")
    outcome = without_tuning.train(without_tuning.TASKS[name], arm, 1)
    assert outcome.score < without_tuning.TASKS[name].chance


def test_learning_rates(printed_by, tmp_path, monkeypatch):
    """Outcomes in the file are not computed again; what diverged is told and drawn."""
    for name, value in {"STEPS": 2, "BATCH": 2, "LENGTH": 4}.items():
        monkeypatch.setattr(networks, name, value)
    toy = networks.Network((0.1, 1e38), networks.demo)
    monkeypatch.setattr(learning_rates, "NETWORKS", {"tanh RNN": toy})
    outcomes, saved = tmp_path / "outcomes.jsonl", tmp_path / "results" / "rates.md"
    options = f"--seeds 2 --outcomes {outcomes} --save {saved}"
    printed = printed_by(learning_rates, options)
    assert saved.read_text() == printed
    assert "\n| 1e+38 | 2 of 2 diverged" in printed
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines = outcomes.read_text()
    assert lines.count("\n") == 2 * 2 * len(ARMS)
    assert printed_by(learning_rates, options) == printed
    assert outcomes.read_text() == lines


@pytest.mark.slow
def test_micro_batches(printed_by, monkeypatch):
    monkeypatch.setattr(micro_batches, "THRESHOLDS", (1.0,))
    printed = printed_by(micro_batches, "--seeds 1")
    [at_step, by_micro_batch] = map(float, re.findall(r"([\d.]+) \(", printed))
    assert by_micro_batch < at_step
    assert f"At its best threshold clipping by micro-batch reaches {by_micro_batch:.4f}" in printed

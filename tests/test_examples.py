"""The examples, run as a newcomer runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.torchrun import torchrun

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments, cwd):
    command = [
        sys.executable,
        "-W",
        "error",
        "-W",
        "ignore:Implicitly cleaning up:ResourceWarning",
        EXAMPLES / name,
        *arguments,
    ]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("minimal")


@pytest.fixture(scope="module")
def minimal(folder):
    return run("minimal.py", cwd=folder)


@pytest.fixture(scope="module")
def through_time(tmp_path_factory):
    return run("through_time.py", cwd=tmp_path_factory.mktemp("through_time"))


@pytest.fixture(scope="module")
def amp(tmp_path_factory):
    return run("amp_accumulation.py", cwd=tmp_path_factory.mktemp("amp"))


@pytest.fixture(scope="module")
def two_optimizers(tmp_path_factory):
    return run("two_optimizers.py", cwd=tmp_path_factory.mktemp("two"))


def test_minimal_prints_norms_before_and_after(minimal):
    norms = re.findall(r"norm before +([\d.]+), after ([\d.]+)", minimal)
    assert len(norms) == 10
    for before, after in norms:
        assert float(after) == min(float(before), 1.0)
    assert {float(before) > 1 for before, _ in norms} == {True, False}


def test_minimal_clips_some_of_its_steps(minimal):
    [rate] = re.findall(r"(\d+)% of the steps were clipped", minimal)
    assert 5 < int(rate) < 95


def test_minimal_logs_where_it_says(minimal, folder):
    [logs] = re.findall(r"--logdir (\S+)", minimal)
    assert logs == "runs/minimal"
    [events] = (folder / logs).iterdir()
    assert "tfevents" in events.name


@pytest.mark.slow
def test_minimal_takes_the_folder_of_its_logs(tmp_path):
    printed = run("minimal.py", str(tmp_path / "logs"), cwd=tmp_path)
    assert f"--logdir {tmp_path / 'logs'}" in printed
    [events] = (tmp_path / "logs").iterdir()
    assert "tfevents" in events.name
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_minimal_is_short():
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) < 40


@pytest.mark.slow
def test_through_time_shows_the_explosion_and_its_limit(through_time):
    rows = re.findall(r"^state at step +(\d+) +(\S+) +(\S+)$", through_time, flags=re.MULTILINE)
    steps, without, limited = (list(map(float, column)) for column in zip(*rows, strict=True))
    assert steps == sorted(steps, reverse=True)
    assert without == sorted(without)
    assert without[-1] > 1e4 * without[0]
    assert limited[0] == without[0] < 0.5  # below the limit nothing is changed
    assert max(limited) == 0.5


@pytest.mark.slow
def test_through_time_limits_the_gradient_of_the_weights(through_time):
    [(without, limited)] = re.findall(r"all weights +(\S+) +(\S+)", through_time)
    assert float(without) > 1000 * float(limited)


@pytest.mark.slow
def test_amp_shows_true_norms_whatever_the_scale(amp):
    rows = re.findall(r"scale +(\S+)  norm before ([\d.]+), after ([\d.]+)", amp)
    assert len(rows) == 6
    assert len({scale for scale, _, _ in rows}) > 1
    for _, before, after in rows:
        assert 0 < float(before) < 100
        assert float(after) == min(float(before), 1.0)


@pytest.mark.slow
def test_amp_counts_no_step_that_overflowed(amp):
    [(overflowed, clipped)] = re.findall(r"(\d+) of 60 steps overflowed .* (\d+)% were", amp)
    assert 0 < int(overflowed) < 30
    assert 5 < int(clipped) < 95


@pytest.mark.slow
def test_two_optimizers_share_a_norm_and_a_step(two_optimizers):
    norms = re.findall(r"norm before ([\d.]+), after ([\d.]+)", two_optimizers)
    assert len(norms) == 5
    for before, after in norms:
        assert float(after) == min(float(before), 1.0)
    assert "100 steps with" in two_optimizers
    assert re.search(r"GradientClipper\((Muon|SGD), AdamW, Fixed", two_optimizers)


@pytest.fixture(scope="module")
def own_threshold(tmp_path_factory):
    return run("own_threshold.py", cwd=tmp_path_factory.mktemp("own"))


@pytest.mark.slow
def test_a_threshold_of_ones_own_is_short_and_learns(own_threshold):
    source = (EXAMPLES / "own_threshold.py").read_text()
    body = re.search(r"^class \w+\(\w+\):\n(.*?)^\S", source, re.DOTALL | re.MULTILINE)[1]
    code = re.sub(r'""".*?"""', "", body, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    limits = re.findall(r"norm +[\d.]+, threshold (\S+)", own_threshold)
    assert limits[0] == "inf"
    assert len(limits) == 10
    assert all(0.5 <= float(limit) < 100 for limit in limits[1:])
    assert 0 < int(re.search(r"(\d+)% of the steps were clipped", own_threshold)[1]) < 60


@pytest.mark.slow
def test_explosion_measures_what_the_theory_says(tmp_path):
    shown = run("explosion.py", "--out", "picture.png", cwd=tmp_path)
    rows = re.findall(r"^([\d.]+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", shown, flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["0.9", "1", "1.1", "1.3"]
    for radius, measured, theory, growth, before, clipped in rows:
        assert float(measured) == pytest.approx(float(theory), rel=1e-3)
        assert float(growth) == pytest.approx(float(radius), rel=0.1)
        assert float(clipped) == min(float(before), 1.0)
    assert float(rows[0][1]) < 0.1 < 100 < float(rows[3][1])
    [most] = re.findall(r"the state's gradient is at most ([\d.]+)", shown)
    assert float(most) < 2
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def norms_and_losses(shown):
    rows = re.findall(r"^step +(\d+)  loss (\S+)  norm before (\S+), after (\S+)$", shown, re.M)
    return [tuple(map(float, row)) for row in rows]


@pytest.mark.slow
def test_fsdp2_trains_two_ranks_as_it_does_one_process(tmp_path):
    alone = run("fsdp2.py", "alone", cwd=tmp_path)
    printed = torchrun(EXAMPLES / "fsdp2.py", "logs", processes=2, cwd=tmp_path)
    shown, expected = norms_and_losses(printed[0]), norms_and_losses(alone)
    assert len(shown) == len(expected) == 8
    for row, single in zip(shown[:4], expected, strict=False):
        assert row == pytest.approx(single, rel=2e-3)  # later, rounding errors have grown
    assert shown[-1][1] < 0.7 * shown[0][1]
    ends = [re.findall(r"^rank \d of 2: (.+)$", own, re.M) for own in printed]
    assert ends[0] == ends[1] != []  # the last norm and the checksum, to the last digit
    [events] = (tmp_path / "logs").iterdir()
    assert "tfevents" in events.name


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_the_pipeline_trains_several_ranks_as_it_does_one_process(tmp_path, count):
    alone = run("pipeline.py", "alone", "31", cwd=tmp_path)
    printed = torchrun(EXAMPLES / "pipeline.py", "logs", "31", processes=count, cwd=tmp_path)
    shown, expected = norms_and_losses(printed[-1]), norms_and_losses(alone)
    assert len(shown) == len(expected) == 4
    for row, single in zip(shown, expected, strict=True):
        assert row == pytest.approx(single, rel=2e-3)
        assert row[3] == min(row[2], 1.0)
    assert shown[-1][1] < 0.7 * shown[0][1]
    ends = [re.findall(rf"^rank \d of {count}: (.+)$", own, re.M) for own in printed]
    assert ends[0] == ends[-1] != []  # the last norm and the embedding, to the last digit
    assert ends[1:-1] == [[]] * (count - 2)
    [events] = (tmp_path / "logs").iterdir()
    assert "tfevents" in events.name

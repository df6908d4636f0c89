"""The short examples, run as a newcomer runs them."""

import re

import pytest

from tests.support.docs import EXAMPLES, run_example
from tests.support.torchrun import torchrun


def printed_norms(printed):
    """Return the norms before and after clipping; the threshold is 1."""
    rows = re.findall(r"norm before +([\d.]+), after ([\d.]+)", printed)
    norms = [(float(before), float(after)) for before, after in rows]
    assert all(after == min(before, 1.0) for before, after in norms)
    return norms


def clip_rate_in(printed):
    [rate] = re.findall(r"(\d+)% (?:of the steps )?were clipped", printed)
    return int(rate)


def test_minimal(tmp_path):
    printed = run_example("minimal.py", cwd=tmp_path)
    assert len(printed_norms(printed)) == 10
    assert {before > 1 for before, _ in printed_norms(printed)} == {True, False}
    assert 5 < clip_rate_in(printed) < 95
    assert "--logdir runs/minimal" in printed
    assert [*tmp_path.glob("runs/minimal/*tfevents*")]
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) < 40


@pytest.mark.slow
def test_through_time(tmp_path):
    """The gradient of the state explodes without a threshold, and stays below it with one."""
    printed = run_example("through_time.py", cwd=tmp_path)
    rows = re.findall(r"^state at step +(\d+) +(\S+) +(\S+)$", printed, re.M)
    steps, without, clipped = (list(map(float, column)) for column in zip(*rows, strict=True))
    assert steps == sorted(steps, reverse=True)
    assert without == sorted(without)
    assert without[-1] > 1e4 * without[0]
    assert clipped[0] == without[0] < 0.5  # below the threshold nothing is changed
    assert max(clipped) == 0.5
    [(weights, weights_clipped)] = re.findall(r"all weights +(\S+) +(\S+)", printed)
    assert float(weights) > 1000 * float(weights_clipped)


@pytest.mark.slow
def test_amp_accumulation(tmp_path):
    """Norms are the true ones, whatever the scale; steps that overflow are not counted."""
    printed = run_example("amp_accumulation.py", cwd=tmp_path)
    norms = printed_norms(printed)
    assert len(norms) == 6
    assert all(0 < before < 100 for before, _ in norms)
    assert len({*re.findall(r"scale +(\S+)", printed)}) > 1
    [overflowed] = re.findall(r"(\d+) of 60 steps overflowed", printed)
    assert 0 < int(overflowed) < 30
    assert 5 < clip_rate_in(printed) < 95


@pytest.mark.slow
def test_micro_batches(tmp_path):
    """One wrong label costs less than where it is clipped with the others."""
    printed = run_example("micro_batches.py", "2", cwd=tmp_path)
    rows = re.findall(
        r"^ +(\d) +loss ([\d.]+), .* loss ([\d.]+), \d+% of the micro-b", printed, re.M
    )
    assert [seed for seed, *_ in rows] == ["0", "1"]
    assert all(float(at_step) > 2 * float(by_micro_batch) for _, at_step, by_micro_batch in rows)


@pytest.mark.slow
def test_gradient_release(tmp_path):
    """One record for each backward pass, with a norm for each parameter."""
    printed = run_example("gradient_release.py", cwd=tmp_path)
    rows = re.findall(r"^step .*norms (.*)$", printed, re.M)
    assert [len(row.split(", ")) for row in rows] == [4] * 5
    assert re.search(r"^200 steps, and (\d+)% of the norms were clipped", printed, re.M)
    assert [*tmp_path.glob("runs/gradient_release/*tfevents*")]


@pytest.mark.slow
def test_two_optimizers(tmp_path):
    printed = run_example("two_optimizers.py", cwd=tmp_path)
    assert len(printed_norms(printed)) == 5
    assert "100 steps with" in printed
    assert re.search(r"GradientClipper\((Muon|SGD), AdamW, Fixed", printed)


@pytest.mark.slow
def test_own_threshold(tmp_path):
    """The rule has at most twelve lines of code, and learns."""
    printed = run_example("own_threshold.py", cwd=tmp_path)
    source = (EXAMPLES / "own_threshold.py").read_text()
    body = re.search(r"^class \w+\(\w+\):\n(.*?)^\S", source, re.DOTALL | re.MULTILINE)[1]
    code = re.sub(r'""".*?"""', "", body, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    first, *others = re.findall(r"norm +[\d.]+, threshold (\S+)", printed)
    assert first == "inf"
    assert len(others) == 9
    assert all(0.5 <= float(threshold) < 100 for threshold in others)
    assert 0 < clip_rate_in(printed) < 60


@pytest.mark.slow
def test_explosion(tmp_path):
    """The measured norms are those of the theory."""
    printed = run_example("explosion.py", "--out", "picture.png", cwd=tmp_path)
    rows = re.findall(r"^([\d.]+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", printed, re.M)
    assert [row[0] for row in rows] == ["0.9", "1", "1.1", "1.3"]
    for radius, measured, theory, growth, before, clipped in rows:
        assert float(measured) == pytest.approx(float(theory), rel=1e-3)
        assert float(growth) == pytest.approx(float(radius), rel=0.1)
        assert float(clipped) == min(float(before), 1.0)
    assert float(rows[0][1]) < 0.1 < 100 < float(rows[3][1])
    [most] = re.findall(r"the state's gradient is at most ([\d.]+)", printed)
    assert float(most) < 2
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "count"), [("fsdp2", 80, 2), ("pipeline", 31, 2), ("pipeline", 31, 4)]
)
def test_several_ranks_train_as_one_process(tmp_path, name, steps, count):
    """Norms and parameters at the end are the same on all ranks, to the last digit."""
    options = [str(steps)] if name == "pipeline" else []
    alone = run_example(f"{name}.py", "alone", *options, cwd=tmp_path)
    printed = torchrun(EXAMPLES / f"{name}.py", "logs", *options, processes=count, cwd=tmp_path)
    both = (printed[-1] if name == "pipeline" else printed[0], alone)
    losses, losses_alone = ([*map(float, re.findall(r"loss (\S+)", shown))] for shown in both)
    lengths = {len(losses), len(losses_alone), *(len(printed_norms(shown)) for shown in both)}
    assert lengths == {len(range(0, steps, 10))}
    assert losses[:4] == pytest.approx(losses_alone[:4], rel=2e-3)  # later, roundings have grown
    assert losses[-1] < 0.7 * losses[0]
    ends = [re.findall(r"^rank \d of \d: (.+)$", shown, re.M) for shown in printed]
    ends = ends if name == "fsdp2" else [ends[0], ends[-1]]
    assert ends[0] == ends[1] != []
    assert len([*tmp_path.glob("logs/*tfevents*")]) == 1

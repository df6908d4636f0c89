from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from benchmarks.experiments.spikes import report as spike_report
from benchmarks.experiments.spikes import run as spikes
from benchmarks.experiments.spikes import training as spike_training
from benchmarks.experiments.spikes.outcomes import (
    CLEAN,
    UNCLIPPED,
    Outcome,
    Pilot,
    interval,
    rows_of,
    student_t,
)
from benchmarks.experiments.spikes.training import ARMS, CORRUPTIONS, LEARNERS, Training
from gradclip.cli.demo.training import one_thread
from gradclip.thresholds import MedianDeviation

STEPS = 12
BEGIN = spikes.first_corrupted(STEPS)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    spike_training.text.cache_clear()
    with pytest.MonkeyPatch.context() as patched, one_thread():
        for name, value in {"BATCH": 2, "LENGTH": 4, "EVALUATED": 3}.items():
            patched.setattr(spike_training, name, value)
        yield
    spike_training.text.cache_clear()


def pilot(model: str, loss: float = 3.0, advised: float | None = 0.5, rate: float = 0.01) -> Pilot:
    return Pilot(model, rate, loss, "quiet", advised, median=2.0)


def norms_of(model: str, corruption: str) -> list[float]:
    """The norms of what an optimizer gets, in 2 clean steps and 12 others; no weight changes."""
    training = Training(LEARNERS[model], 0.0, 14, 1, None)
    norms = []

    def measure_and_erase(*_: object) -> None:
        gradients = [parameter.grad for parameter in training.parameters]
        norms.append(torch.nn.utils.get_total_norm([each.double() for each in gradients]).item())
        torch._foreach_zero_(gradients)

    training.optimizer.register_step_pre_hook(measure_and_erase)
    training.advance(0, 2)
    training.advance(2, 14, CORRUPTIONS[corruption])
    return norms


@pytest.mark.parametrize("model", LEARNERS)
def test_exactly_the_chosen_steps_are_corrupted(model):
    clean = norms_of(model, CLEAN)
    factors = {"1 step x 100": [100.0], "1 step x 10,000": [1e4], "10 steps x 100": [100.0] * 10}
    for corruption, corrupted in factors.items():
        expected = [1.0] * 2 + corrupted + [1.0] * (12 - len(corrupted))
        norms = norms_of(model, corruption)
        ratios = [norm / other for norm, other in zip(norms, clean, strict=True)]
        assert ratios == pytest.approx(expected, rel=1e-5)
    places = [step for step, norm in enumerate(norms_of(model, "1 NaN")) if math.isnan(norm)]
    assert places == [2]
    assert set(CORRUPTIONS) == {CLEAN, "1 NaN", *factors}


def test_weights_and_batches_follow_from_the_seed():
    def begun(seed: int) -> tuple[float, list[list[int]]]:
        training = Training(LEARNERS["rnn"], 0.1, 2, seed, None)
        loss, read = training.loss(), []
        training.model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].tolist()))
        training.advance(0, 1)
        return loss, *read

    (loss, batch), (other_loss, other_batch) = begun(1), begun(2)
    assert begun(1) == (loss, batch)
    assert other_loss != loss
    assert other_batch != batch


def test_one_element_becomes_nan():
    gradients = [torch.ones(2, 3), torch.ones(4)]
    CORRUPTIONS["1 NaN"].apply_(gradients)
    assert gradients[0].isnan().nonzero().tolist() == [[0, 0]]
    assert not gradients[1].isnan().any()


def test_arms_differ_in_their_clipping_alone(monkeypatch):
    for arm, make in ARMS.items():
        if arm != UNCLIPPED:
            options = {**make(1e-3), "exceed": "observe", "nonfinite": "propagate"}
            monkeypatch.setitem(ARMS, arm, lambda fixed, options=options: options)
    found = {arm: [run.loss for run in spikes.train(pilot("rnn"), arm, 1, STEPS)] for arm in ARMS}
    plain = found[UNCLIPPED]
    assert [math.isnan(loss) for loss in plain] == [name == "1 NaN" for name in CORRUPTIONS]
    assert len(set(plain)) == len(CORRUPTIONS)
    for losses in found.values():
        assert losses == pytest.approx(plain, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("model", LEARNERS)
def test_what_goes_on_from_a_copy_ends_as_a_run_of_its_own(model, monkeypatch):
    rule = partial(MedianDeviation, 3, 6, 3)
    monkeypatch.setitem(ARMS, "skip", lambda fixed: {"max_norm": rule(), "nonfinite": "skip"})
    outcomes = spikes.train(pilot(model), "skip", 1, STEPS)
    assert [outcome.corruption for outcome in outcomes] == list(CORRUPTIONS)
    for outcome in outcomes[-2:]:
        alone = Training(LEARNERS[model], 0.01, STEPS, 1, ARMS["skip"](0.5))
        alone.advance(0, BEGIN)
        alone.advance(BEGIN, STEPS, CORRUPTIONS[outcome.corruption])
        found = outcome.loss, outcome.clip_rate, outcome.skipped
        assert found == (alone.loss(), *alone.counted())
    assert [outcome.skipped for outcome in outcomes[-2:]] == [1, 0]
    assert outcomes[-1].clip_rate > 1 / STEPS


def test_the_fixed_threshold_is_the_pilots():
    assert ARMS["fixed"](pilot("rnn", advised=0.5).fixed)["max_norm"] == 0.5
    assert ARMS["fixed"](pilot("rnn", advised=None).fixed)["max_norm"] == 2.0


def test_the_pilot_with_the_lowest_loss_is_chosen():
    pilots = [pilot("rnn", loss, rate=rate) for loss, rate in ((math.nan, 3), (2.0, 2), (2.5, 1))]
    other = pilot("gpt", math.nan)
    found = spikes.chosen([*pilots, other])
    assert found["rnn"] is pilots[1]
    assert found["gpt"] is other


def test_the_benchmark_runs_and_saves_every_row(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "LONGEST", STEPS - BEGIN)  # the burst is cut short
    saved = tmp_path / "results" / "spikes.md"
    options = ["--seeds", "2", "--steps", str(STEPS), "--models", "rnn", "--processes", "1"]
    spikes.main([*options, "--save", str(saved)])
    printed = capsys.readouterr().out
    assert printed == saved.read_text()
    for corruption in CORRUPTIONS:
        for arm in ARMS:
            assert printed.count(f"\n| {corruption} | {arm} | ") == 1
    assert "| 1 NaN | no clipping | diverged |" in printed
    assert "| 2 of 2 |" in printed
    assert "- seeds: 2, from 1 to 2" in printed
    command = f"python -m benchmarks.experiments.spikes.run {' '.join(options)} --save {saved}"
    assert f"- command: `{command}`" in printed
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def outcomes(losses: dict[tuple[str, str], list[float]]) -> list[Outcome]:
    return [
        Outcome("rnn", corruption, arm, seed, loss, 0.25, 3)
        for (corruption, arm), several in losses.items()
        for seed, loss in enumerate(several)
    ]


NAN = math.nan
FOUND = {
    (CLEAN, UNCLIPPED): [2.0, 2.1, 2.2],
    (CLEAN, "worse"): [2.5, 2.61, 2.7],
    ("spike", UNCLIPPED): [NAN, math.inf, NAN],
    ("spike", "worse"): [3.5, NAN, 3.71],
    ("spike", "same"): [2.1, 2.11, 2.15],
    (CLEAN, "same"): [2.0, 2.1, 2.3],
    ("spike", "better"): [1.9, 2.0, 2.1],
    (CLEAN, "better"): [2.0, 2.1, 2.21],
}


def test_diverged_runs_are_counted_and_in_no_mean():
    rows = {(row.corruption, row.arm): row for row in rows_of(outcomes(FOUND))}
    row = rows["spike", "worse"]
    assert row.diverged == 1
    assert row.loss.mean == pytest.approx(3.605)
    assert row.change.mean == pytest.approx((1.0 + 1.01) / 2)  # each beside its own seed
    assert row.change.count == 2
    assert rows["spike", UNCLIPPED].diverged == 3
    assert math.isnan(rows["spike", UNCLIPPED].loss.mean)


def test_the_text_says_what_the_numbers_are():
    rows = rows_of(outcomes(FOUND))
    lines = spike_report.report({}, {}, [pilot("rnn")], {"rnn": pilot("rnn")}, rows)
    first, second = lines.index(f"- **{CLEAN}**"), lines.index("- **spike**")
    assert lines[first + 1 : first + 2] == [
        "  - higher loss beside no clipping: worse (+0.5033, higher in 3 of 3 seeds)"
    ]
    same = "same (-0.0133, higher in 2 of 3 seeds)"
    assert lines[second + 1 : second + 6] == [
        "  - diverged: no clipping (3 of 3), worse (1 of 3)",
        "  - higher loss beside their own clean runs: worse (+1.0050, higher in 2 of 2 seeds)",
        "  - lower loss beside their own clean runs: better (-0.1033, higher in 0 of 3 seeds)",
        f"  - no difference shown beside their own clean runs: {same}",
        "  - lowest final loss better (2.000), not told apart from same",
    ]
    assert "| spike | no clipping | diverged |  |  |  | 3 of 3 |  | 3 |" in lines


@pytest.mark.parametrize(("freedom", "known"), [(1, 12.7062), (4, 2.7764), (7, 2.3646)])
def test_intervals_are_as_wide_as_students(freedom, known):
    assert student_t(freedom) == pytest.approx(known, rel=1e-4)


def test_an_interval_is_the_mean_and_so_many_standard_errors():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.count, found.above) == (3.0, 5, 5)
    assert found.high - 3 == pytest.approx(2.7764 * (2.5 / 5) ** 0.5, rel=1e-4)
    assert math.isnan(interval([1.0]).low)
    assert interval([1.0]).sign == 0


@pytest.mark.parametrize(
    ("options", "found"), [(["--seeds", "1"], "--seeds"), (["--steps", "20"], "--steps")]
)
def test_too_little_is_refused(options, found, capsys):
    with pytest.raises(SystemExit):
        spikes.main(options)
    assert found in capsys.readouterr().err

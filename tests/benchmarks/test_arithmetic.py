"""Arithmetic of the benchmarks that could silently lie: sizes, verdicts, intervals, clipping."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

import gradclip
from benchmarks.common.models import GPT2
from benchmarks.common.shapes import SETS, gpt2, gpt2_xl, llama3, tiny
from benchmarks.cost import distributed, thresholds
from benchmarks.cuda import run as cuda
from benchmarks.experiments.learning_rates import curves
from benchmarks.experiments.spikes.outcomes import Outcome, interval, rows_of, student_t
from benchmarks.experiments.temporal_order import report as order
from benchmarks.experiments.temporal_order import task
from benchmarks.experiments.temporal_order.training import Arm, Plan
from benchmarks.experiments.without_tuning.catalogue import TASKS
from benchmarks.experiments.without_tuning.outcomes import FIXED, results_of
from benchmarks.experiments.without_tuning.training import Outcome as Trained
from benchmarks.peers.hazards import HAZARDS, outcome
from benchmarks.peers.packages import Clipping, parameters_of
from benchmarks.peers.scenes import COUNT
from benchmarks.peers.ways import Way, fixed_ways

SIZES = {
    "small": (6, 3610),
    "lstm": (11, 1_306_600),
    "resnet50": (161, 25_557_032),
    "gpt2": (148, 124_439_808),
    "gpt2_xl": (580, 1_557_611_200),
    "llama3": (291, 8_030_261_248),
    "tiny": (1000, 128_068),
}


def test_sets_have_the_sizes_of_their_models():
    makers = {**SETS, "gpt2_xl": gpt2_xl, "llama3": llama3, "tiny": tiny}
    sets = {name: make() for name, make in makers.items()}
    assert {n: (len(s), sum(map(math.prod, s))) for n, s in sets.items()} == SIZES
    with torch.device("meta"):
        assert Counter(tuple(p.shape) for p in GPT2().parameters()) == Counter(gpt2())


def test_shares_and_figures_of_cost():
    for regime, passes in (("norm", 1), ("under", 1), ("clipping", 3)):
        assert cuda.share_of_bandwidth(regime, 500, 2.0, 1000.0) == passes * 500 / 2.0 / 1000.0
    times = {"torch": 1e3, "function": 1e2, "hook": 1.2e2, "all_reduce": 50.0}
    row = {"ranks": 2, "parameters": 48, "regime": "under", "us": times}
    row |= {"ratios": {"function": 0.3, "hook": 0.12}}
    row |= {"collectives": {"torch": 2, "function": 2, "hook": 1}}
    assert [line.split(" | ")[-1] for line in distributed.figures([row])[2:]] == [
        "False |",  # two collectives
        "False |",  # above a quarter of torch's time
        "True |",
    ]


@pytest.mark.parametrize("name", thresholds.RULES)
def test_a_repeated_history_decides_like_the_one_it_repeats(name):
    one = thresholds.History(thresholds.RULES[name](), 1).grown_to(120)
    decided = []
    for history, count in ((one, 1), (one.repeated(3, thresholds.RULES[name]), 3)):
        ones = torch.ones(count, dtype=torch.float64)
        context = gradclip.thresholds.StepContext(120, ones.bool(), 2.0, ones)
        decided.append(history.rule.thresholds(1.5 * ones, context).tolist())
    assert decided[1] == pytest.approx(decided[0] * 3, rel=1e-12)


def test_intervals_and_tests():
    for freedom, known in ((1, 12.7062), (4, 2.7764), (7, 2.3646)):
        assert student_t(freedom) == pytest.approx(known, rel=1e-4)
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.count, found.above, found.sign) == (3.0, 5, 5, 1)
    assert found.high - 3 == pytest.approx(2.7764 * (2.5 / 5) ** 0.5, rel=1e-4)
    for successes, low, high in ((0, 0, 0.161125), (20, 0.838875, 1), (10, 0.299298, 0.700702)):
        assert order.wilson(successes, 20) == pytest.approx((low, high), abs=1e-6)
    for wins, losses, p in ((0, 0, 1), (5, 5, 1), (8, 1, 20 / 512), (6, 0, 2 / 64)):
        assert order.sign_test(wins, losses) == order.sign_test(losses, wins) == p


def test_diverged_trainings_are_counted_and_in_no_mean():
    losses = {"none": [2.5, 2.61, 2.7], "spike": [3.5, math.nan, 3.71]}
    outcomes = [
        Outcome("rnn", corruption, "arm", seed, loss, 0.25, 3)
        for corruption, several in losses.items()
        for seed, loss in enumerate(several)
    ]
    _, row = rows_of(outcomes)
    assert (row.diverged, row.change.count) == (1, 2)
    assert row.loss.mean == pytest.approx(3.605)
    assert row.change.mean == pytest.approx((1.0 + 1.01) / 2)  # each beside its own seed


@pytest.mark.parametrize(
    ("solved", "end"),
    [
        (([9] * 8, [None] * 8), "Clipped seeds succeed more often (p = 0.0078, level 0.05)."),
        (([None] * 8, [9] * 8), "Unclipped seeds succeed more often (p = 0.0078, level 0.05)."),
        (([9] * 5, [None] * 5), "do not separate the arms (p = 0.062, level 0.05)."),
    ],
)
def test_a_verdict_follows_from_the_numbers(solved, end):
    arms = {
        name: order.Outcome(at, [None] * len(at), [0.5] * len(at), 0.25, [3.0], [])
        for name, at in zip(order.ARMS, solved, strict=True)
    }
    [line] = order.verdicts([order.Result(Plan(20, len(solved[0])), 1000, 90.0, arms)], 1000, 5)
    assert line.endswith(end)


@pytest.mark.parametrize("name", order.ARMS)
def test_each_seed_is_clipped_by_its_own_norm(name):
    """Gradients of the networks side by side are those of each alone, by autograd."""
    arm = Arm(Plan(20, 3), name)
    with torch.no_grad():
        arm.networks.output[1] *= 200
    generators = task.generators_for("training", 20, 3)
    symbols, classes = task.sequences_of_all(20, 20, generators)
    before = {key: value.clone().double() for key, value in arm.networks.named_parameters()}
    arm.train(symbols, classes)
    for seed in range(3):
        weights = {key: value[seed].detach().requires_grad_() for key, value in before.items()}
        state = torch.zeros(20, task.UNITS, dtype=torch.float64)
        for now in F.one_hot(symbols[:, seed].long(), 6).double():
            state = (state @ weights["recurrent"] + now @ weights["input"] + weights["bias"]).tanh()
        loss = F.cross_entropy(state @ weights["output"] + weights["output_bias"], classes[seed])
        gradients = torch.autograd.grad(loss, [*weights.values()])
        norm = sum(gradient.square().sum().item() for gradient in gradients) ** 0.5
        assert arm.largest_norms[seed].item() == pytest.approx(norm, rel=1e-5)
        factor = -0.01 * (min(1.0, 1.0 / norm) if name == "clipped" else 1.0)
        for key, gradient in zip(weights, gradients, strict=True):
            change = arm.networks.get_parameter(key)[seed].double() - before[key][seed]
            wanted = (factor * gradient).view_as(change)
            torch.testing.assert_close(change, wanted, rtol=1e-3, atol=1e-6 * norm)


def by(norm):
    return lambda parameters: gradclip.clip_grad_norm_(parameters, norm)


def each(parameters):
    return [gradclip.clip_grad_norm_(parameter, 1.0) for parameter in parameters]


@pytest.mark.parametrize(
    ("hazard", "clip", "verdict"),
    [
        ("complex", by(math.inf), "not clipped"),
        ("complex", by(0.5), "norm 0.5 instead of 1"),
        ("complex", each, "direction changed, norm 1.73 instead of 1"),
        ("one inf", lambda parameters: None, f"1 of {COUNT} parameters not finite"),
        ("fused AMP", by(1.0), f"norm {2.0**-10:.3g} instead of 1"),
    ],
)
def test_a_planted_fault_is_found(hazard, clip, verdict):
    def make(optimizers, scaler):
        return Clipping(lambda: clip(parameters_of(optimizers)))

    assert outcome(Way("planted", "fixed", make), hazard).startswith(verdict)


@pytest.mark.parametrize("hazard", HAZARDS)
def test_an_attached_clipper_is_right_in_every_hazard(hazard):
    *_, hook = fixed_ways("eager")
    assert hook.name == "gradclip hook"
    assert outcome(hook, hazard).startswith("right")


def test_regret_is_relative_to_the_best_fixed_threshold_that_never_diverged():
    """And a failure is a seed that diverged, or half of what clipping gained that is lost."""
    scores = dict.fromkeys(FIXED, (2.0, 2.2))
    scores |= {FIXED[0]: (1.0, math.nan), FIXED[3]: (1.9, 2.1), "none": (2.6, 2.8)}
    scores |= {"auto": (1.9, 2.3), "late": (2.3, 2.5), "lost": (2.0, math.inf)}
    task = TASKS["gru explosive"]
    outcomes = [
        Trained(task.name, arm, seed, score, 0.5)
        for arm, by_seed in scores.items()
        for seed, score in enumerate(by_seed)
    ]
    results = results_of(task, outcomes)
    regrets = {"auto": 0.05, "none": 0.35, "late": 0.2, FIXED[3]: 0.0}
    assert {arm: results[arm].regret for arm in regrets} == pytest.approx(regrets)
    failed = {arm for arm, result in results.items() if result.failed}
    assert failed == {FIXED[0], "none", "late", "lost"}
    assert results["auto"].uncertainty == pytest.approx(12.706 * 0.1 / 2, rel=1e-3)
    assert [results["lost"].diverged, results["auto"].clip_rate] == [1, 0.5]


def test_rates_that_train_are_neighbours_near_the_best():
    """A gap ends a range, a loss that is not finite is in none, and one rate is 0 decades."""
    means = (2.19, 9.0, 2.0, 2.1, 2.2, 2.3)
    curve = [curves.Point(10.0**n, "1", (mean, mean)) for n, mean in enumerate(means)]
    assert curves.rates_that_train(curve, 2.0) == [1e2, 1e3, 1e4]
    assert curves.decades([1e2, 1e3, 1e4]) == pytest.approx(2)
    assert curves.decades([1e2]) == curves.decades([]) == 0
    lost = [curves.Point(1.0, "1", (2.0, math.nan))]
    assert curves.rates_that_train(lost, 2.0) == []
    assert [point.diverged(4.6) for point in (*lost, *curve[1:3])] == [1, 2, 0]


def test_the_best_of_the_grid_is_chosen_by_its_mean_at_each_rate():
    losses = dict.fromkeys(curves.ARMS, (3.0, 3.0))
    points = {(0.1, arm): curves.Point(0.1, arm, found) for arm, found in losses.items()}
    losses |= {"0.3": (1.0, math.nan), "3": (1.0, 4.0), curves.AUTO: (math.inf, 2.0)}
    points |= {(1.0, arm): curves.Point(1.0, arm, found) for arm, found in losses.items()}
    points[0.1, "10"] = curves.Point(0.1, "10", (2.0, 2.5))
    drawn = curves.curves_of(points)
    assert [point.arm for point in drawn[curves.BEST]] == ["10", "3"]
    assert curves.lowest(drawn.values()) is points[0.1, "10"]
    above = curves.furthest_above(drawn[curves.AUTO], drawn[curves.BEST])
    assert above == (points[1.0, curves.AUTO], points[1.0, "3"])

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch.nn import functional as F

from benchmarks.experiments.temporal_order import (
    run as temporal_order,
)
from benchmarks.experiments.temporal_order import (
    task as temporal_task,
)
from benchmarks.experiments.temporal_order import (
    training as temporal_training,
)
from benchmarks.experiments.temporal_order.report import (
    NEVER,
    Comparison,
    Outcome,
    Result,
    rates,
    sign_test,
    verdicts,
    wilson,
)
from benchmarks.experiments.temporal_order.task import (
    Networks,
    generator_for,
    generators_for,
    sequences,
)
from benchmarks.experiments.temporal_order.training import ARMS, Arm, Pair, Plan, trained


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices are small, and other tests run beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    """Few sequences in each test."""
    monkeypatch.setattr(temporal_training, "TEST", 200)
    monkeypatch.setattr(temporal_training, "VALIDATION", 50)


def batches(length: int, seeds: int, count: int, size: int = 20) -> list[tuple]:
    generators = generators_for("training", length, seeds)
    drawn = temporal_task.sequences_of_all(length, count * size, generators)
    split = [each.unflatten(-1, (count, size)).unbind(-2) for each in drawn]
    return [*zip(*split, strict=True)]


def losses_by_hand(weights: dict[str, torch.Tensor], symbols, classes) -> torch.Tensor:
    """Mean loss of one seed, in the words of the paper, by autograd."""
    state = torch.zeros(symbols.shape[1], temporal_task.UNITS, dtype=torch.float64)
    for now in F.one_hot(symbols.long(), 6).double():
        inner = state @ weights["recurrent"] + now @ weights["input"] + weights["bias"]
        state = inner.tanh()
    logits = state @ weights["output"] + weights["output_bias"]
    return -logits.log_softmax(-1).gather(1, classes.unsqueeze(1)).mean()


def gradients_by_hand(networks: Networks, seed: int, symbols, classes) -> dict[str, torch.Tensor]:
    weights = {
        name: parameter[seed].detach().double().requires_grad_()
        for name, parameter in networks.named_parameters()
    }
    loss = losses_by_hand(weights, symbols[:, seed], classes[seed])
    return dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))


def exploding(arm: Arm) -> None:
    """Make the gradients of every second seed long."""
    with torch.no_grad():
        arm.networks.output[1::2] *= 200


def test_sequences_show_two_relevant_symbols_at_their_places():
    symbols, classes = sequences(30, 4000, generator_for("training", 30, 0))
    places = (symbols < 2).T.nonzero()[:, 1].view(4000, 2)
    assert set(places[:, 0].tolist()) == {3, 4, 5}
    assert set(places[:, 1].tolist()) == {15, 16, 17}
    shown = symbols.T.gather(1, places).long()
    assert torch.equal(classes, 2 * shown[:, 0] + shown[:, 1])
    assert classes.bincount(minlength=4).tolist() == pytest.approx([1000] * 4, rel=0.15)
    others = symbols[symbols >= 2].long().bincount()
    assert others.tolist() == pytest.approx([0, 0, *[4000 * 28 / 4] * 4], rel=0.05)


@pytest.mark.parametrize(
    ("length", "first", "second"),
    [
        (20, {2, 3}, {10, 11}),
        (25, {2, 3, 4}, {12, 13, 14}),
        (50, {*range(5, 10)}, {*range(25, 30)}),
    ],
)
def test_places_of_other_lengths(length, first, second):
    symbols, _ = sequences(length, 500, generator_for("training", length, 0))
    places = (symbols < 2).T.nonzero()[:, 1].view(500, 2)
    assert set(places[:, 0].tolist()) == first
    assert set(places[:, 1].tolist()) == second


def test_no_two_streams_are_alike():
    drawn = {
        tuple(torch.rand(3, generator=generator).tolist())
        for purpose in temporal_task.PURPOSES
        for length in (20, 21)
        for generator in generators_for(purpose, length, 5)
    }
    assert len(drawn) == len(temporal_task.PURPOSES) * 2 * 5


def test_first_weights_are_basic_tanh():
    networks = Networks(20, 50)
    assert networks.recurrent.shape == (20, 50, 50)
    for parameter in (networks.recurrent, networks.input, networks.output):
        assert parameter.std().item() == pytest.approx(0.1, rel=0.03)
        assert parameter.mean().item() == pytest.approx(0, abs=0.005)
    assert not networks.bias.any()
    assert not networks.output_bias.any()
    radii = torch.linalg.eigvals(networks.recurrent.detach()).abs().amax(1)
    assert radii.mean().item() == pytest.approx(0.1 * math.sqrt(50), rel=0.1)


def test_gradients_are_those_of_each_seed_alone():
    networks = Networks(3, 20).double()
    symbols, classes = batches(20, 3, 1)[0]
    networks.loss(symbols, classes).backward()
    for seed in range(3):
        for name, gradient in gradients_by_hand(networks, seed, symbols, classes).items():
            found = networks.get_parameter(name).grad[seed]
            torch.testing.assert_close(found, gradient.view_as(found), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ARMS)
def test_each_seed_is_clipped_by_its_own_norm(name):
    arm = Arm(Plan(20, 4), name)
    exploding(arm)
    before = {key: value.clone() for key, value in arm.networks.state_dict().items()}
    symbols, classes = batches(20, 4, 1)[0]
    wanted, norms = {}, []
    for seed in range(4):
        gradients = gradients_by_hand(arm.networks, seed, symbols, classes)
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients.values())))
        factor = min(1.0, 1.0 / norms[-1]) if name == "clipped" else 1.0
        wanted[seed] = {key: -0.01 * factor * g for key, g in gradients.items()}
    arm.train(symbols, classes)
    assert [norm > 1 for norm in norms] == [False, True, False, True]
    assert arm.largest_norms.tolist() == pytest.approx(norms, rel=1e-5)
    assert arm.clipper.clip_rate() == 0.5
    for seed, changes in wanted.items():
        for key, change in changes.items():
            found = arm.networks.get_parameter(key)[seed].detach() - before[key][seed]
            torch.testing.assert_close(
                found.double(), change.view_as(found), rtol=1e-3, atol=1e-6 * norms[seed]
            )


def test_the_unclipped_arm_is_plain_descent_bit_for_bit():
    arm = Arm(Plan(20, 4), "unclipped")
    exploding(arm)
    plain = copy.deepcopy(arm.networks)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for symbols, classes in batches(20, 4, 3):
        arm.train(symbols, classes)
        optimizer.zero_grad()
        plain.loss(symbols, classes).backward()
        optimizer.step()
    for found, wanted in zip(arm.networks.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ARMS)
def test_a_seed_does_not_depend_on_how_many_there_are(name):
    few, many = Arm(Plan(20, 2), name), Arm(Plan(20, 5), name)
    for symbols, classes in batches(20, 5, 3):
        few.train(symbols[:, :2], classes[:2])
        many.train(symbols, classes)
    for arm in (few, many):
        arm.check(3)
    for found, wanted in zip(many.networks.parameters(), few.networks.parameters(), strict=True):
        torch.testing.assert_close(found[:2], wanted, rtol=1e-5, atol=1e-7)
    assert many.validation_errors[0][:2] == pytest.approx(few.validation_errors[0], abs=0.03)


def test_training_sequences_do_not_depend_on_how_many_seeds_there_are():
    for (few, of_few), (many, of_many) in zip(batches(20, 2, 2), batches(20, 5, 2), strict=True):
        assert torch.equal(few, many[:, :2])
        assert torch.equal(of_few, of_many[:2])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ARMS)
def test_a_seed_that_diverges_touches_no_other(name):
    arm, healthy = Arm(Plan(20, 3), name), Arm(Plan(20, 3), name)
    with torch.no_grad():
        arm.networks.recurrent[1, 0, 0] = math.nan
    for symbols, classes in batches(20, 3, 2):
        arm.train(symbols, classes)
        healthy.train(symbols, classes)
    for found, wanted in zip(arm.networks.parameters(), healthy.networks.parameters(), strict=True):
        assert torch.equal(found[::2], wanted[::2])
    for updates in (2, 4):
        arm.check(updates)
    assert arm.diverged_at == [None, 2, None]
    assert [shares[1] for shares in arm.validation_errors] == [1, 1]
    assert arm.final_errors()[1] == 1


def test_a_gradient_that_is_not_finite_is_erased_for_its_own_seed_alone():
    arms = {name: Arm(Plan(20, 3), name) for name in ARMS}
    symbols, classes = batches(20, 3, 1)[0]
    for arm in arms.values():
        with torch.no_grad():
            arm.networks.output[1] = 3e38
        before = [parameter[1].clone() for parameter in arm.networks.parameters()]
        moving = arm.networks.output[0].clone()
        arm.train(symbols, classes)
        after = [parameter[1] for parameter in arm.networks.parameters()]
        kept = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert kept == (arm is arms["clipped"])
        assert not torch.equal(arm.networks.output[0], moving)
    assert arms["clipped"].networks.finite().tolist() == [True, True, True]
    assert arms["unclipped"].networks.finite().tolist() == [True, False, True]


def test_wrong_answers_are_counted_and_others_that_are_not_finite():
    networks = Networks(2, 20)
    symbols, classes = batches(20, 2, 1, size=200)[0]
    wrong = (networks(symbols).argmax(-1) != classes).sum(1)
    assert networks.errors(symbols, classes).tolist() == wrong.tolist()
    alone = networks.errors(symbols[:, 1:], classes[1:], 1)
    assert alone.tolist() == wrong[1:].tolist()
    with torch.no_grad():
        networks.output_bias[0] = math.inf
    assert networks.errors(symbols, classes).tolist() == [200, wrong[1].item()]


class Answers:
    """Stands for `Networks.errors`: gives planned numbers of errors, and keeps who was asked."""

    def __init__(self, validation: list[list[int]], tests: dict[int, list[int]]) -> None:
        self.validation, self.tests = iter(validation), tests
        self.asked: list[int] = []

    def __call__(self, symbols, classes, seed=None) -> torch.Tensor:
        if seed is None:
            assert classes.shape == (len(self.tests), 500)
            return torch.tensor(next(self.validation))
        assert symbols.shape == (20, 1, 10_000)
        self.asked.append(seed)
        return torch.tensor([self.tests[seed].pop(0)])


def test_success_is_less_than_one_percent_of_ten_thousand_fresh_sequences(monkeypatch):
    arm = Arm(Plan(20, 3), "clipped")
    answers = Answers([[5, 5, 6], [5, 5, 6], [300, 300, 5]], {0: [99], 1: [100, 99], 2: [0]})
    monkeypatch.setattr(arm.networks, "errors", answers)
    arm.check(250)
    assert answers.asked == [0, 1]
    assert arm.solved_at == [250, None, None]
    arm.check(500)
    assert answers.asked == [0, 1, 1]
    arm.check(750)
    assert arm.solved_at == [250, 500, 750]
    assert arm.validation_errors == [[0.01, 0.01, 0.012]] * 2 + [[0.6, 0.6, 0.01]]


def test_the_final_test_of_a_network_that_always_says_the_same():
    arm = Arm(Plan(20, 2), "clipped")
    with torch.no_grad():
        for parameter in arm.networks.parameters():
            parameter.zero_()
    errors = arm.final_errors()
    assert errors == pytest.approx([0.75, 0.75], abs=0.02)
    assert errors[0] != errors[1]
    assert arm.final_errors() == errors


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        pairs = zip(first, second, strict=True)
        return len(first) == len(second) and all(same(a, b) for a, b in pairs)
    return first == second


def rounds(pair: Pair, count: int) -> Pair:
    for _ in range(count):
        pair.round()
    return pair


@pytest.mark.usefixtures("small")
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    plan, path = Plan(20, 3, check_every=4), tmp_path / "new" / "length-20.pt"
    whole, interrupted, resumed = Pair(plan), Pair(plan), Pair(plan)
    for pair in (whole, interrupted):
        for arm in pair.arms.values():
            exploding(arm)
    rounds(whole, 4)
    rounds(interrupted, 2).save(path)
    resumed.load(path)
    assert resumed.seconds == interrupted.seconds > 0
    rounds(resumed, 2)
    assert resumed.updates == whole.updates == 16
    for name in ARMS:
        found, wanted = (pair.arms[name].state_dict() for pair in (resumed, whole))
        assert found["clipper"]["steps"] == 16
        assert found["clipper"]["counters"]["clipped"] > 0
        assert len(found["validation_errors"]) == 4
        assert same(found, wanted)
        assert resumed.arms[name].final_errors() == whole.arms[name].final_errors()


@pytest.mark.usefixtures("small")
def test_a_checkpoint_stays_whole_when_the_next_one_fails(tmp_path, monkeypatch):
    path = tmp_path / "length-20.pt"
    pair = rounds(Pair(Plan(20, 2, check_every=1)), 1)
    pair.save(path)

    def fail(state: object, file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        rounds(pair, 1).save(path)
    loaded = Pair(pair.plan)
    loaded.load(path)
    assert loaded.updates == 1


@pytest.mark.usefixtures("small")
def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    path = tmp_path / "length-20.pt"
    rounds(Pair(Plan(20, 2, check_every=1)), 1).save(path)
    with pytest.raises(ValueError, match="is a checkpoint of .*'seeds': 2.*, not of .*'seeds': 3"):
        Pair(Plan(20, 3, check_every=1)).load(path)


@pytest.mark.usefixtures("small")
def test_either_budget_ends_training_and_counts_on_after_a_resume(tmp_path, capsys):
    plan, path = Plan(20, 2, check_every=2), tmp_path / "length-20.pt"
    assert trained(plan, 3, 1, None).updates == 4  # whole rounds
    pair = trained(plan, 100, 1e-9, path)
    assert pair.updates == 2
    assert trained(plan, 100, 1e-9, path).updates == 2
    assert trained(plan, 6, 1, path).updates == 6
    assert capsys.readouterr().err.count("L = 20") == 2 + 1 + 2


def outcome(solved_at: list[int | None]) -> Outcome:
    count = len(solved_at)
    errors = [0.5 if at is None else 0.001 for at in solved_at]
    return Outcome(solved_at, [None] * count, errors, 0.25, [3.0] * count, [errors] * 4)


def result(clipped: list[int | None], unclipped: list[int | None]) -> Result:
    arms = {"clipped": outcome(clipped), "unclipped": outcome(unclipped)}
    return Result(Plan(20, len(clipped)), 1000, 90.0, arms)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 20, 0, 0.161125), (20, 20, 0.838875, 1), (10, 20, 0.299298, 0.700702)],
)
def test_intervals_are_wilsons(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=1e-6)


def test_intervals_have_the_ends_at_which_the_score_test_just_rejects():
    for end in wilson(3, 25):
        score = abs(3 / 25 - end) / math.sqrt(end * (1 - end) / 25)
        assert score == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1), (5, 5, 1), (8, 1, 20 / 512), (1, 8, 20 / 512), (6, 0, 2 / 64), (20, 0, 2 / 2**20)],
)
def test_the_sign_test_is_exact(wins, losses, p):
    assert sign_test(wins, losses) == p


def test_arms_are_compared_seed_by_seed():
    found = result([100, 200, None, None, 300, 7], [200, 300, 500, None, None, None])
    assert Comparison.of(found, "successes") == Comparison(2, 1, 3)
    assert Comparison.of(found, "times") == Comparison(4, 1, 1)
    found.arms["clipped"].final_errors[:] = [0.01, 0.02, 0.03, 0.04, 0.05, 0.0099]
    assert Comparison.of(found, "last_successes") == Comparison(1, 3, 2)


def test_a_seed_that_diverged_is_a_failure_also_if_it_had_solved_the_task():
    found = outcome([100, 200, None])
    found.diverged_at[0] = 300
    assert found.successes == [False, True, False]
    assert found.times == [NEVER, 200, NEVER]


def test_rates_are_counted():
    found = result([100, 400, None, 200], [None, None, None, None])
    found.arms["unclipped"].diverged_at[2] = 500
    clipped, unclipped = rates([found])[2:]
    assert clipped == (
        "| 20 | clipped | 3/4 | 0.30 to 0.95 | 200 | 3/4 | 0.0010 | 0 | 25.0 % | 3 |"
    )
    assert unclipped == (
        "| 20 | unclipped | 0/4 | 0.00 to 0.49 | none | 0/4 | 0.5000 | 1 | 25.0 % | 3 |"
    )


@pytest.mark.parametrize(
    ("clipped", "unclipped", "wanted"),
    [
        ([9] * 8, [None] * 8, "Clipped seeds succeed more often (p = 0.0078, level 0.05)."),
        ([None] * 8, [9] * 8, "Unclipped seeds succeed more often (p = 0.0078, level 0.05)."),
        ([9] * 5, [None] * 5, "do not separate the arms (p = 0.062, level 0.05)."),
        ([9] * 5, [9] * 5, "do not separate the arms (p = 1, level 0.05)."),
    ],
)
def test_the_verdict_follows_from_the_numbers(clipped, unclipped, wanted):
    (line,) = verdicts([result(clipped, unclipped)], 1000, 5)
    assert line.endswith(wanted)
    solved = [sum(at is not None for at in arm) for arm in (clipped, unclipped)]
    assert f"Clipped, {solved[0]} of {len(clipped)} seeds solved the task" in line
    assert f"unclipped {solved[1]}." in line


def test_the_verdict_says_what_ended_the_run_and_splits_the_level():
    found = result([9] * 6, [None] * 6)
    told = [verdicts([found] * 3, *budget)[0] for budget in [(1000, 5), (9000, 1.5), (9000, 5)]]
    assert "the budget of updates ended it" in told[0]
    assert "1,000 updates of each arm in 1.5 minutes" in told[0]
    assert "the wall time ended it before 9,000 updates" in told[1]
    assert "it was interrupted" in told[2]
    assert all("do not separate the arms (p = 0.031, level 0.0167)." in line for line in told)


@pytest.mark.usefixtures("small")
def test_the_same_command_goes_on_and_writes_the_report(tmp_path, capsys):
    saved = tmp_path / "results" / "order.md"
    options = ["--lengths", "10", "20", "--seeds", "2", "--check-every", "2"]
    options += ["--checkpoint", str(tmp_path / "kept"), "--save", str(saved)]
    torch.set_num_threads(2)
    temporal_order.main([*options, "--updates", "2"])
    first = capsys.readouterr()
    temporal_order.main([*options, "--updates", "4"])
    second = capsys.readouterr()
    assert torch.get_num_threads() == 2
    assert first.err.count("2 updates") == second.err.count("4 updates") == 2
    assert "2 updates" not in second.err
    text = saved.read_text()
    assert text.startswith(second.out)
    assert "Budget for each length: 4 updates of each arm, or 16 minutes" in text
    assert re.search(r"^gradclip \S+, torch \S+, python .*, date \d{4}-\d\d-\d\d$", text, re.M)
    for length in (10, 20):
        assert f"**L = {length}**: 4 updates of each arm" in text
        for name in ARMS:
            assert f"| {length} | {name} | 0/2 | 0.00 to 0.66 |" in text
    assert "![Seeds that have solved the task, and errors](order.png)" in text
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lengths", "9"], "10 to 999"),
        (["--seeds", "1"], "2 to 9,999"),
        (["--minutes", "0"], "above 0"),
        (["--updates", "0"], "above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, told, capsys):
    with pytest.raises(SystemExit):
        temporal_order.main(options)
    assert told in capsys.readouterr().err

"""The end of a rule's warm-up: when the host learns of it; and no bit depends on it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import thresholds
from gradclip.thresholds import StepContext, warm_up
from gradclip.thresholds.warm_up import WarmUp
from tests.support.engines import bits
from tests.support.rules import RULES

CPU = torch.device("cpu")
SETTLING = [name for name, make in RULES.items() if getattr(make(), "settles_after", None)]
NORMS = st.one_of(
    st.floats(0.1, 10.0),
    st.floats(0.0, allow_infinity=True, allow_nan=False),
    st.sampled_from([0.0, 1.0, 1.0, 1e200, math.nan, math.inf]),
)


class Never(WarmUp):
    """A warm-up of whose end the host never learns."""

    def is_over(self, counts):
        return False


class Trusted:
    """A rule that is asked as the clipper asks it on a device."""

    def __init__(self, make, kind, count):
        self.rule = make()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gradclip.thresholds.adaptive.WarmUp", kind)
            self.rule.start([*map(str, range(count))], CPU, torch.float64)

    def step(self, index, norms, present):
        """Return the bits of the limits and of the state."""
        usable = present & (norms < math.inf)
        context = StepContext(index, present, 2.0, usable=usable)
        limits = self.rule.thresholds(norms, context)
        clipped_norms = norms * (limits / norms).nan_to_num(1.0).clamp(max=1.0)
        self.rule.observe(norms, clipped_norms, context)
        return [bits(limits), *map(bits, self.rule.state.values())]


@pytest.mark.parametrize("make", [RULES[name] for name in SETTLING], ids=SETTLING)
def test_both_ways_of_a_rule_give_the_same_bits(make):
    """Past the warm-up the rule computes less, whatever the norms are."""

    @settings(max_examples=15)
    @given(st.lists(st.tuples(NORMS, NORMS, st.booleans()), min_size=12, max_size=25))
    def compare(steps):
        ways = [Trusted(make, kind, 2) for kind in (WarmUp, Never)]
        for index in range(8):  # no norm is missing, so that the host soon learns of the end
            norms, present = torch.tensor([1.0 + index, 2.0]).double(), torch.tensor([True, True])
            assert all(map(torch.equal, *(way.step(index, norms, present) for way in ways)))
        for index, (one, other, present) in enumerate(steps, 8):
            norms = torch.tensor([one, other * present], dtype=torch.float64)
            found = [way.step(index, norms, torch.tensor([True, present])) for way in ways]
            assert all(map(torch.equal, *found)), steps
            assert [way.rule.settled for way in ways] == [True, False]

    compare()


class LateAnswer:
    """An answer that arrives when the test says so."""

    def __init__(self, flag):
        sent.append(self)
        self.done, self._flag = False, bool(flag)

    def arrived(self):
        return self.done

    def value(self):
        assert self.done, "the host would wait"
        return self._flag

    def __reduce_ex__(self, protocol):
        raise TypeError("an event of CUDA cannot be copied")


sent: list[LateAnswer] = []


@pytest.fixture
def late(monkeypatch, device_route):
    """Answers that the test lets arrive, in the order in which they were asked for."""
    monkeypatch.setattr(warm_up, "ANSWERS", "cpu")
    monkeypatch.setattr(warm_up, "Answer", LateAnswer)
    sent.clear()
    return sent


def test_the_host_asks_once_and_reads_the_answer_when_it_has_arrived(late):
    """After as many steps as the warm-up has norms, at the earliest."""
    ended, counts = WarmUp(3), torch.tensor([3, 5])
    assert [ended.is_over(counts) for _ in range(8)] == [False] * 8
    assert len(late) == 1
    late[0].done = True
    assert [ended.is_over(counts) for _ in range(3)] == [True] * 3
    assert len(late) == 1
    assert not WarmUp(3).is_over(counts)


def test_the_host_asks_again_where_a_label_has_seen_too_few(late):
    """Once as many steps have passed again: an idle expert costs next to nothing."""
    ended, counts = WarmUp(3), torch.tensor([3, 2])
    for _ in range(4):
        ended.is_over(counts)
    late[0].done = True
    asked = []
    for _ in range(9):
        assert not ended.is_over(counts)
        asked.append(len(late))
        late[-1].done = True
    assert asked == [1, 1, 1, 1, 2, 2, 2, 2, 2]
    counts[1] = 3
    for _ in range(8):
        late[-1].done = True
        is_over = ended.is_over(counts)
    assert is_over


@pytest.mark.usefixtures("device_route")
def test_a_device_without_answers_stays_in_its_warm_up():
    """Nothing is read there; nor of a state that is not float64, which numbers do not match."""
    ended = WarmUp(1)
    for counts in (torch.tensor([7]), torch.tensor([7], device="meta")):
        assert not any(ended.is_over(counts) for _ in range(5))
    rule = thresholds.ZScore(warmup=1)
    rule.start(["a", "b"], CPU, torch.float32)
    assert rule._warm_up is None


def test_losses_that_go_on_without_float64_stay_in_their_warm_up():
    rule = thresholds.MeanDeviation(window=2, loss=True)
    rule.start(["a", "b"], CPU, torch.float64)
    assert rule._losses._warm_up is not None
    rule.start(["a", "b"], CPU, torch.float32)
    assert rule._losses._warm_up is None


def settled_rule(**options):
    """Return a rule with two labels past its warm-up."""
    rule = thresholds.ZScore(warmup=2, **options)
    rule.start(["a", "b"], CPU, torch.float64)
    norms = torch.tensor([1.0, 2.0], dtype=torch.float64)
    context = StepContext(0, norms > 0)
    for _ in range(3):
        rule.thresholds(norms, context)
        rule.observe(norms, norms, context)
    return rule, lambda: rule.thresholds(norms, context) is not None and rule.settled


def test_loading_a_state_tells_at_once_whether_the_warm_up_is_over():
    """Added labels begin another one."""
    rule, is_settled = settled_rule()
    state, fresh = rule.state_dict(), thresholds.ZScore(warmup=2)
    fresh.start(["a", "b"], CPU, torch.float64)
    assert is_settled()
    rule.load_state_dict(fresh.state_dict())
    assert not is_settled()
    rule.load_state_dict(state)
    assert is_settled()
    rule.start(["a", "b", "c"], CPU, torch.float64)
    assert not rule.settled


def test_a_captured_graph_stays_in_the_warm_up(captured):
    """An earlier state may be loaded before its replays."""
    _, is_settled = settled_rule()
    assert is_settled()
    with captured():
        assert not is_settled()
    assert is_settled()


def test_a_rule_is_copied_while_an_answer_is_on_its_way(late):
    """Without it, since an event of CUDA cannot be copied: the copy asks again."""
    rule, _ = settled_rule()
    copied = copy.deepcopy(rule)
    assert (copied._warm_up._answer, copied.settled) == (None, False)
    assert rule._warm_up._answer is late[0]


@pytest.mark.cuda
def test_a_cuda_device_answers():
    rule = thresholds.ZScore(warmup=2)
    rule.start(["a"], torch.device("cuda"), torch.float64)
    norms = torch.ones(1, dtype=torch.float64, device="cuda")
    for _ in range(5):
        rule.thresholds(norms, StepContext(0, norms > 0))
        rule.observe(norms, norms, StepContext(0, norms > 0))
        torch.cuda.synchronize()
    assert rule.settled

"""A damaged or hostile state is refused, and the clipper stays as it was."""

import copy
import io
import math
import random
from functools import cache

import pytest
import torch

from gradclip import GradientClipper, MemorySink, StateError
from tests.support.reference import bits_in
from tests.support.rules import RULES

NAMES = [name for name in RULES if name != "None"]  # which is Fixed
SIGNED = {"Auto": ("calm", "turns")}
"""Names of the tensors whose numbers may be negative, by rule."""
every = pytest.mark.parametrize("name", NAMES)


class SavedRun:
    """Two parameters with a norm each, and gradients that are the same in every run."""

    def __init__(self, rule):
        self._weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
        self.optimizer = torch.optim.SGD(self._weights, lr=0.1, momentum=0.9)
        self.sink, options = MemorySink(), {"scope": "parameter", "nonfinite": "skip"}
        self.clipper = GradientClipper(self.optimizer, RULES[rule](), log=self.sink, **options)
        self._rule, self._taken = rule, 0
        self.take(12)
        self.before = self.seen()

    def take(self, steps):
        for _ in range(steps):
            self._taken += 1
            generator = torch.Generator().manual_seed(self._taken)
            for weight in self._weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            if self._taken == 7:
                weight.grad[0] = math.nan
            self.optimizer.step()

    def seen(self):
        """Return all that there is of it, every bit of the state included."""
        states = self.clipper.state_dict(), self.optimizer.state_dict(), self._weights
        return bits_in((states, [step._replace(wall_time=0) for step in self.sink.steps]))

    def refuses(self, state, match="Nothing was loaded"):
        """Check that a state is refused and changes nothing."""
        with pytest.raises(StateError, match=match):
            self.clipper.load_state_dict(state)
        assert self.seen() == self.before, state

    def check_as_never_tried(self):
        """Check that it goes on like a run that no state was loaded into."""
        other = SavedRun(self._rule)
        for run in (self, other):
            assert run.seen() == run.before
            run.take(8)
            run.clipper.close()
        assert self.seen() == other.seen()


@every
def test_file_with_changed_bytes_is_refused_or_usable(name):
    """Without a zip's checksums, as old files were, numbers may change: they have to fit."""
    run, chance, buffer, refused = SavedRun(name), random.Random(name), io.BytesIO(), 0
    torch.save(run.clipper.state_dict(), buffer, _use_new_zipfile_serialization=False)
    for _ in range(40):
        octets = bytearray(buffer.getvalue())
        for _ in range(chance.choice((1, 1, 2, 8))):
            octets[chance.randrange(len(octets))] ^= 1 << chance.randrange(8)
        try:
            state = torch.load(io.BytesIO(octets), weights_only=True)
        except Exception:  # noqa: BLE001  # torch says it in many ways
            continue
        try:
            run.clipper.load_state_dict(state)
        except StateError:
            refused += 1
            assert run.seen() == run.before
        else:
            run.take(3)
            assert bool((run.clipper.last.thresholds >= 0).all())
            assert 0 <= run.clipper.clip_rate() < math.inf
            run.clipper.load_state_dict(run.clipper.state_dict())
            run.before = run.seen()
    assert refused


PLAIN = [None, True, -1, 1.5, math.nan, "steps", b"7", [], {}, (1, 2)]
ODD = [
    *PLAIN,
    torch.tensor(3),
    *(torch.ones(2, dtype=kind) for kind in (torch.float32, torch.int64, torch.complex64)),
    *(torch.full((2,), value, dtype=torch.float64) for value in (math.nan, -1.0, math.inf)),
    torch.ones(2, 5, 1, dtype=torch.float64),
    torch.ones(2).to_sparse(),
    torch.ones(2, device="meta"),
]


def ways_into(state, way=()):
    """Yield the keys that lead to everything in a state, itself included, and what is there."""
    yield way, state
    inside = state.items() if isinstance(state, dict) else ()
    for key, value in enumerate(state) if isinstance(state, list) else inside:
        yield from ways_into(value, (*way, key))


def with_other_keys(value):
    """Return dicts or lists with an entry more or less, or in another order."""
    if isinstance(value, dict):
        shorter = [{k: value[k] for k in value if k != key} for key in value]
        return [{**value, "more": 1}, {**value, 1: 1}, *shorter]
    return [[*value, "more"], value[:-1], value[::-1]] if isinstance(value, list) else []


def with_value(state, way, value):
    """Return a state with another value at the end of a way."""
    if not way:
        return value
    changed = copy.copy(state)
    changed[way[0]] = with_value(state[way[0]], way[1:], value)
    return changed


def fits(value, odd, signed):
    """Return whether a rule may hold one tensor in place of another, negative numbers if signed."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in (value, odd)):
        return False
    if odd.is_meta or odd.layout is not torch.strided or odd.is_complex():
        return False
    alike = value.shape == odd.shape and value.is_floating_point() == odd.is_floating_point()
    return alike and bool((((odd >= 0) | signed) & (odd.abs() < math.inf)).all())


@cache
def state_of(name):
    return SavedRun(name).clipper.state_dict()


@every
def test_states_that_do_not_fit_are_refused(name):
    """Odd values, missing and surplus keys anywhere, and states of other rules."""
    run, state = SavedRun(name), state_of(name)
    signed = SIGNED.get(name, ())
    for way, value in ways_into(state):
        for odd in (*ODD, *with_other_keys(value)):
            wrong = with_value(state, way, odd)
            if bits_in(wrong) == bits_in(state):  # an empty dict for a rule without a state
                continue
            if fits(value, odd, signed=bool(way) and way[-1] in signed):
                run.clipper.load_state_dict(wrong)
                run.clipper.load_state_dict(state)
            else:
                run.refuses(wrong)
    for other in {*NAMES} - {name}:
        run.refuses(state_of(other))
    run.check_as_never_tried()


COUNTERS = ("clipped", "finite", "nonfinite_steps", "skipped_steps")
HUGE = [{name: count} for name in COUNTERS for count in (2**63, 10**30)]


@pytest.mark.parametrize("counts", [*HUGE, {"clipped": 3, "finite": 2}], ids=str)
def test_impossible_counts_are_refused(counts):
    """No run takes 2**62 steps, nor clips more norms than there were."""
    run = SavedRun("Fixed")
    state = run.clipper.state_dict()
    state["counters"] |= counts
    run.refuses(state, "Nothing was loaded" if counts in HUGE else "3 of 2 finite norms .* Nothing")
    run.check_as_never_tried()

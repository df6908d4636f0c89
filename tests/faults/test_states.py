"""A state file that is damaged or hostile is refused, and the clipper is as it was."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gradclip import GradientClipper, MemorySink, StateError
from tests.support.rules import RULES

STEPS = 12

every = pytest.mark.parametrize("name", RULES)


class Run:
    """Two parameters with a norm each, and gradients that are the same in every run."""

    def __init__(self, rule: str, steps: int = STEPS) -> None:
        self._weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
        self.optimizer = torch.optim.SGD(self._weights, lr=0.1, momentum=0.9)
        self.sink = MemorySink()
        self.clipper = GradientClipper(
            self.optimizer, RULES[rule](), scope="parameter", nonfinite="skip", log=self.sink
        )
        self._taken = 0
        self.take(steps)

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self._taken += 1
            generator = torch.Generator().manual_seed(self._taken)
            for weight in self._weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            if self._taken == 7:
                weight.grad[0] = math.nan
            self.optimizer.step()

    def seen(self) -> str:
        """Return what there is of it, every bit of the state included."""
        state = plain((self.clipper.state_dict(), self.optimizer.state_dict(), self._weights))
        return repr((state, [step._replace(wall_time=0) for step in self.sink.steps]))


def plain(value: object) -> object:
    """Return a state with lists in place of tensors, of which the repr shows every bit."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        dense = value.to_dense()
        return dense.dtype, dense.shape, None if dense.is_meta else dense.tolist()
    return value


def check_as_never_tried(run: Run, name: str, before: str) -> None:
    """Check that a run is as it was, and goes on like one that no state was loaded into."""
    assert run.seen() == before
    other = Run(name)
    for each in (run, other):
        each.take(8)
        each.clipper.close()
    assert run.seen() == other.seen()


def saved(run: Run, *, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    state = run.clipper.state_dict()
    torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def load(run: Run, content: bytes) -> None:
    """Load a file as a user does."""
    run.clipper.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))


def attempt(run: Run, content: bytes) -> bool:
    """Tell whether a file could be loaded."""
    try:
        state = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # noqa: BLE001  # torch says it in many ways
        return False
    try:
        run.clipper.load_state_dict(state)
    except StateError:
        return False
    return True


# The file


@every
def test_a_file_that_is_cut_short_is_refused(name: str) -> None:
    run = Run(name)
    content, before = saved(run), run.seen()
    for length in [*range(0, len(content), 199), len(content) - 1]:
        assert not attempt(run, content[:length]), length
    check_as_never_tried(run, name, before)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return a file with some of its bytes changed."""
    octets = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        octets[chance.randrange(len(octets))] ^= 1 << chance.randrange(8)
    return bytes(octets)


@every
@pytest.mark.parametrize("zipped", [True, False], ids=["with checksums", "without"])
def test_a_file_with_changed_bytes_is_refused_or_is_a_state(name: str, zipped: bool) -> None:
    """Without checksums, as files of old were, numbers may have changed: they fit all the same."""
    run, chance = Run(name), random.Random(name)
    content, before, refused = saved(run, zipped=zipped), run.seen(), 0
    for _ in range(40):
        if attempt(run, damaged(content, chance)):
            check_usable(run)
            before = run.seen()
        else:
            refused += 1
            assert run.seen() == before
    assert refused > 10


def check_usable(run: Run) -> None:
    """Check that a run goes on, with thresholds that are some, and that its state is one."""
    run.take(3)
    assert bool((run.clipper.last.thresholds >= 0).all())
    assert 0 <= run.clipper.clip_rate() < math.inf
    run.clipper.load_state_dict(run.clipper.state_dict())


class Bait:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._path, "executed")


@pytest.mark.parametrize("place", ["all", "a key", "in the threshold"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, place: str) -> None:
    run, trace = Run("ZScore"), tmp_path / "trace"
    before, state = run.seen(), run.clipper.state_dict()
    if place == "all":
        state = Bait(trace)
    elif place == "a key":
        state["steps"] = Bait(trace)
    else:
        state["threshold"]["mean"] = Bait(trace)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load(run, (tmp_path / "state.pt").read_bytes())
    assert not trace.exists()
    check_as_never_tried(run, "ZScore", before)
    torch.load(tmp_path / "state.pt", weights_only=False)
    assert trace.exists(), "there was code in it"


# What is in it

ODD = [
    None,
    True,
    -1,
    1.5,
    math.nan,
    "",
    "steps",
    b"7",
    [],
    {},
    (1, 2),
    torch.tensor(3),
    torch.ones(2),
    torch.ones(2, dtype=torch.int64),
    torch.full((2,), math.nan, dtype=torch.float64),
    torch.full((2,), -1.0, dtype=torch.float64),
    torch.full((2,), math.inf, dtype=torch.float64),
    torch.ones(2, 5, 1, dtype=torch.float64),
    torch.ones(2, dtype=torch.complex64),
    torch.ones(2).to_sparse(),
    torch.ones(2, device="meta"),
]


def places(state: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to everything in a state, itself included."""
    yield way
    inside = state.items() if isinstance(state, dict) else ()
    inside = enumerate(state) if isinstance(state, list) else inside
    for key, value in inside:
        yield from places(value, (*way, key))


def with_value(state: Any, way: tuple[Any, ...], value: object) -> Any:
    """Return a state with another value at the end of a way."""
    if not way:
        return value
    changed = copy.copy(state)
    changed[way[0]] = with_value(state[way[0]], way[1:], value)
    return changed


def alike(one: object, other: object) -> bool:
    """Tell whether both are dense tensors of one shape, of numbers of a kind."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    if other.is_meta or other.layout is not torch.strided or other.is_complex():
        return False
    return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()


def fits(tensor: torch.Tensor) -> bool:
    """Tell whether a rule may hold these numbers."""
    return bool(((tensor >= 0) & (tensor < math.inf)).all())


@every
def test_what_does_not_belong_anywhere_in_a_state_is_refused(name: str) -> None:
    run = Run(name)
    state, before = run.clipper.state_dict(), run.seen()
    for way in places(state):
        for odd in ODD:
            found = state
            for key in way:
                found = found[key]
            wrong = with_value(state, way, odd)
            if plain(wrong) == plain(state):  # an empty dict for a rule without a state
                continue
            if alike(found, odd) and fits(odd):
                run.clipper.load_state_dict(wrong)
                run.clipper.load_state_dict(state)
                continue
            with pytest.raises(StateError, match="Nothing was loaded"):
                run.clipper.load_state_dict(wrong)
            assert run.seen() == before, (way, odd)
    check_as_never_tried(run, name, before)


@every
def test_a_key_that_lacks_or_is_too_many_anywhere_is_refused(name: str) -> None:
    run = Run(name)
    state, before = run.clipper.state_dict(), run.seen()
    for way in places(state):
        found = state
        for key in way:
            found = found[key]
        if isinstance(found, dict):
            wrong = [{**found, "more": 1}, {**found, 1: 1}]
            wrong += [{k: found[k] for k in found if k != key} for key in found]
        elif isinstance(found, list):
            wrong = [[*found, "more"], found[:-1], found[::-1]]
        else:
            continue
        for each in wrong:
            with pytest.raises(StateError, match="Nothing was loaded"):
                run.clipper.load_state_dict(with_value(state, way, each))
            assert run.seen() == before, (way, each)
    check_as_never_tried(run, name, before)


@pytest.mark.parametrize("saved_by", RULES)
def test_a_state_of_another_rule_is_refused(saved_by: str) -> None:
    state = Run(saved_by).clipper.state_dict()
    for name in RULES:
        if type(RULES[name]()) is not type(RULES[saved_by]()):
            run = Run(name)
            before = run.seen()
            with pytest.raises(StateError, match="Nothing was loaded"):
                run.clipper.load_state_dict(state)
            assert run.seen() == before


@pytest.mark.parametrize("count", [2**63, 10**30])
@pytest.mark.parametrize("name", ["clipped", "finite", "nonfinite_steps", "skipped_steps"])
def test_counts_that_no_run_reaches_are_refused(name: str, count: int) -> None:
    run = Run("Fixed")
    state, before = run.clipper.state_dict(), run.seen()
    state["counters"][name] = count
    with pytest.raises(StateError, match="Nothing was loaded"):
        run.clipper.load_state_dict(state)
    check_as_never_tried(run, "Fixed", before)


def test_more_clipped_than_finite_norms_are_refused() -> None:
    run = Run("Fixed")
    state, before = run.clipper.state_dict(), run.seen()
    state["counters"] |= {"clipped": 3, "finite": 2}
    with pytest.raises(StateError, match="3 of 2 finite norms .* Nothing was loaded"):
        run.clipper.load_state_dict(state)
    check_as_never_tried(run, "Fixed", before)

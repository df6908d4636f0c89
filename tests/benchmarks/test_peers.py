from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradclip
from benchmarks.common.shapes import SETS
from benchmarks.peers import run as peers
from benchmarks.peers.hazards import HAZARDS, outcome
from benchmarks.peers.packages import FIXED, PEERS, Clipping, parameters_of, torch_plain
from benchmarks.peers.scenes import COUNT
from benchmarks.peers.ways import PACKAGES, Way, adaptive_ways, fixed_ways

ROOT = Path(__file__).parents[2]
WAYS = {way.name: way for way in (*fixed_ways("eager"), *adaptive_ways())}


class Planted:
    """A way to clip with a fault.

    Args:
        clip: Is given the parameters of all optimizers.
    """

    def __init__(self, clip: Callable[[list[nn.Parameter]], object], kind: str = "fixed") -> None:
        self._clip = clip
        self.way = Way("planted", kind, self._make)

    def _make(self, optimizers: list[Any], scaler: Any) -> Clipping:
        parameters = parameters_of(optimizers)
        return Clipping(lambda: self._clip(parameters))


class Mean:
    """Clips to half of the mean of all norms so far, and keeps in its state dict what is asked."""

    def __init__(self, parameters: list[nn.Parameter], *, keeps: bool) -> None:
        self.parameters, self.keeps = parameters, keeps
        self.sum, self.count = 0.0, 0

    def clip(self) -> None:
        self.sum += gradclip.get_total_norm([p.grad for p in self.parameters]).item()
        self.count += 1
        gradclip.clip_grad_norm_(self.parameters, self.sum / self.count / 2)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "count": self.count} if self.keeps else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def nothing(parameters: list[nn.Parameter]) -> None:
    pass


def zero(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad.zero_()


def spoil(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad.mul_(math.nan)


def each(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        gradclip.clip_grad_norm_(parameter, 1.0)


def to_half(parameters: list[nn.Parameter]) -> None:
    gradclip.clip_grad_norm_(parameters, 0.5)


def to_one(parameters: list[nn.Parameter]) -> None:
    gradclip.clip_grad_norm_(parameters, 1.0)


def twice(parameters: list[nn.Parameter]) -> None:
    seen = {}
    for parameter in parameters:
        seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    norm = gradclip.get_total_norm([parameter.grad for parameter in parameters])
    for parameter in parameters if norm > 1 else ():
        parameter.grad.div_(norm)


def refuse(parameters: list[nn.Parameter]) -> None:
    raise ValueError(f"This | cannot be {'clipped ' * 20}. And more.\nAnd more.")


def zero_what_is_nan(parameters: list[nn.Parameter]) -> None:
    if any(parameter.grad.isnan().any() for parameter in parameters):
        zero(parameters)
    to_one(parameters)


def give_up_at_nan() -> Callable[[list[nn.Parameter]], None]:
    over = []

    def clip(parameters: list[nn.Parameter]) -> None:
        over.extend(p for p in parameters if p.grad.isnan().any())
        if not over:
            to_one(parameters)
        elif parameters[0].grad.isnan().any():
            zero(parameters)

    return clip


def every_third() -> Callable[[list[nn.Parameter]], None]:
    calls = iter(range(1 << 30))
    return lambda parameters: None if next(calls) % 3 else to_one(parameters)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def cells_of(lines: list[str], first: str) -> list[str]:
    (row,) = [line for line in lines if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_every_way_in_every_table(capsys, tmp_path):
    saved = tmp_path / "results" / "peers.md"
    case, hazard = "1e4 elements of 1e20", "one NaN"
    options = ["--sets", "small", "--seconds", "0.01", "--backend", "eager", "--save", str(saved)]
    threads = torch.get_num_threads()
    peers.main([*options, "--hard", case, "--hazards", hazard])
    printed = capsys.readouterr().out
    assert saved.read_text() in printed
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads
    lines = printed.splitlines()
    heads = [line for line in lines if re.match(r"\| (set|gradients|hazard) \|", line)]
    for name, way in WAYS.items():
        assert sum(f" {name} |" in head for head in heads) == (3 - (name == "torch"))
        for head in heads:
            below = lines[lines.index(head) + 2 :]
            rows = below[: below.index("")] if "" in below else below
            columns = [cell.strip() for cell in head.strip("|").split("|")]
            for row in rows if name in columns else ():
                cell = row.strip("|").split("|")[columns.index(name)].strip()
                assert (cell == "not installed") == (not way.installed)
    assert re.search(r"^torch \S+, .*, timm [^,]+, .*, date \d{4}-\d\d-\d\d$", printed, re.M)
    ratios = cells_of(lines, "small | clipping")
    assert all(float(cell) > 0 for cell in ratios[2:] if cell != "not installed")


def test_the_results_in_the_repository_have_all_that_is_measured():
    lines = (ROOT / "benchmarks/results/peers.md").read_text().splitlines()
    for name in WAYS:
        assert any(f" {name} |" in line for line in lines)
    for first in (*HAZARDS, *peers.HARD):
        assert sum(line.startswith(f"| {first} |") for line in lines) == 2
    for name in SETS:
        for regime in (*peers.REGIMES, "adaptive", "unit"):
            cells_of(lines, f"{name} | {regime}")


@pytest.mark.parametrize("hazard", list(HAZARDS))
def test_an_attached_clipper_is_right_in_every_hazard(hazard):
    assert outcome(WAYS["gradclip hook"], hazard).startswith("right")


@pytest.mark.slow
@pytest.mark.parametrize("hazard", list(HAZARDS))
@pytest.mark.parametrize("name", ["Percentile", "ZScore", "RelativeToWeights"])
def test_a_rule_is_right_in_every_hazard(name, hazard):
    assert outcome(WAYS[f"gradclip {name}"], hazard).startswith("right")


@pytest.mark.parametrize(
    ("hazard", "clip", "kind", "found"),
    [
        ("complex", nothing, "fixed", "not clipped"),
        ("complex", nothing, "unit", "not clipped"),
        ("complex", to_half, "unit", "norm 0.5 instead of 0.00"),
        ("complex", to_half, "fixed", "norm 0.5 instead of 1"),
        ("complex", zero, "fixed", "all gradients 0"),
        ("complex", spoil, "fixed", f"{2 * COUNT} of {2 * COUNT} elements not finite"),
        ("complex", each, "fixed", "direction changed, norm 1.73 instead of 1"),
        ("complex", refuse, "fixed", "raises ValueError: This / cannot be clipped"),
        ("sparse, indices twice", nothing, "fixed", "not clipped"),
        ("float16, norm above 65504", to_half, "fixed", "norm 0.5 instead of 1"),
        ("elements of 1e20, float32", to_half, "fixed", "norm 0.5 instead of 1"),
        ("elements of 1e20, float32", nothing, "fixed", "not clipped"),
        ("inside autocast, float16", nothing, "fixed", "not clipped"),
        ("tied parameters, given twice", twice, "fixed", "direction changed"),
        ("two optimizers", each, "fixed", "direction changed"),
        ("one NaN", nothing, "fixed", f"1 of {COUNT} parameters not finite; a later spike: not"),
        ("one inf", to_one, "fixed", f"1 of {COUNT} parameters not finite"),
        ("one NaN", zero_what_is_nan, "fixed", f"right: {COUNT} of {COUNT} gradients 0"),
        ("one NaN", give_up_at_nan(), "fixed", f"right: {COUNT} of {COUNT} gradients 0; a later"),
        ("closure, evaluated 3 times", every_third(), "fixed", "not clipped (2 of 3 evaluations)"),
        ("fused AMP", to_one, "fixed", f"norm {2.0**-10:.3g} instead of 1"),
        ("fused AMP, unscale_ before", nothing, "fixed", "not clipped"),
        ("resume", to_one, "fixed", "right, nothing to keep"),
    ],
)
def test_a_fault_is_told(hazard, clip, kind, found):
    told = outcome(Planted(clip, kind).way, hazard)
    assert told.startswith(found)
    assert len(told) < 140
    assert "|" not in told


def test_a_skipped_step_is_told():
    def make(optimizers: list[Any], scaler: Any) -> Clipping:
        clipper = gradclip.GradientClipper(optimizers[0], 1.0, nonfinite="skip")
        return Clipping(optimizers[0].step, None, clipper, lambda optimizers: optimizers)

    assert outcome(Way("skips", "fixed", make), "one NaN") == "right: no step"


@pytest.mark.parametrize(
    ("keeps", "found"),
    [
        (True, "right"),
        (False, "state dict loaded: a spike is left at 2.5 instead of 0.2"),
        (None, "no state dict: a spike is left at 2.5 instead of 0.2"),
    ],
)
def test_a_state_that_is_not_kept_is_told(keeps, found):
    def make(optimizers: list[Any], scaler: Any) -> Clipping:
        rule = Mean(parameters_of(optimizers), keeps=bool(keeps))
        return Clipping(rule.clip, state=None if keeps is None else rule)

    assert outcome(Way("mean", "adaptive", make), "resume").startswith(found)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_rule_that_learns_is_held_against_itself_on_true_gradients(scaled):
    """The mean of norms is one of scaled gradients where nothing unscales them."""

    def make(optimizers: list[Any], scaler: Any) -> Clipping:
        return Clipping(Mean(parameters_of(optimizers), keeps=True).clip)

    told = outcome(Way("mean", "adaptive", make), "fused AMP" if scaled else "two optimizers")
    assert told == ("not clipped" if scaled else "right")


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(PACKAGES, "torch", "no-such-distribution")
    way = Way("torch", "fixed", lambda optimizers, scaler: torch_plain(optimizers, 1.0, scaler))
    assert not way.installed
    assert outcome(way, "complex") == "not installed"


def test_every_package_is_pinned_and_belongs_to_a_way():
    pinned = (ROOT / "constraints.txt").read_text()
    for name, package in PACKAGES.items():
        assert name in WAYS
        assert re.search(rf"^{package}==", pinned, re.M)
    assert {*FIXED, *PEERS} <= set(WAYS)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (1.5, "5e-01"),
        (1.0, "0e+00"),
        (0.0, "norm 0"),
        (math.inf, "norm inf"),
        (math.nan, "norm nan"),
    ],
)
def test_the_error_of_a_norm(told, found):
    assert peers.error_of(told, 1.0) == found

from __future__ import annotations

import pytest
import torch

from benchmarks.cost import thresholds
from benchmarks.peers.packages import PEERS, peer


def test_the_benchmark_runs_and_prints_every_rule_and_scope(capsys):
    thresholds.main(
        ["--seconds", "0.01", "--steps", "3", "30", "--counts", "1", "7", "--sets", "small"]
    )
    printed = capsys.readouterr().out
    for rule in thresholds.RULES:
        assert f"| {rule} | 1 |" in printed
        assert f"| {rule} | 7 |" in printed
    assert "| after 3 steps | after 30 steps |" in printed
    for scope in ("global", "parameter", "unit"):
        assert f"| {scope} | bfloat16 |" in printed
    for other in PEERS:
        assert f"| {other} |" in printed
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", list(thresholds.RULES))
def test_a_repeated_history_decides_like_the_one_it_repeats(name):
    make = thresholds.RULES[name]
    one = thresholds.History(make(), 1).grown_to(120)
    three = one.repeated(3, make)
    norm = torch.tensor([1.5], dtype=torch.float64)

    def context(count: int) -> thresholds.StepContext:
        weights = torch.ones(count, dtype=torch.float64)
        return thresholds.StepContext(120, torch.ones(count, dtype=torch.bool), 2.0, weights)

    alone = one.rule.thresholds(norm, context(1))
    together = three.rule.thresholds(norm.repeat(3), context(3))
    assert together.tolist() == pytest.approx(alone.tolist() * 3, rel=1e-12)


@pytest.mark.parametrize("name", list(PEERS))
def test_a_peer_clips_or_is_not_installed(name):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    step = peer(name, [parameter])
    if step is not None:
        for _ in range(3):
            step()
        assert parameter.grad.isfinite().all()

"""Checkpoints of torch.distributed: a run that is resumed goes on as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn

from gradclip import GradientClipper, thresholds
from tests.support.dtensors import mesh_of, quick

RULES = {
    "fixed": lambda: thresholds.Fixed(1.0),
    "percentile": lambda: thresholds.Percentile(40, window=6),
    "z-score": lambda: thresholds.ZScore(0.5, warmup=2),
    "median": lambda: thresholds.MedianDeviation(0.5, window=6, warmup=2),
}
SAVED, END = 4, 9


def exchange(way: str, load: bool, folder: str, net: Any, optimizer: Any, clipper: Any) -> None:
    """Save everything or load it, the clipper itself or its state."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, momenta = get_state_dict(net, optimizer)
    state = {"net": weights, "optimizer": momenta, "clipper": clipper}
    if way == "state":
        state["clipper"] = clipper.state_dict()
    if not load:
        checkpoint.save(state, checkpoint_id=folder)
        return
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(
        net, optimizer, model_state_dict=state["net"], optim_state_dict=state["optimizer"]
    )
    if way == "state":
        clipper.load_state_dict(state["clipper"])


def trained(rule: str, scope: str, way: str, folder: str, steps: tuple[int, int]) -> Any:
    """Train from one step to another, from a checkpoint or into one where it is not the end."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(steps[0])
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    fully_shard(net, mesh=mesh_of("one"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.5)
    clipper = GradientClipper(optimizer, RULES[rule](), scope=scope, model=net)
    if steps[0] > 0:
        exchange(way, True, folder, net, optimizer, clipper)
    size = 8 // distributed.get_world_size()
    own = slice(size * distributed.get_rank(), size * (distributed.get_rank() + 1))
    found = []
    for step in range(*steps):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        spike = step if step % 3 == 1 else 0
        (net(batch[own]) - 1 - spike).square().mean().backward()
        optimizer.step()
        record = clipper.last
        found.append((record.step, record.norms.tolist(), record.thresholds.tolist()))
    if steps[1] < END:
        exchange(way, False, folder, net, optimizer, clipper)
    clipper.close()
    weights = [parameter.full_tensor().detach() for parameter in net.parameters()]
    return found, weights, clipper.state_dict()


def check_resumed(savers: Any, loaders: Any, folder: str, case: tuple[str, str, str]) -> None:
    uninterrupted = loaders.run(trained, *case, folder, (0, END))
    savers.run(trained, *case, folder, (0, SAVED))
    resumed = loaders.run(trained, *case, folder, (SAVED, END))
    rounding = 0 if savers is loaders else 1e-5
    for (whole, weights, state), (rest, own_weights, own_state) in zip(
        uninterrupted, resumed, strict=True
    ):
        for (step, norms, limits), found in zip(whole[SAVED:], rest, strict=True):
            assert found[0] == step
            assert found[1] == pytest.approx(norms, rel=rounding, abs=0)
            assert found[2] == pytest.approx(limits, rel=rounding, abs=0)
        for one, other in zip(own_weights, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)
        assert own_state["steps"] == END
        assert own_state["counters"] == state["counters"]
        assert 0 < own_state["counters"]["clipped"] < own_state["counters"]["finite"]
        for name, learned in state["threshold"].items():
            if isinstance(learned, torch.Tensor):
                torch.testing.assert_close(
                    own_state["threshold"][name], learned, rtol=rounding, atol=0
                )


@pytest.mark.parametrize("way", ["clipper", "state"])
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("rule", quick(RULES, "percentile"))
def test_a_run_is_resumed_from_a_checkpoint(two_ranks, tmp_path, rule, scope, way):
    check_resumed(two_ranks, two_ranks, str(tmp_path), (rule, scope, way))


@pytest.mark.parametrize("way", ["clipper", "state"])
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_a_run_of_four_ranks_is_resumed_with_two(two_ranks, four_ranks, tmp_path, rule, scope, way):
    check_resumed(four_ranks, two_ranks, str(tmp_path), (rule, scope, way))

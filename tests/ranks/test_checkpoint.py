"""Checkpoints of torch.distributed: a resumed run continues exactly."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import distributed

from gradclip import GradientClipper
from tests.ranks.test_training import Net, spread_module
from tests.support.dtensors import quick
from tests.support.rules import RULES

CHOSEN = ("Percentile", "ZScore", "MedianDeviation")
CASES = [*product(("two_ranks", "four_ranks"), CHOSEN)]
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


def trained_between(rule: str, scope: str, way: str, folder: str, steps: tuple[int, int]) -> Any:
    """Train from one step to another, from a checkpoint or into one where it is not the end."""
    torch.manual_seed(steps[0])
    net = spread_module(Net(), "fsdp2")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.5)
    clipper = GradientClipper(optimizer, RULES[rule](), scope=scope, model=net)
    if steps[0] > 0:
        exchange(way, True, folder, net, optimizer, clipper)
    own = torch.arange(8).chunk(distributed.get_world_size())[distributed.get_rank()]
    records = []
    for step in range(*steps):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        spike = step if step % 3 == 1 else 0
        (net(batch[own], batch) - 1 - spike).square().mean().backward()
        optimizer.step()
        record = clipper.last
        records.append((record.step, record.norms.tolist(), record.thresholds.tolist()))
    if steps[1] < END:
        exchange(way, False, folder, net, optimizer, clipper)
    clipper.close()
    weights = [parameter.full_tensor().detach() for parameter in net.parameters()]
    state = clipper.state_dict()
    learned = [each for each in state["threshold"].values() if isinstance(each, torch.Tensor)]
    return records, weights, state["steps"], state["counters"], learned


@pytest.mark.parametrize("way", ["clipper", "state"])
@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize(("savers", "rule"), quick(CASES, CASES[0]))
def test_resumed_runs(two_ranks, request, tmp_path, savers, rule, scope, way):
    """Decisions, weights and states are the same bits; of four ranks they are close on two."""
    case, folder = (rule, scope, way), str(tmp_path)
    uninterrupted = two_ranks.run(trained_between, *case, folder, (0, END))
    request.getfixturevalue(savers).run(trained_between, *case, folder, (0, SAVED))
    resumed = two_ranks.run(trained_between, *case, folder, (SAVED, END))
    rounding = 0 if savers == "two_ranks" else 1e-5
    same = {"rtol": rounding, "atol": rounding}
    for (records, *needed), (own_records, *own) in zip(uninterrupted, resumed, strict=True):
        torch.testing.assert_close(own_records, records[SAVED:], **same)
        torch.testing.assert_close(own, needed, **same)
        _, steps, counters, _ = own
        assert steps == END
        assert 0 < counters["clipped"] < counters["finite"]

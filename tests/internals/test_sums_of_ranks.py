"""The sums of what all ranks hold, in one collective of few numbers or of many."""

import math
from contextlib import closing

import pytest
import torch
from torch import distributed

from gradclip.ranks.groups import FEW, RankGroup
from tests.support.dtensors import recorded
from tests.support.processes import Pool, on_ranks

RANKS = 4


@pytest.fixture(scope="module")
def four_ranks():
    with closing(Pool(RANKS)) as pool:
        yield pool


@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("special", [0.0, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("count", [1, RANKS, RANKS + 1, FEW // RANKS, FEW])
@on_ranks("four_ranks")
def test_all_ranks_get_the_same_sums_in_one_collective(count, special, order):
    """A special number of one rank, zero, infinity or NaN, is in its sum."""
    held = torch.rand(RANKS, count, generator=torch.manual_seed(0), dtype=torch.float64)
    held[2, -1] = special
    world = distributed.distributed_c10d._get_default_group()
    group = RankGroup(tuple(range(RANKS)), (world,), ("cpu",))
    with recorded() as calls:
        total = group.reduced_(held[distributed.get_rank()].clone(), order)
    assert calls == ["sum"]
    needed = held.amax(0) if order == math.inf else held.sum(0)
    torch.testing.assert_close(total, needed, rtol=1e-15, atol=0.0, equal_nan=True)
    totals = [torch.empty_like(total) for _ in range(RANKS)]
    distributed.all_gather(totals, total)
    assert {each.numpy().tobytes() for each in totals} == {totals[0].numpy().tobytes()}

"""What of a DTensor is on each rank, told without other ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor, distributed

from gradclip.ranks.shards import shard_of


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


def part(rows: Tensor, count: int, place: int) -> Tensor:
    """Return what `torch.chunk` gives the rank at a place."""
    parts = rows.chunk(count)
    return parts[place] if len(rows) and place < len(parts) else rows[:0]


def rows_by_rank(data: int, tensor: int, height: int) -> list[tuple[list[int], list[int]]]:
    """Shard by tensor parallel first and by FSDP2 then; return the rows found and those there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    found = []
    for rank in range(data * tensor):
        distributed.init_process_group(
            "fake", store=FakeStore(), rank=rank, world_size=data * tensor
        )
        mesh = init_device_mesh("cpu", (data, tensor))
        first, second = mesh.get_coordinate()
        rows = part(part(torch.arange(height), tensor, second), data, first)
        placements = [_StridedShard(0, split_factor=tensor), Shard(0)]
        local = rows.float().unsqueeze(1)
        shape = {"shape": (height, 1), "stride": (1, 1)}
        spread = DTensor.from_local(local, mesh, placements, run_check=False, **shape)
        found.append((shard_of(spread).rows.tolist(), rows.tolist()))
        distributed.destroy_process_group()
    return found


@pytest.mark.parametrize(
    ("data", "tensor", "height"), [(2, 2, 5), (3, 2, 7), (4, 2, 9), (4, 4, 19), (2, 4, 3)]
)
def test_the_rows_of_fsdp2_on_tensor_parallel_are_those_that_are_there(
    process, data, tensor, height
):
    for found, there in process.submit(rows_by_rank, data, tensor, height).result(60):
        assert found == there

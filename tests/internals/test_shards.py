"""The shard of a DTensor on each rank, and the process group that its rank group has."""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from gradclip import get_total_norm
from gradclip.ranks.shards import groups_of, shard_of
from tests.support.processes import CONTEXT


def elsewhere(function: Any, *arguments: Any) -> None:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, CONTEXT) as pool:
        pool.submit(function, *arguments).result(60)


def part(rows: Tensor, count: int, place: int) -> Tensor:
    """Return what `torch.chunk` gives the rank at a place."""
    parts = rows.chunk(count)
    return parts[place] if len(rows) and place < len(parts) else rows[:0]


def check_rows(data: int, tensor: int, height: int) -> None:
    """Shard by tensor parallelism, then by FSDP2; compare the rows of shards with the true ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank in range(count := data * tensor):
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
        mesh = init_device_mesh("cpu", (data, tensor))
        first, second = mesh.get_coordinate()
        rows = part(part(torch.arange(height), tensor, second), data, first)
        placements = [_StridedShard(0, split_factor=tensor), Shard(0)]
        local = rows.float().unsqueeze(1)
        shape = {"shape": (height, 1), "stride": (1, 1)}
        spread = DTensor.from_local(local, mesh, placements, run_check=False, **shape)
        assert shard_of(spread).rows.tolist() == rows.tolist()
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("data", "tensor", "height"), [(2, 2, 5), (3, 2, 7), (4, 2, 9), (4, 4, 19), (2, 4, 3)]
)
def test_rows_of_fsdp2_on_tensor_parallelism(data, tensor, height):
    """The rows of a shard are those that its local tensor has."""
    elsewhere(check_rows, data, tensor, height)


def begin_again() -> None:
    """Leave the group, join another one, and clip on a mesh that is equal to the one before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            place = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
            distributed.init_process_group("gloo", **place)
            mesh = init_device_mesh("cpu", (1,))
            gradient = distribute_tensor(torch.tensor([3.0, 4.0]), mesh)
            [group] = groups_of([gradient])
            assert get_total_norm([gradient]).item() == 5.0
            assert group.process_groups == (mesh.get_group(),)
            distributed.destroy_process_group()


def test_a_group_that_is_joined_after_another_one():
    """A group that was left and made again is not confused with the earlier one."""
    elsewhere(begin_again)

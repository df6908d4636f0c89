from __future__ import annotations

import pytest
import torch

from gradclip.engines.memory import exclusive, flat, is_plain, overlaps

SHARING = {
    "expanded": lambda: torch.arange(3.0).view(3, 1).expand(3, 4),
    "expanded 0-d": lambda: torch.tensor(1.0).expand(5),
    "windows": lambda: torch.arange(20.0).as_strided((4, 6), (3, 1), 2),
    "windows with gaps": lambda: torch.arange(40.0).as_strided((3, 4), (4, 2), 5),
    "expanded windows": lambda: torch.arange(20.0).as_strided((2, 4, 6), (0, 3, 1)),
}
SEPARATE = {
    "contiguous": lambda: torch.arange(6.0).view(2, 3),
    "0-d": lambda: torch.tensor(1.0),
    "empty": lambda: torch.empty(3, 0),
    "empty expanded": lambda: torch.empty(1, 0).expand(4, 0),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "sliced": lambda: torch.arange(24.0).view(4, 6)[1:3, ::2],
    "channels last": lambda: (
        torch.arange(48.0).view(2, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    ),
    "single expanded": lambda: torch.tensor([1.0]).expand(1, 1),
}


@pytest.mark.parametrize("kind", SHARING)
def test_elements_that_share_a_place_are_found(kind):
    assert overlaps(SHARING[kind]())


@pytest.mark.parametrize("kind", SEPARATE)
def test_elements_with_places_of_their_own_raise_no_alarm(kind):
    tensor = SEPARATE[kind]()
    assert not overlaps(tensor)
    assert is_plain(tensor)
    with exclusive(tensor) as memory:
        assert memory is tensor


@pytest.mark.parametrize("kind", SHARING)
def test_each_place_is_given_once_and_written_back(kind):
    tensor = SHARING[kind]()
    before = torch.empty(0).set_(tensor.untyped_storage()).clone()
    needed = tensor + 100
    with exclusive(tensor) as memory:
        assert memory.numel() == tensor.unique().numel()
        memory += 100
    assert torch.equal(tensor, needed)
    after = torch.empty(0).set_(tensor.untyped_storage())
    assert int((after != before).sum()) == tensor.unique().numel()


@pytest.mark.parametrize("kind", SEPARATE | SHARING)
def test_flat_holds_all_elements_contiguously(kind):
    tensor = (SEPARATE | SHARING)[kind]()
    found = flat(tensor)
    assert found.shape == (tensor.numel(),)
    assert found.is_contiguous()
    assert torch.equal(found.sort().values, tensor.flatten().sort().values)


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "channels last"])
def test_dense_tensors_are_flattened_without_a_copy(kind):
    tensor = SEPARATE[kind]()
    assert flat(tensor).data_ptr() == tensor.data_ptr()

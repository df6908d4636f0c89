from __future__ import annotations

import pytest
import torch

from gradclip.engines.no_grad import no_grad


@pytest.mark.parametrize("before", [True, False])
def test_tracking_is_off_inside_and_as_it_was_afterwards(before):
    with torch.set_grad_enabled(before):
        assert no_grad(torch.is_grad_enabled)() is False
        assert torch.is_grad_enabled() is before


def test_tracking_is_as_it_was_after_an_exception():
    @no_grad
    def fail() -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011  # nothing else raises it
        fail()
    assert torch.is_grad_enabled()


def test_what_is_written_has_no_history():
    leaf = torch.ones(2, requires_grad=True)
    product = leaf * 3
    no_grad(product.mul_)(2)
    product.sum().backward()
    assert leaf.grad.tolist() == [3.0, 3.0]

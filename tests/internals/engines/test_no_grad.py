"""Gradient tracking is off during a call and as before afterwards."""

from __future__ import annotations

import pytest
import torch

from gradclip.engines.no_grad import no_grad


@pytest.mark.parametrize("before", [True, False])
def test_tracking_is_off_inside_and_as_before_afterwards(before):
    @no_grad
    def fail() -> None:
        raise OSError(torch.is_grad_enabled())

    with torch.set_grad_enabled(before):
        assert no_grad(torch.is_grad_enabled)() is False
        assert torch.is_grad_enabled() is before
        with pytest.raises(OSError, match="False"):
            fail()
        assert torch.is_grad_enabled() is before

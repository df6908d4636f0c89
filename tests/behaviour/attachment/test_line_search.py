"""LBFGS whose gradients are clipped: a warning where it has no line search."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from gradclip import GradientClipper


def minimized(max_norm: float | None, *, search: str | None, **options: str) -> None:
    weight = nn.Parameter(torch.full((3,), 5.0))
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=4, line_search_fn=search)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        return loss

    GradientClipper(optimizer, max_norm, **options)
    for _ in range(3):
        optimizer.step(closure)


def test_clipping_without_a_line_search_is_warned_of_once():
    with pytest.warns(UserWarning, match="line_search_fn='strong_wolfe'") as caught:
        minimized(1.0, search=None)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("max_norm", "options"),
    [
        (1.0, {"search": "strong_wolfe"}),
        (1e9, {"search": None}),
        (None, {"search": None}),
        (1.0, {"search": None, "exceed": "observe"}),
    ],
)
def test_what_is_right_is_not_warned_of(max_norm, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimized(max_norm, **options)

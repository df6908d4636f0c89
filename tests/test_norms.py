from __future__ import annotations

import math

import pytest
import torch

from gradclip.gradients import buckets_of
from gradclip.norms import norms_of
from gradclip.places import Place


@pytest.mark.parametrize("engine", ["reference", "operators"])
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
def test_each_label_has_the_norm_of_its_gradients(engine, order):
    kinds = [torch.float32, torch.float64, torch.float32, torch.bfloat16]
    gradients = [torch.randn(50).to(kind) for kind in kinds]
    labels = [2, 0, 0, 2]
    buckets = buckets_of(gradients, order, [Place(torch.tensor([label])) for label in labels])
    found = norms_of(buckets, order, count=3, engine=engine)
    for label in range(3):
        mine = [g.double() for g, of in zip(gradients, labels, strict=True) if of == label]
        needed = torch.linalg.vector_norm(torch.cat(mine), order).item() if mine else 0.0
        assert found[label].item() == pytest.approx(needed, rel=1e-7)


@pytest.mark.parametrize("count", [1, 2])
def test_without_gradients_every_norm_is_zero(count):
    assert norms_of([], 2.0, count=count).tolist() == [0.0] * count


@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_leaves_the_others(order, bad):
    gradients = [torch.tensor([1.0, bad]), torch.tensor([2.0])]
    places = [Place(torch.tensor([label])) for label in (0, 1)]
    found = norms_of(buckets_of(gradients, order, places), order, count=2)
    assert not math.isfinite(found[0].item())
    assert found[1].item() == 2.0


def test_norms_are_float64_on_the_device_asked_for():
    buckets = buckets_of([torch.ones(3)], 2.0)
    assert norms_of(buckets, 2.0).dtype == torch.float64
    assert norms_of(buckets, 2.0, device=torch.device("meta")).device.type == "meta"

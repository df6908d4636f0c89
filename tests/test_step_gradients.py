from __future__ import annotations

import math

import pytest
import torch

from gradclip import GradientError
from gradclip.gradients.policies import Settings
from gradclip.gradients.step import StepGradients
from gradclip.scopes.norm_indices import NormIndices

CPU = torch.device("cpu")


def gradients(*tensors: torch.Tensor, labels=None, count=1, scale=None, **settings):
    scale = None if scale is None else torch.tensor(scale)
    norm_indices = (
        None if labels is None else [NormIndices(torch.tensor([label])) for label in labels]
    )
    return StepGradients(list(tensors), norm_indices, Settings(**settings), count, CPU, scale=scale)


def test_norms_are_true_whatever_the_scale():
    found = gradients(torch.tensor([3.0, 4.0]) * 1024, scale=1024.0)
    assert found.norms().tolist() == [5.0]
    assert found.norms().dtype == torch.float64


def test_each_label_has_its_norm_and_its_coefficient():
    tensors = [torch.tensor([3.0]), torch.tensor([5.0]), torch.tensor([4.0])]
    found = gradients(*tensors, labels=[2, 0, 2], count=3)
    assert found.norms().tolist() == [5.0, 0.0, 5.0]
    assert found.present().tolist() == [True, False, True]
    found.scale_(torch.tensor([0.5, 0.0, 0.1], dtype=torch.float64))
    assert [tensor.item() for tensor in tensors] == pytest.approx([0.3, 2.5, 0.4])


def test_without_gradients_nothing_is_present():
    found = gradients()
    assert found.present().tolist() == [False]
    assert found.norms().tolist() == [0.0]


@pytest.mark.parametrize("scale", [None, 8.0])
def test_elements_are_bounded_in_the_scale_of_the_gradients(scale):
    tensor = torch.tensor([3.0, 0.5]) * (scale or 1)
    found = gradients(tensor, scale=scale, max_value=1.0)
    norms = found.norms()
    assert found.norms_if_bounded(norms).tolist() == pytest.approx([1.25**0.5])
    assert tensor.tolist() == [3.0 * (scale or 1), 0.5 * (scale or 1)]
    assert found.bound_(norms, False).tolist() == pytest.approx([1.25**0.5])
    assert tensor.tolist() == [scale or 1, 0.5 * (scale or 1)]


@pytest.mark.parametrize("untouched", [True, torch.tensor(True)])
def test_what_must_not_be_touched_is_not(untouched):
    tensor = torch.tensor([3.0, 0.5])
    found = gradients(tensor, max_value=1.0)
    norms = found.norms()
    assert found.bound_(norms, untouched).tolist() == norms.tolist()
    assert tensor.tolist() == [3.0, 0.5]


def test_where_a_norm_is_not_finite_nothing_is_bounded():
    tensors = [torch.tensor([3.0, math.nan]), torch.tensor([5.0])]
    found = gradients(*tensors, labels=[0, 1], count=2, max_value=1.0)
    found.bound_(found.norms(), False)
    assert tensors[0][0].item() == 3.0
    assert tensors[1].item() == 1.0


def test_observing_never_bounds_in_place():
    tensor = torch.tensor([3.0])
    found = gradients(tensor, max_value=1.0, exceed="observe")
    assert found.bound_(found.norms(), False).tolist() == [1.0]
    assert tensor.item() == 3.0


def test_complex_gradients_cannot_be_bounded():
    with pytest.raises(GradientError, match="complex elements cannot be bounded"):
        gradients(torch.ones(1, dtype=torch.complex64), max_value=1.0)

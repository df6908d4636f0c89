"""Gradients in buckets: what is measured, what is written, and each once."""

from __future__ import annotations

import math

import pytest
import torch

from gradclip.gradients.buckets import buckets_of, copies_of
from gradclip.scopes.norm_indices import NormIndices


def test_each_dtype_has_a_bucket_of_the_gradients_themselves():
    """In the order of their first gradients; a subclass of Tensor is no dtype of its own."""

    class Named(torch.Tensor):
        pass

    gradients = [
        torch.ones(2),
        torch.ones(3, dtype=torch.float64),
        torch.ones(4).as_subclass(Named),
    ]
    buckets = buckets_of(gradients, 2.0)
    assert [[t.numel() for t in bucket.written] for bucket in buckets] == [[2, 4], [3]]
    assert buckets[0].measured[0] is buckets[0].written[0] is gradients[0]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("conjugate", [False, True])
def test_complex_gradients_become_real_in_the_same_memory(dtype, order, conjugate):
    base = torch.randn(3, 4, dtype=dtype)
    [bucket] = buckets_of([base.conj() if conjugate else base], order)
    [measured], [written] = bucket.measured, bucket.written
    assert written.is_floating_point()
    assert written.data_ptr() == base.data_ptr()
    norm = torch.linalg.vector_norm(measured.double(), order)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(base.abs().double(), order))
    needed = base * 0.5
    written.mul_(0.5)
    assert torch.equal(base, needed)


def test_the_modulus_of_a_large_complex_element_is_finite():
    [bucket] = buckets_of([torch.tensor([3e38 + 3e38j])], math.inf)
    assert bucket.measured[0].item() == pytest.approx(3e38 * math.sqrt(2))


def test_copies_leave_the_gradients_alone():
    gradient, indices = torch.tensor([-3.0, math.inf]), NormIndices(torch.tensor([3]))
    [bucket] = copies_of(buckets_of([gradient], 2.0, [indices]))
    bucket.written[0].zero_()
    assert (bucket.norm_indices, bucket.measured[0].tolist()) == ([indices], [0.0, 0.0])
    assert gradient.tolist() == [-3.0, math.inf]

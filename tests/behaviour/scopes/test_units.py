"""Units of every kind of gradient: each index of dimension 0 has a norm of its own."""

import math

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, GradientError
from tests.support.clippers import sgd, stepped

engines = pytest.mark.parametrize("engine", ["reference", "operators"])


@engines
@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("max_value", [None, 4.0])
def test_rows_of_sparse_gradients_are_units(engine, coalesced, max_value):
    """An index that comes twice counts as the sum of its values."""
    table = nn.Parameter(torch.ones(5, 2))
    values = torch.tensor([[1.0, 1.0], [0.3, 0.4], [2.0, 3.0]])
    table.grad = torch.sparse_coo_tensor(torch.tensor([[3, 0, 3]]), values, (5, 2))
    if coalesced:
        table.grad = table.grad.coalesce()
    clipper = stepped(
        torch.optim.SGD([table], lr=0.0), 1.0, scope="unit", max_value=max_value, engine=engine
    )
    assert clipper.last.norm.tolist() == pytest.approx([0.5, 0.0, 0.0, 5.0, 0.0])
    dense = table.grad.to_dense()
    assert dense[[0, 3]].flatten().tolist() == pytest.approx([0.3, 0.4, 0.6, 0.8])
    assert dense[[1, 2, 4]].count_nonzero() == 0
    assert table.grad._nnz() == (2 if coalesced or max_value else 3)


@engines
def test_rows_of_complex_gradients_are_units(engine):
    """Of real and imaginary parts together."""
    gradient = torch.tensor([[3 + 4j, 0], [0.3j, 0.4]])
    clipper = stepped(sgd(gradient), 1.0, scope="unit", engine=engine)
    assert clipper.last.norm.tolist() == pytest.approx([5.0, 0.5])
    torch.testing.assert_close(gradient, torch.tensor([[0.6 + 0.8j, 0], [0.3j, 0.4]]))


@pytest.mark.parametrize("scope", ["unit", lambda name, parameter: range(4)])
def test_rows_that_share_memory_are_refused(scope):
    """As one norm the gradient can be clipped."""
    weight, shared = torch.full((4, 3), 9.0), torch.full((3,), 9.0).expand(4, 3)
    optimizer = sgd(weight, shared)
    with (
        GradientClipper(optimizer, 1.0, scope=scope),
        pytest.raises(GradientError, match=r"strides \(0, 1\).*share memory.*make it contiguous"),
    ):
        optimizer.step()
    assert bool(((weight == 9) & (shared == 9)).all())
    stepped(optimizer, 1.0, scope="parameter")
    assert shared.norm().item() == pytest.approx(1.0)


def test_tensors_without_rows_or_elements_are_units_too():
    """Of norm 0, or of the norm of all their elements."""
    tensors = [torch.full(shape, 2.0) for shape in ((0, 3), (3, 0), (0,), (), (2, 2))]
    clipper = stepped(sgd(*tensors), 1.0, scope="unit")
    assert clipper.last.norm.tolist() == pytest.approx([0, 0, 0, 0, 2, 8**0.5, 8**0.5])
    assert tensors[-1].norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_tied_gradients_belong_to_the_first_parameter():
    """They count and are scaled once."""
    shared = torch.tensor([3.0, 4.0])
    clipper = stepped(sgd(shared, shared), 1.0, scope="parameter")
    assert clipper.last.norm.tolist() == [5.0, 0.0]
    assert shared.tolist() == pytest.approx([0.6, 0.8])


@engines
@pytest.mark.parametrize("policy", ["zero", "skip", "propagate"])
def test_a_row_that_is_not_finite_concerns_its_own_norm(policy, engine):
    """The others are bounded and scaled as ever, unless the step is skipped."""
    gradient = torch.tensor([[3.0, 4.0], [math.nan, 4.0], [0.3, 0.4]])
    optimizer = sgd(gradient)
    clipper = stepped(optimizer, 1.0, scope="unit", nonfinite=policy, max_value=3.5, engine=engine)
    first = [3.0, 4.0] if policy == "skip" else [0.6508, 0.7593]  # bounded to [3, 3.5] first
    assert gradient[0].tolist() == pytest.approx(first, rel=1e-3)
    assert gradient[1].nan_to_num(7.0).tolist() == ([0, 0] if policy == "zero" else [7, 4])
    assert gradient[2].tolist() == pytest.approx([0.3, 0.4])
    assert clipper.skipped == (policy == "skip")
    assert clipper.last.nonfinite.tolist() == [False, True, False]


@pytest.mark.parametrize("scope", ["group", "parameter", "unit", lambda name, p: range(len(p))])
def test_nothing_is_read_on_the_host(scope):
    """Tensors of the device "meta" have no values: reading one raises."""
    with torch.device("meta"):
        optimizer = sgd(torch.ones(4, 3), torch.ones(4))
    clipper = stepped(optimizer, 1.0, scope=scope, max_value=0.5)
    assert clipper.last.norm.device.type == "meta"
    clipper._recorder._buffer._waiting.clear()  # what has no data cannot be counted at the end

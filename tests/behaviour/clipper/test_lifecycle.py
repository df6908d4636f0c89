"""The life of a clipper: its state, its copies and its end."""

import copy
import gc
import pickle
import weakref

import pytest

from gradclip import AttachError, GradientClipper
from tests.support.clippers import sgd, weights_of
from tests.support.reference import gradient_norm


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_clipper_is_refused(copier):
    with pytest.raises(AttachError, match="cannot be copied or pickled"):
        copier(GradientClipper(sgd([1.0]), 1.0))


def test_a_clipper_lives_as_long_as_its_optimizer():
    """Although nobody else holds it."""
    optimizer = sgd([3.0, 4.0])
    reference = weakref.ref(GradientClipper(optimizer, 1.0))
    gc.collect()
    optimizer.step()
    assert gradient_norm(weights_of(optimizer)) == pytest.approx(1.0, rel=1e-6)
    del optimizer
    gc.collect()
    assert reference() is None

"""The life of a clipper: its state, its copies and its end."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch

from gradclip import AttachError, GradientClipper
from tests.support.clippers import sgd, weights_of
from tests.support.reference import gradient_norm


def test_a_state_resumes_a_run(tmp_path):
    """It loads with ``weights_only=True``; counters and index go on."""
    optimizer = sgd([3.0, 4.0])
    with GradientClipper(optimizer, 1.0) as clipper:
        for value in (3.0, 0.1, math.nan):
            weights_of(optimizer)[0].grad = torch.tensor([value, 0.0])
            optimizer.step()
        torch.save(clipper.state_dict(), tmp_path / "clipper.pt")
    resumed = GradientClipper(optimizer, 1.0)
    resumed.load_state_dict(torch.load(tmp_path / "clipper.pt", weights_only=True))
    assert (resumed.steps, resumed.clip_rate()) == (3, 0.5)
    weights_of(optimizer)[0].grad = torch.tensor([3.0, 0.0])
    optimizer.step()
    assert resumed.last.step == 3
    assert resumed.clip_rate() == pytest.approx(2 / 3)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_clipper_is_refused(copier):
    with pytest.raises(AttachError, match="cannot be copied or pickled"):
        copier(GradientClipper(sgd([1.0]), 1.0))


@pytest.mark.parametrize("end", ["detach", "close", "exception"])
def test_the_end_leaves_no_hook(end):
    """A second end does nothing, and another clipper can be attached."""
    clipper = GradientClipper(optimizer := sgd([3.0, 4.0]), 1.0)
    if end == "exception":
        with pytest.raises(KeyError), clipper:
            raise KeyError
    for _ in range(2):
        clipper.close() if end == "close" else clipper.detach()
    optimizer.step()
    assert weights_of(optimizer)[0].grad.tolist() == [3.0, 4.0]
    assert clipper.steps == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    GradientClipper(optimizer, 1.0)


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

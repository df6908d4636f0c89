from __future__ import annotations

import torch
from torch import nn

from gradclip import ClipRecord
from gradclip.optimizers.clipped_already import ClippedGradients

ONE, OTHER = (torch.optim.SGD([nn.Parameter(torch.ones(1))]) for _ in range(2))


def record() -> ClipRecord:
    return ClipRecord(0, 0.0, torch.ones(1), torch.ones(1), torch.ones(1))


def test_a_gradient_is_covered_until_it_is_written():
    gradient, newest = torch.ones(3), record()
    clipped_gradients = ClippedGradients()
    assert not clipped_gradients.knows(gradient)
    assert clipped_gradients.record_for(ONE, gradient) is None
    gradient.mul_(2)
    clipped_gradients.add([gradient], newest)
    assert clipped_gradients.knows(gradient)
    assert clipped_gradients.record_for(ONE, gradient) is newest
    gradient.add_(1)
    assert not clipped_gradients.knows(gradient)
    assert clipped_gradients.record_for(ONE, gradient) is None


def test_the_newest_record_counts():
    gradient, older, newer = torch.ones(3), record(), record()
    clipped_gradients = ClippedGradients()
    for each in (older, newer):
        clipped_gradients.add([gradient], each)
    assert clipped_gradients.record_for(ONE, gradient) is newer


def test_who_has_stepped_is_no_longer_covered_but_what_it_holds_is_known():
    gradient, newest = torch.ones(3), record()
    clipped_gradients = ClippedGradients()
    clipped_gradients.add([gradient], newest)
    gradient.div_(2)  # as a fused optimizer unscales
    clipped_gradients.mark_stepped(ONE, [gradient])
    assert clipped_gradients.knows(gradient)
    assert clipped_gradients.record_for(ONE, gradient) is None
    assert clipped_gradients.record_for(OTHER, gradient) is newest
    clipped_gradients.add([gradient], newest)
    assert clipped_gradients.record_for(ONE, gradient) is newest


def test_a_step_covers_nothing_that_was_not_clipped():
    gradient, clipped_gradients = torch.ones(3), ClippedGradients()
    clipped_gradients.mark_stepped(ONE, [gradient])
    assert not clipped_gradients.knows(gradient)


def test_another_tensor_at_the_same_place_is_not_covered():
    clipped_gradients, newest = ClippedGradients(), record()
    for _ in range(100):
        gradient = torch.ones(3)
        assert not clipped_gradients.knows(gradient)
        clipped_gradients.add([gradient], newest)
        del gradient  # its id is free again


def test_what_is_gone_is_forgotten():
    clipped_gradients, newest = ClippedGradients(), record()
    for _ in range(50):
        clipped_gradients.add([torch.ones(3)], newest)
    assert len(clipped_gradients._clippings) == 1


def test_tensors_of_inference_mode_which_keep_no_version_are_never_covered():
    with torch.inference_mode():
        gradient = torch.ones(3)
    clipped_gradients = ClippedGradients()
    clipped_gradients.add([gradient], record())
    assert not clipped_gradients.knows(gradient)
    assert clipped_gradients.record_for(ONE, gradient) is None

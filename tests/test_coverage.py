from __future__ import annotations

import torch
from torch import nn

from gradclip import ClipRecord
from gradclip.optimizers.clipped_already import Coverage

ONE, OTHER = (torch.optim.SGD([nn.Parameter(torch.ones(1))]) for _ in range(2))


def record() -> ClipRecord:
    return ClipRecord(0, 0.0, torch.ones(1), torch.ones(1), torch.ones(1))


def test_a_gradient_is_covered_until_it_is_written():
    gradient, newest = torch.ones(3), record()
    coverage = Coverage()
    assert not coverage.knows(gradient)
    assert coverage.record_for(ONE, gradient) is None
    gradient.mul_(2)
    coverage.clipped([gradient], newest)
    assert coverage.knows(gradient)
    assert coverage.record_for(ONE, gradient) is newest
    gradient.add_(1)
    assert not coverage.knows(gradient)
    assert coverage.record_for(ONE, gradient) is None


def test_the_newest_record_counts():
    gradient, older, newer = torch.ones(3), record(), record()
    coverage = Coverage()
    for each in (older, newer):
        coverage.clipped([gradient], each)
    assert coverage.record_for(ONE, gradient) is newer


def test_who_has_stepped_is_no_longer_covered_but_what_it_holds_is_known():
    gradient, newest = torch.ones(3), record()
    coverage = Coverage()
    coverage.clipped([gradient], newest)
    gradient.div_(2)  # as a fused optimizer unscales
    coverage.stepped(ONE, [gradient])
    assert coverage.knows(gradient)
    assert coverage.record_for(ONE, gradient) is None
    assert coverage.record_for(OTHER, gradient) is newest
    coverage.clipped([gradient], newest)
    assert coverage.record_for(ONE, gradient) is newest


def test_a_step_covers_nothing_that_was_not_clipped():
    gradient, coverage = torch.ones(3), Coverage()
    coverage.stepped(ONE, [gradient])
    assert not coverage.knows(gradient)


def test_another_tensor_at_the_same_place_is_not_covered():
    coverage, newest = Coverage(), record()
    for _ in range(100):
        gradient = torch.ones(3)
        assert not coverage.knows(gradient)
        coverage.clipped([gradient], newest)
        del gradient  # its id is free again


def test_what_is_gone_is_forgotten():
    coverage, newest = Coverage(), record()
    for _ in range(50):
        coverage.clipped([torch.ones(3)], newest)
    assert len(coverage._covered) == 1


def test_tensors_of_inference_mode_which_keep_no_version_are_never_covered():
    with torch.inference_mode():
        gradient = torch.ones(3)
    coverage = Coverage()
    coverage.clipped([gradient], record())
    assert not coverage.knows(gradient)
    assert coverage.record_for(ONE, gradient) is None

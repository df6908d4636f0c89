from __future__ import annotations

import torch

from gradclip import ClipRecord
from gradclip.coverage import Coverage


def record() -> ClipRecord:
    return ClipRecord(0, 0.0, torch.ones(1), torch.ones(1), torch.ones(1))


def test_a_gradient_is_covered_until_it_is_written():
    gradient, newest = torch.ones(3), record()
    coverage = Coverage()
    assert coverage.record_of(gradient) is None
    gradient.mul_(2)
    coverage.add([gradient], newest)
    assert coverage.record_of(gradient) is newest
    gradient.add_(1)
    assert coverage.record_of(gradient) is None


def test_the_newest_record_counts():
    gradient, older, newer = torch.ones(3), record(), record()
    coverage = Coverage()
    for each in (older, newer):
        coverage.add([gradient], each)
    assert coverage.record_of(gradient) is newer


def test_another_tensor_at_the_same_place_is_not_covered():
    coverage, newest = Coverage(), record()
    for _ in range(100):
        gradient = torch.ones(3)
        assert coverage.record_of(gradient) is None
        coverage.add([gradient], newest)
        del gradient  # its id is free again


def test_what_is_gone_is_forgotten():
    coverage, newest = Coverage(), record()
    for _ in range(50):
        coverage.add([torch.ones(3)], newest)
    assert len(coverage._covered) == 1


def test_tensors_of_inference_mode_are_known_by_object():
    with torch.inference_mode():
        gradient, other = torch.ones(3), torch.ones(3)
    coverage, newest = Coverage(), record()
    coverage.add([gradient], newest)
    assert coverage.record_of(gradient) is newest
    assert coverage.record_of(other) is None

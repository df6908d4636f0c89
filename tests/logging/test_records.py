"""The record of a step as a user reads it; the model of a clipper's life checks its values."""

import pytest

from tests.support.clippers import optimizer_of, stepped


def test_records_compare_by_identity_and_cannot_be_changed():
    """Their repr names the values a user reads."""
    one, other = (stepped(optimizer_of()).last for _ in range(2))
    numbers = {"norm": "5.", "clipped_norm": "1.", "threshold": "1.", "coefficient": "0.2000"}
    shown = [f"{name}=tensor({number}, dtype=torch.float64)" for name, number in numbers.items()]
    assert repr(one) == f"ClipRecord({', '.join(['step=0', *shown, 'nonfinite=tensor(False)'])})"
    assert one == one
    assert one != other
    with pytest.raises(AttributeError):
        one.step = 4

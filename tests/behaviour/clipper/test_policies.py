"""The effect of each policy on gradients, parameters and the state of the optimizer."""

import math
from contextlib import nullcontext

import pytest
import torch

from gradclip import GradientClipper, NonFiniteGradientError
from tests.support.clippers import sgd, weights_of

ABOVE, NAN = [3.0, 4.0], [math.nan, 1.0]
TAKEN, SKIPPED = True, False


@pytest.mark.parametrize(
    ("options", "gradient", "left", "outcome"),
    [
        ({"exceed": "scale"}, ABOVE, [0.6, 0.8], TAKEN),
        ({"exceed": "skip"}, ABOVE, ABOVE, SKIPPED),
        ({"exceed": "observe"}, ABOVE, ABOVE, TAKEN),
        ({"nonfinite": "zero"}, NAN, [0.0, 0.0], TAKEN),
        ({"nonfinite": "skip"}, NAN, NAN, SKIPPED),
        ({"nonfinite": "raise"}, NAN, NAN, SKIPPED),
        ({"nonfinite": "propagate"}, NAN, NAN, TAKEN),
        ({"exceed": "observe", "nonfinite": "raise"}, NAN, NAN, TAKEN),
    ],
)
def test_a_skipped_step_moves_nothing_and_one_that_is_taken_moves_the_momentum(
    options, gradient, left, outcome
):
    [weight] = weights_of(optimizer := sgd([0.1, 0.1], momentum=0.5, weight_decay=0.1))
    clipper = GradientClipper(optimizer, 1.0, **options)
    optimizer.step()
    before, momentum = weight.tolist(), optimizer.state[weight]["momentum_buffer"].tolist()
    weight.grad = torch.tensor(gradient)
    raises = outcome is SKIPPED and options.get("nonfinite") == "raise"
    with pytest.raises(NonFiniteGradientError) if raises else nullcontext():
        optimizer.step()
    assert weight.grad.tolist() == pytest.approx(left, rel=1e-6, nan_ok=True)
    after = [0.5 * m + g + 0.1 * w for m, g, w in zip(momentum, left, before, strict=True)]
    expected = after if outcome is TAKEN else momentum
    found = optimizer.state[weight]["momentum_buffer"].tolist()
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert (weight.tolist() == before) is (outcome is SKIPPED)
    assert (clipper.steps, clipper.skipped) == (2, 0 if outcome is TAKEN else 1)


@pytest.mark.parametrize("max_norm", [None, 1.0, "auto"])
def test_measuring_alone_still_obeys_the_policy_for_nan(max_norm):
    """``max_norm=None`` scales nothing; ``exceed="observe"`` is what writes nothing."""
    [weight] = weights_of(optimizer := sgd(NAN))
    GradientClipper(optimizer, max_norm)
    optimizer.step()
    assert weight.grad.tolist() == [0.0, 0.0]


def test_only_the_gradients_that_share_a_norm_that_is_not_finite_are_erased():
    optimizer = sgd(NAN, [0.3, 0.4])
    GradientClipper(optimizer, 1.0, scope="parameter", nonfinite="zero")
    optimizer.step()
    grads = [weight.grad.tolist() for weight in weights_of(optimizer)]
    assert grads == [[0.0, 0.0], pytest.approx([0.3, 0.4])]

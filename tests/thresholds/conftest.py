"""A driver that does with a rule what the clipper does, and the comparison with an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.gradients.coefficients import clip_coefficients
from gradclip.records.record import clipped_norms
from gradclip.thresholds import StepContext, Threshold

Norm = float | None  # None: no gradient at this step
Step = Sequence[Norm]
Oracle = Callable[[Sequence[Step]], list[list[float | None]]]

NAN, INF = math.nan, math.inf
USUAL = st.one_of(
    st.integers(1, 80).map(lambda eighths: eighths / 8),
    st.floats(0.0, 1e6, allow_subnormal=False),
    st.sampled_from([1.0, 1.0, 2.0, 0.0, NAN, INF, None]),
)
SEQUENCES: dict[str, list[Norm]] = {
    "constant": [3.0] * 40,
    "growing": [1.1**step for step in range(40)],
    "falling": [0.9**step for step in range(40)],
    "spikes": [100.0 if step % 9 == 8 else 1.0 + step % 4 / 10 for step in range(40)],
    "zeros": [0.0] * 12 + [1.0, 2.0] * 14,
    "unusable": [NAN, 1.0, INF, 2.0, None, 1.5] * 6,
}


class Driver:
    """Asks a rule, clips, and lets it observe, as `gradclip.clipper` does."""

    def __init__(
        self, rule: Threshold, count: int = 1, dtype: torch.dtype = torch.float64, order=2.0
    ) -> None:
        self.rule, self.step_index, self.order, self.dtype = rule, 0, order, dtype
        self.labels = [f"label {index}" for index in range(count)]
        self.weights = list(range(1, count + 1))
        rule.start(self.labels, torch.device("cpu"), dtype)

    def context(self, step: Step) -> StepContext:
        present = torch.tensor([norm is not None for norm in step])
        weights = torch.tensor(self.weights[: len(step)], dtype=self.dtype)
        return StepContext(self.step_index, present, self.order, weights)

    def ask(self, step: Step) -> torch.Tensor:
        return self.rule.thresholds(self.tensor(step), self.context(step))

    def step(self, step: Step) -> torch.Tensor:
        """Take a step with these norms; return the thresholds."""
        norms, limits = self.tensor(step), self.ask(step)
        coefficients = clip_coefficients(norms, limits, erase=True)
        self.rule.observe(norms, clipped_norms(norms, coefficients), self.context(step))
        self.step_index += 1
        return limits

    def run(self, steps: Sequence[Step]) -> list[list[float]]:
        return [self.step(step).tolist() for step in steps]

    def tensor(self, step: Step) -> torch.Tensor:
        return torch.tensor([norm or 0.0 for norm in step], dtype=self.dtype)


def _agrees(make: Callable[[], Threshold], oracle: Oracle) -> None:
    """Compare a rule with an oracle, which leaves None where it says nothing."""

    def compare(steps: Sequence[Step]) -> None:
        for count in {1, len(steps[0])}:
            part = [step[:count] for step in steps]
            found = Driver(make(), count).run(part)
            for step, (limits, needed) in enumerate(zip(found, oracle(part), strict=True)):
                for limit, value in zip(limits, needed, strict=True):
                    if value is not None:
                        assert limit == pytest.approx(value, rel=1e-9, abs=1e-12), (step, part)

    @settings(max_examples=15)
    @given(st.lists(st.tuples(USUAL, USUAL, USUAL), min_size=1, max_size=30))
    def on_any(steps):
        compare(steps)

    for sequence in SEQUENCES.values():
        others = zip(SEQUENCES["spikes"], SEQUENCES["unusable"], strict=False)
        compare([(norm, *other) for norm, other in zip(sequence, others, strict=False)])
    on_any()


def _per_label(oracle: Callable[[list[Norm]], list[float | None]]) -> Oracle:
    """Make an oracle of one for a single label."""
    return lambda steps: list(map(list, zip(*map(oracle, zip(*steps, strict=True)), strict=True)))


@pytest.fixture(scope="session")
def driver() -> type[Driver]:
    return Driver


@pytest.fixture(scope="session")
def agrees() -> Callable[[Callable[[], Threshold], Oracle], None]:
    return _agrees


@pytest.fixture(scope="session")
def agrees_per_label():
    return lambda make, oracle: _agrees(make, _per_label(oracle))

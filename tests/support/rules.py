"""The table of all rules, a driver that uses a rule as a clipper does, and a comparison by hand."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip import thresholds
from gradclip.thresholds import AdaptiveThreshold, StepContext, Threshold, is_foreign
from tests.support.own_classes import own_classes

RULES: dict[str, Callable[..., Threshold]] = {
    "Fixed": partial(thresholds.Fixed, 0.5),
    "None": partial(thresholds.Fixed, None),
    "Schedule": partial(thresholds.Schedule, lambda step: 1.0 / (1 + step)),
    "RelativeToWeights": partial(thresholds.RelativeToWeights, 0.1),
    "Percentile": partial(thresholds.Percentile, 50, window=5),
    "Quantile": partial(thresholds.Quantile, 50, 0.3, factor=0.9),
    "Auto": thresholds.Auto,
    "ZScore": partial(thresholds.ZScore, 0.5, warmup=2),
    "MovingAverage": partial(thresholds.MovingAverage, 0.9, warmup=2),
    "MeanDeviation": partial(thresholds.MeanDeviation, 0.5, window=5, warmup=2),
    "MedianDeviation": partial(thresholds.MedianDeviation, 1.0, window=5, warmup=2),
    "GrowthLimit": partial(thresholds.GrowthLimit, 0.9),
    **own_classes("GRADCLIP_RULE"),
}
"""Every rule, so that it clips within a few steps. Called with cap= and floor= where wanted."""
ADAPTIVE = [name for name, make in RULES.items() if isinstance(make(), AdaptiveThreshold)]

Norm = float | None
"""None where there is no gradient at a step."""
Step = Sequence[Norm]
Oracle = Callable[[Sequence[Step]], list[list[float | None]]]
"""Thresholds by hand; None where the rule may say anything."""


class Driver:
    """Asks a rule, clips, and lets it observe, as a clipper does: one norm is a number."""

    def __init__(
        self,
        rule: Threshold,
        count: int = 1,
        dtype: torch.dtype = torch.float64,
        order: float = 2,
        *,
        numbers: bool = True,
    ) -> None:
        self.numbers = numbers and count == 1 and dtype is torch.float64 and not is_foreign(rule)
        self.rule, self.step_index, self.order, self.dtype = rule, 0, order, dtype
        self.labels = [f"label {index}" for index in range(count)]
        self.weights = list(range(1, count + 1))
        rule.start(self.labels, torch.device("cpu"), dtype)

    def context(self, step: Step) -> StepContext:
        present = torch.tensor([norm is not None for norm in step])
        weights = torch.tensor(self.weights[: len(step)], dtype=self.dtype)
        return StepContext(self.step_index, present, self.order, weights)

    def ask(self, step: Step) -> torch.Tensor:
        norms, context = self.tensor(step), self.context(step)
        if self.numbers:
            limit = self.rule.thresholds(norms.item(), context)
            assert type(limit) is float
            return norms.new_tensor([limit])
        return self.rule.thresholds(norms, context)

    def step(self, step: Step) -> torch.Tensor:
        """Take a step with these norms; return the thresholds."""
        norms, limits = self.tensor(step), self.ask(step)
        clipped_norms = torch.where(norms.isfinite(), torch.minimum(norms, limits), 0.0)
        observed = (norms, clipped_norms)
        if self.numbers:
            observed = (norms.item(), clipped_norms.item())
        self.rule.observe(*observed, self.context(step))
        self.step_index += 1
        return limits

    def run(self, steps: Sequence[Step]) -> list[list[float]]:
        return [self.step(step).tolist() for step in steps]

    def tensor(self, step: Step) -> torch.Tensor:
        return torch.tensor([norm or 0.0 for norm in step], dtype=self.dtype)


USUAL_NORMS = st.one_of(
    st.integers(1, 80).map(lambda eighths: eighths / 8),
    st.floats(0.0, 1e6, allow_subnormal=False),
    st.sampled_from([1.0, 1.0, 2.0, 0.0, math.nan, math.inf, None]),
)
SEQUENCES: dict[str, list[Norm]] = {
    "constant": [3.0] * 40,
    "growing": [1.1**step for step in range(40)],
    "falling": [0.9**step for step in range(40)],
    "spikes": [100.0 if step % 9 == 8 else 1.0 + step % 4 / 10 for step in range(40)],
    "zeros": [0.0] * 12 + [1.0, 2.0] * 14,
    "unusable": [math.nan, 1.0, math.inf, 2.0, None, 1.5] * 6,
}


def agree(make: Callable[[], Threshold], oracle: Oracle) -> None:
    """Compare a rule with an oracle, on fixed sequences and on any, for one label and several."""

    def compare(steps: Sequence[Step]) -> None:
        for count in {1, len(steps[0])}:
            part = [step[:count] for step in steps]
            limits = Driver(make(), count).run(part)
            for step, needed in zip(limits, oracle(part), strict=True):
                for limit, value in zip(step, needed, strict=True):
                    close = value is None or math.isclose(limit, value, rel_tol=1e-9, abs_tol=1e-12)
                    assert close, (limit, value, part)

    @settings(max_examples=15)
    @given(st.lists(st.tuples(USUAL_NORMS, USUAL_NORMS, USUAL_NORMS), min_size=1, max_size=30))
    def on_any(steps: list[tuple[Norm, ...]]) -> None:
        compare(steps)

    for sequence in SEQUENCES.values():
        others = zip(SEQUENCES["spikes"], SEQUENCES["unusable"], strict=False)
        compare([(norm, *other) for norm, other in zip(sequence, others, strict=False)])
    on_any()


def per_label(oracle: Callable[[list[Norm]], list[float | None]]) -> Oracle:
    """Make an oracle of one for a single label."""
    return lambda steps: list(map(list, zip(*map(oracle, zip(*steps, strict=True)), strict=True)))


def is_usable(norm: Norm) -> Any:
    """Return whether a rule may learn from a norm."""
    return norm is not None and math.isfinite(norm)

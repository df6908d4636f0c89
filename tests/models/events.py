"""What may happen in a clipper's life: strategies for options, groups and gradients."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from tests.models.life import ABSENT, SCOPES, Options
from tests.models.rules import INF, RULES

F64, F32 = torch.float64, torch.float32


class Searching(torch.optim.SGD):
    """Evaluates its closure several times before it steps, as a line search does."""

    evaluations = 1

    def step(self, closure: Any = None) -> Any:
        for _ in range(self.evaluations - 1):
            closure()
        return super().step(closure)


CALM = ["plain"] * 4 + ["uneven"] * 3 + ["small", "large", "zero", "none", "keep", "shared"]
WILD = [*CALM, "huge", "enormous", "tiny", "nan", "inf", "-inf"]
SCALES = {"small": 2.0**-6, "large": 64.0, "huge": 1e30, "uneven": 0.1, "zero": 0.0}
EXTREMES = {F64: {"enormous": 1e200, "tiny": 1e-120}, F32: {"enormous": 1e38, "tiny": 1e-40}}
SHAPES = [(2,), (3, 2), (), (0,), (3,), (2, 2)]

some_options = st.builds(
    Options,
    rule=st.sampled_from([*RULES]),
    scope=st.sampled_from([*SCOPES]),
    norm_type=st.sampled_from([2.0, 2.0, 1.0, INF]),
    max_value=st.sampled_from([None, None, 0.75]),
    exceed=st.sampled_from(["scale", "scale", "skip", "observe"]),
    nonfinite=st.sampled_from(["zero", "skip", "raise", "propagate"]),
    skip_limit=st.sampled_from([None, None, 2]),
    flush_every=st.sampled_from([3, 1, 100]),
    per_parameter=st.sampled_from([0, "all"]),
)
some_parameters = st.tuples(st.sampled_from(SHAPES), st.sampled_from([F64, F64, F32]))
some_groups = st.tuples(
    st.lists(some_parameters, min_size=1, max_size=3),
    st.sampled_from([ABSENT, ABSENT, ABSENT, 2.0, None]),
)
calm, wild = (st.tuples(st.sampled_from(kinds), st.integers(0, 6)) for kinds in (CALM, WILD))
some_gradients = st.one_of(
    *[st.lists(kind, min_size=1, max_size=4) for kind in (calm, calm, calm, wild)]
)
Gradients = list[tuple[str, int]]


COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}
SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a key is missing": lambda state: state.pop("counters"),
    "a counter is missing": lambda state: state["counters"].pop("skipped_in_a_row"),
    "a count is negative": lambda state: state.update(steps=-1),
    "of another rule": lambda state: state.update(rule="Other"),
    "of other labels": lambda state: state["labels"].append("other"),
    "more in the threshold": lambda state: state["threshold"].update(more=torch.ones(1)),
}
"""What makes a state one that no such clipper has saved."""

"""How many torch operators a step on a CUDA device issues: each takes its host microseconds."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, thresholds
from tests.support.device import CountedOperators

COST = Path(__file__).parents[2] / "docs" / "cost.md"
ROW = re.compile(r"^\| `(\w+\(.*?\))` \| (\w+) \| (\d+) \| (\d+) \|$", re.M)
TABLE = ROW.findall(COST.read_text())
"""The rows of the documented table: rule, scope, operators during a warm-up and after it."""
LONGEST = 140
"""Steps after which no rule of the table is in its warm-up."""


class Unchanging(torch.optim.Optimizer):
    """Its step does nothing, so that all operators are those of the clipper."""

    def step(self):
        pass


def test_the_table_has_every_rule():
    """Only the rule that reads the weights is missing, as it launches kernels of its own."""
    counted = {rule.partition("(")[0] for rule, *_ in TABLE}
    assert counted == {rule.__name__ for rule in thresholds.RULES} - {"RelativeToWeights"}


def test_the_rule_without_a_number_issues_no_more_than_that_with_one():
    needed = {(rule, scope): (int(warm), int(usual)) for rule, scope, warm, usual in TABLE}
    for scope in ("global", "parameter"):
        for mine, other in zip(needed["Auto()", scope], needed["ZScore()", scope], strict=True):
            assert mine <= other


@pytest.mark.parametrize("norm", [1e-3, 1e3], ids=["under", "clipping"])
@pytest.mark.parametrize(
    ("rule", "scope", "warm", "settled"), TABLE, ids=[f"{row[0]} {row[1]}" for row in TABLE]
)
def test_a_step_issues_as_many_operators_as_the_table_says(
    like_cuda, rule, scope, warm, settled, norm
):
    """During a warm-up and after it, whether a norm is above its threshold or not."""
    parameters = [nn.Parameter(torch.zeros(10)) for _ in range(6)]
    optimizer = Unchanging(parameters, {})
    for parameter in parameters:
        parameter.grad = torch.ones(10)
    with GradientClipper(optimizer, eval(rule, vars(thresholds)), scope=scope) as clipper:
        assert clipper.engine == "triton"
        for steps, needed in ((1, warm), (LONGEST, settled)):
            for step in range(steps):
                like_cuda.norm = 1.0 + step % 5 / 10
                optimizer.step()
            like_cuda.norm, like_cuda.launches = norm, []
            with CountedOperators() as counted:
                optimizer.step()
            assert like_cuda.launches == ["power_sums", "change"]
            assert len(counted.names) == int(needed), counted.names
        assert bool((clipper.last.coefficient < 1).any()) == (norm > 1)

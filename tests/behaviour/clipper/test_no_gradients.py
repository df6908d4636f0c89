"""Trainings in which no parameter ever has a gradient, such as those of a frozen adapter."""

import warnings

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, Scope
from gradclip.cli import main
from tests.support.curves import log_run


def frozen_layer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).requires_grad_(False).parameters(), lr=0.1)


def take_quietly(clipper: GradientClipper, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(steps):
            clipper.step()


@pytest.mark.parametrize(
    "options", [{}, {"scope": "parameter"}, {"max_value": 1.0}, {"scope": Scope(exclude="*")}]
)
@pytest.mark.parametrize("count", [1, 2], ids=["one optimizer", "two optimizers"])
def test_a_warning_at_the_third_step_and_once(options, count):
    """It names the line that steps and says what to look for."""
    optimizers = [frozen_layer() for _ in range(count)]
    clipper = GradientClipper(optimizers, 1.0, **options)
    take_quietly(clipper, 2)
    with pytest.warns(UserWarning, match=r"no gradient to clip in the first 3 steps: .* of SGD"):
        clipper.step()
    take_quietly(clipper, 5)
    assert clipper.steps == 8
    assert not clipper.last.norm.any()


@pytest.mark.parametrize("with_gradient", range(3))
def test_no_warning_once_there_was_a_gradient(with_gradient):
    """Steps without gradients are nothing unusual then."""
    weight = nn.Parameter(torch.ones(2))
    clipper = GradientClipper(torch.optim.SGD([weight], lr=0.1), 1.0)
    for step in range(8):
        weight.grad = torch.ones(2) if step == with_gradient else None
        take_quietly(clipper, 1)


def test_the_line_that_steps_is_named():
    optimizer = frozen_layer()
    GradientClipper(optimizer, 1.0)
    optimizer.step()
    optimizer.step()
    with pytest.warns(UserWarning, match="no gradient to clip") as found:
        optimizer.step()
    assert found[0].filename == __file__


def test_the_report_says_so(tmp_path, capsys):
    log_run(tmp_path, *[0.0] * 5)
    assert main(["report", str(tmp_path)]) == 0
    assert "Every norm was 0: no parameter had a gradient" in capsys.readouterr().out
    log_run(tmp_path / "a", *[float("nan")] * 5)
    main(["report", str(tmp_path / "a")])
    assert "No norm was finite and above 0" in capsys.readouterr().out

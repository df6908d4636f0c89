"""A clipper's whole life in any order of events, beside a model of it in plain Python."""

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from torch import nn

from gradclip import GradientClipper, GradientError, NonFiniteGradientError, thresholds
from tests.models.events import COPIERS, F32, F64, SPOILED, Searching
from tests.models.life import ABSENT, LR, Options
from tests.models.machine import Machine
from tests.models.rules import NAN, RULES
from tests.support.reference import bits_in

# In the first steps of a life, too, there may be none.
pytestmark = pytest.mark.filterwarnings("ignore:There was no gradient to clip")


def test_any_life_goes_as_the_model_has_it():
    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=30))


USUAL = [("plain", 1), ("uneven", 2), ("small", 5)]
SPIKE = [("large", 1), ("plain", 2), ("large", 3)]
UNFIT = [("plain", 1), ("nan", 2), ("inf", 0)]


@pytest.mark.parametrize("exceed", ["scale", "skip", "observe"])
@pytest.mark.parametrize("rule", RULES)
def test_one_life_with_every_rule_and_policy(rule, exceed):
    number = [*RULES].index(rule) + len(exceed)
    nonfinite = ["zero", "skip", "raise", "propagate"][number % 4]
    scope = ["global", "parameter", "group"][number % 3]
    bound = [None, 0.75][number // 2 % 2]
    options = Options(rule, scope, 2.0, bound, exceed, nonfinite, None, 3, "all")
    groups = [([((2,), F64), ((3, 2), F64)], ABSENT), ([((2,), F32)], 2.0)]
    groups = groups[: 1 + number % 2]
    machine, through = Machine(), "optimizer"
    machine.begin(groups, options, "model", Searching, 0.5, 0.25, {}, watched=False)

    def step(gradients: Any) -> Any:
        return lambda: machine.step(gradients, through)

    def again() -> None:
        machine.step_again(USUAL)

    for event in (
        *(again, step(SPIKE), step([("zero", 0)]), step(SPIKE)),
        *(lambda: machine.save(through_a_file=True), again),
        lambda: machine.step_with_closure([SPIKE, UNFIT, USUAL], through),
        *(step(UNFIT), step(SPIKE), lambda: machine.load(0), again),
        *(lambda: machine.set_steps(7), step(UNFIT)),
        lambda: machine.add_group(([((3,), F64)], ABSENT)),
        lambda: machine.add_group(([((2,), F64)], 1.0)),
        *(step(SPIKE), again),
        *[lambda spoil=spoil: machine.load_what_does_not_fit(spoil) for spoil in SPOILED],
        machine.save_optimizer,
        *[lambda drop=drop: machine.load_optimizer(drop=drop) for drop in (True, True, False)],
        *[lambda way=way: machine.copy_optimizer(way, SPIKE) for way in COPIERS],
        *(step(SPIKE), lambda: machine.end("detach"), step(SPIKE)),
        *(lambda: machine.attach(options, reuse=True), again, step(SPIKE), machine.flush),
    ):
        event()
        machine.everything_is_as_the_model_has_it()
        machine.the_clipper_says_what_was_done()
        machine.the_sink_has_the_steps_but_for_the_last_batch()
    machine.teardown()


@pytest.mark.slow
def test_any_of_many_lives_goes_as_the_model_has_it():
    run_state_machine_as_test(Machine, settings=settings(max_examples=200, stateful_step_count=40))


def sgd_of_groups(*groups: dict[str, Any]) -> torch.optim.Optimizer:
    """Make an optimizer with one parameter a group, with a gradient of norm 5."""
    for group in groups:
        group["params"] = [nn.Parameter(torch.zeros(2))]
        group["params"][0].grad = torch.tensor([3.0, 4.0])
    return torch.optim.SGD([*groups], lr=LR)


def test_a_state_loads_where_the_same_groups_were_added_and_no_step_was_taken():
    def begun() -> tuple[torch.optim.Optimizer, GradientClipper]:
        optimizer = sgd_of_groups({})
        clipper = GradientClipper(optimizer, thresholds.GrowthLimit(), scope="group")
        optimizer.add_param_group(sgd_of_groups({}).param_groups[0])
        return optimizer, clipper

    optimizer, clipper = begun()
    optimizer.step()
    _, resumed = begun()
    resumed.load_state_dict(clipper.state_dict())
    assert bits_in(resumed.state_dict()) == bits_in(clipper.state_dict())


def test_a_state_loads_where_at_first_nothing_was_in_any_norm():
    optimizer = sgd_of_groups({"max_norm": None})
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.add_param_group(sgd_of_groups({"max_norm": 2.0}).param_groups[0])
    optimizer.step()
    state = clipper.state_dict()
    clipper.close()
    resumed = GradientClipper(optimizer, 1.0)
    resumed.load_state_dict(state)
    assert resumed.steps == 1


def test_a_state_that_was_saved_after_a_refused_step_loads():
    optimizer = sgd_of_groups({})
    options = {"scope": "group", "max_value": 1.0}
    clipper = GradientClipper(optimizer, thresholds.GrowthLimit(), **options)
    unfit = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    unfit.grad = torch.ones_like(unfit)
    optimizer.add_param_group({"params": [unfit]})
    with pytest.raises(GradientError, match="complex elements cannot be bounded"):
        optimizer.step()
    state = clipper.state_dict()
    clipper.close()
    resumed = GradientClipper(optimizer, thresholds.GrowthLimit(), **options)
    resumed.load_state_dict(state)
    assert bits_in(resumed.state_dict()) == bits_in(state)


def test_a_skip_limit_counts_steps_and_not_evaluations_of_their_closures():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = Searching([weight], lr=LR)
    optimizer.evaluations = 2
    clipper = GradientClipper(optimizer, 1.0, nonfinite="skip", skip_limit=1)
    values = iter([NAN, 0.25])

    def closure() -> None:
        weight.grad = torch.full((2,), next(values))

    optimizer.step(closure)
    assert clipper.skipped == 0
    assert weight.tolist() == [-0.125, -0.125]


@pytest.mark.parametrize("way", ["steps are set", "a state is loaded"])
def test_norms_of_another_part_of_the_training_are_forgotten(way):
    optimizer = sgd_of_groups({})
    clipper = GradientClipper(optimizer, None, nonfinite="raise")
    optimizer.step()
    if way == "steps are set":
        clipper.steps = 7
    else:
        clipper.load_state_dict(clipper.state_dict())
    optimizer.param_groups[0]["params"][0].grad.fill_(NAN)
    with pytest.raises(NonFiniteGradientError, match="The norms before: not known"):
        optimizer.step()

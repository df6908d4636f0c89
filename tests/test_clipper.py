from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradclip
from gradclip import (
    ArgumentError,
    AttachError,
    EngineUnavailableError,
    GradClipError,
    GradientClipper,
    NonFiniteGradientError,
    StateError,
    Threshold,
    engines,
)

BEST = engines.engine_for("auto", torch.device("cpu")).name


def parameters(*gradients: torch.Tensor) -> list[nn.Parameter]:
    """Parameters of ones with the given gradients."""
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.ones(gradient.shape, dtype=gradient.dtype))
        parameter.grad = gradient.clone()
        made.append(parameter)
    return made


def sgd(*gradients: torch.Tensor, **options) -> torch.optim.SGD:
    return torch.optim.SGD(parameters(*gradients), lr=1.0, **options)


def held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def measured_norm(optimizer: torch.optim.Optimizer, order: float = 2.0) -> float:
    gradients = [p.grad.double().flatten() for p in held(optimizer) if p.grad is not None]
    return torch.linalg.vector_norm(torch.cat(gradients), order).item()


# The step


def test_a_step_takes_the_gradient_scaled_to_the_threshold():
    optimizer = sgd(torch.tensor([3.0]), torch.tensor([4.0]))
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert measured_norm(optimizer) == pytest.approx(1.0, rel=2e-7)
    for parameter, gradient in zip(held(optimizer), (0.6, 0.8), strict=True):
        assert parameter.item() == pytest.approx(1 - gradient, rel=1e-6)
    assert clipper.last.norm.item() == 5.0


@pytest.mark.parametrize("order", [0.5, 1, 1.5, 2, 3, math.inf, "inf"])
def test_any_order_of_norm_is_clipped_to_the_threshold(order):
    optimizer = sgd(torch.randn(30, 7), torch.randn(5))
    before = measured_norm(optimizer, float(order))
    clipper = GradientClipper(optimizer, before / 3, norm_type=order)
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(before, rel=1e-9)
    assert measured_norm(optimizer, float(order)) == pytest.approx(before / 3, rel=1e-6)


def test_below_the_threshold_nothing_is_written():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    gradient = held(optimizer)[0].grad
    version = gradient._version
    clipper = GradientClipper(optimizer, 5.0)
    optimizer.step()
    assert gradient._version == version
    assert gradient.tolist() == [3.0, 4.0]
    assert clipper.last.coefficient.item() == 1.0
    assert clipper.clip_rate() == 0.0


def test_a_record_holds_0d_tensors_for_one_norm():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, 1.0)
    assert clipper.last is None
    optimizer.step()
    last = clipper.last
    assert last.step == 0
    expected = {"norm": 5.0, "clipped_norm": 1.0, "threshold": 1.0, "coefficient": 0.2}
    for name, value in expected.items():
        field = getattr(last, name)
        assert field.shape == ()
        assert field.dtype == torch.float64
        assert field.item() == pytest.approx(value, rel=1e-12)
    assert last.nonfinite.dtype == torch.bool
    assert not last.nonfinite
    assert clipper.labels == ("global",)


def test_the_threshold_may_be_a_function_of_the_step():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, lambda step: [None, 2.0, 1.0][step])
    thresholds = []
    for _ in range(3):
        held(optimizer)[0].grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        thresholds.append(clipper.last.threshold.item())
        assert measured_norm(optimizer) == pytest.approx(min(5.0, thresholds[-1]), rel=1e-6)
    assert thresholds == [math.inf, 2.0, 1.0]


def test_steps_can_be_set_and_the_function_sees_it():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    seen = []
    clipper = GradientClipper(optimizer, lambda step: seen.append(step) or 1.0)
    clipper.steps = 41
    optimizer.step()
    assert seen == [41]
    assert clipper.last.step == 41
    assert clipper.steps == 42
    with pytest.raises(ArgumentError, match="steps is -1"):
        clipper.steps = -1


def test_none_observes_and_writes_nothing():
    optimizer = sgd(torch.tensor([3e8, 4e8]))
    gradient = held(optimizer)[0].grad
    version = gradient._version
    clipper = GradientClipper(optimizer, None)
    optimizer.step()
    assert gradient._version == version
    assert clipper.last.norm.item() == 5e8
    assert clipper.last.threshold.item() == math.inf
    assert clipper.clip_rate() == 0.0


def test_a_threshold_of_zero_erases():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    GradientClipper(optimizer, 0)
    optimizer.step()
    assert held(optimizer)[0].tolist() == [1.0, 1.0]
    held(optimizer)[0].grad = torch.zeros(2)
    optimizer.step()
    assert held(optimizer)[0].grad.tolist() == [0.0, 0.0]


def test_no_gradient_at_all_is_a_norm_of_zero_with_a_record():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))])
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert clipper.last.norm.item() == 0.0
    assert clipper.steps == 1


def test_a_tied_parameter_counts_and_is_scaled_once():
    weight = nn.Parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([weight, weight], lr=0.0)
    weight.grad = torch.tensor([3.0, 4.0])
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert clipper.last.norm.item() == 5.0
    assert measured_norm(optimizer) / math.sqrt(2) == pytest.approx(1.0, rel=1e-6)


def test_mixed_dtypes_share_one_norm():
    kinds = (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    optimizer = torch.optim.SGD(parameters(*(torch.full((4,), 2.0, dtype=k) for k in kinds)), 0.0)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert clipper.last.norm.item() == 8.0
    assert [p.grad.tolist() for p in held(optimizer)] == [[0.25] * 4] * 4


def test_new_parameter_groups_are_clipped_too():
    optimizer = sgd(torch.tensor([3.0]))
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.add_param_group({"params": parameters(torch.tensor([4.0]))})
    optimizer.step()
    assert clipper.last.norm.item() == 5.0
    assert measured_norm(optimizer) == pytest.approx(1.0, rel=1e-6)


def test_a_loaded_optimizer_state_leaves_the_clipper_attached():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    GradientClipper(optimizer, 1.0)
    optimizer.load_state_dict(sgd(torch.tensor([1.0, 1.0]), momentum=0.5).state_dict())
    optimizer.step()
    assert measured_norm(optimizer) == pytest.approx(1.0, rel=1e-6)


def test_it_serves_as_the_wrapper_of_an_optimizer():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, 1.0)
    clipper.step()
    assert measured_norm(optimizer) == pytest.approx(1.0, rel=1e-6)
    clipper.zero_grad(set_to_none=False)
    assert held(optimizer)[0].grad.tolist() == [0.0, 0.0]
    clipper.zero_grad()
    assert held(optimizer)[0].grad is None


@pytest.mark.parametrize("by", ["position", "keyword", "clipper"])
def test_every_evaluation_of_a_closure_is_clipped_and_the_step_recorded_once(by):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = GradientClipper(optimizer, 1.0)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = (weight * torch.tensor([3.0, 4.0])).sum()
        loss.backward()
        return loss

    if by == "position":
        loss = optimizer.step(closure)
    elif by == "keyword":
        loss = optimizer.step(closure=closure)
    else:
        loss = clipper.step(closure)
    assert loss.item() == 0.0
    assert len(calls) == 1
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-6)
    assert clipper.steps == 1


def test_lbfgs_evaluates_as_often_as_without_a_clipper_while_nothing_is_clipped():
    def train(clip: bool) -> tuple[int, list[float]]:
        weight = nn.Parameter(torch.tensor([5.0, -3.0]))
        optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=5)
        clipper = GradientClipper(optimizer, 1e6) if clip else None
        calls = 0

        def closure() -> torch.Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = (weight**2).sum() + weight.prod()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        if clipper is not None:
            assert clipper.steps == 3
        return calls, weight.tolist()

    assert train(clip=True) == train(clip=False)


def test_inside_autocast_the_norm_is_the_same():
    optimizer = sgd(torch.full((600, 600), 0.1))
    clipper = GradientClipper(optimizer, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(60.0, rel=1e-6)
    assert measured_norm(optimizer) == pytest.approx(1.0, rel=1e-6)


# What is not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_zero_erases_the_gradients_and_takes_the_step(bad):
    optimizer = sgd(torch.tensor([1.0, bad]), torch.tensor([2.0]), momentum=0.9)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert [p.grad.tolist() for p in held(optimizer)] == [[0.0, 0.0], [0.0]]
    assert [p.tolist() for p in held(optimizer)] == [[1.0, 1.0], [1.0]]
    assert bool(clipper.last.nonfinite)
    assert clipper.last.clipped_norm.item() == 0.0
    assert clipper.steps == 1
    assert clipper.skipped == 0
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skip_leaves_parameters_state_and_gradients_as_they_were(bad):
    optimizer = torch.optim.Adam(parameters(torch.ones(2), torch.ones(1)), lr=0.1)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="skip")
    optimizer.step()
    held(optimizer)[0].grad = torch.tensor([1.0, bad])
    weights = [p.tolist() for p in held(optimizer)]
    gradients = [p.grad for p in held(optimizer)]
    bits = [g.clone() for g in gradients]
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert [p.tolist() for p in held(optimizer)] == weights
    for parameter, gradient, bit in zip(held(optimizer), gradients, bits, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient.view(torch.int32), bit.view(torch.int32))
    assert_same_state(optimizer.state_dict(), state)
    assert clipper.steps == 2
    assert clipper.skipped == 1
    assert clipper.last.skipped


def assert_same_state(found: dict, needed: dict) -> None:
    assert found["param_groups"] == needed["param_groups"]
    for key, values in needed["state"].items():
        for name, value in values.items():
            assert torch.equal(found["state"][key][name], value)


def test_skip_with_a_closure_leaves_everything_as_it_was():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="skip")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight * math.inf).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == math.inf
    assert weight.tolist() == [1.0, 1.0]
    assert weight.grad.tolist() == [math.inf, math.inf]
    assert not optimizer.state
    assert clipper.skipped == 1


class Failing(torch.optim.SGD):
    fails = True

    @torch.no_grad()
    def step(self, closure=None):
        if self.fails:
            raise OSError("no step today")
        return super().step(closure)


def test_gradients_hidden_by_a_step_that_raised_come_back():
    optimizer = Failing(parameters(torch.tensor([math.nan])), lr=1.0)
    gradient = held(optimizer)[0].grad
    clipper = GradientClipper(optimizer, 1.0, nonfinite="skip")
    with pytest.raises(OSError, match="no step today"):
        optimizer.step()
    clipper.detach()
    assert held(optimizer)[0].grad is gradient
    assert clipper.steps == 0


def test_raise_names_the_parameters_and_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[1].weight.grad[0, 1] = math.nan
    before = [p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="raise", model=model)
    with pytest.raises(NonFiniteGradientError, match=r"nan at step 0.*1\.weight \(1 of 2 elem"):
        optimizer.step()
    for parameter, gradient, weight in zip(model.parameters(), before, weights, strict=True):
        assert torch.equal(parameter.grad.nan_to_num(7.0), gradient.nan_to_num(7.0))
        assert torch.equal(parameter, weight)
    assert (clipper.steps, clipper.skipped) == (1, 1)
    model[1].weight.grad[0, 1] = 1.0
    optimizer.step()
    assert clipper.steps == 2


def test_propagate_writes_nothing():
    optimizer = sgd(torch.tensor([1.0, math.inf]))
    gradient = held(optimizer)[0].grad
    version = gradient._version
    clipper = GradientClipper(optimizer, 1.0, nonfinite="propagate", max_value=0.5)
    optimizer.step()
    assert gradient._version == version
    assert held(optimizer)[0].tolist() == [0.0, -math.inf]
    assert bool(clipper.last.nonfinite)


def test_a_step_that_is_not_finite_does_not_enter_the_clip_rate():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, 1.0)
    for value in (3.0, math.nan, 0.1, math.inf):
        held(optimizer)[0].grad = torch.tensor([value, value])
        optimizer.step()
    assert clipper.clip_rate() == 0.5


# Observing


@pytest.mark.parametrize("nonfinite", ["zero", "skip", "raise", "propagate"])
@pytest.mark.parametrize("value", [4.0, math.nan])
def test_observe_never_writes_and_never_skips(nonfinite, value):
    optimizer = sgd(torch.tensor([3.0, value]))
    gradient = held(optimizer)[0].grad
    version = gradient._version
    clipper = GradientClipper(optimizer, 1.0, exceed="observe", nonfinite=nonfinite, max_value=2.0)
    optimizer.step()
    assert gradient._version == version
    assert held(optimizer)[0][0].item() == -2.0
    assert clipper.skipped == 0


def test_observe_records_what_would_have_been_done():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, 1.0, exceed="observe")
    optimizer.step()
    assert clipper.last.coefficient.item() == pytest.approx(0.2)
    assert clipper.last.clipped_norm.item() == pytest.approx(1.0)
    assert clipper.clip_rate() == 1.0


@pytest.mark.parametrize("exceed", ["scale", "observe"])
def test_max_value_bounds_elements_before_the_norm_is_limited(exceed):
    optimizer = sgd(torch.tensor([30.0, 4.0]))
    clipper = GradientClipper(optimizer, 1.0, max_value=3.0, exceed=exceed)
    optimizer.step()
    last = clipper.last
    assert last.norm.item() == pytest.approx(math.hypot(30, 4), rel=1e-12)
    assert last.clipped_norm.item() == pytest.approx(1.0, rel=1e-12)
    assert (last.norm * last.coefficient).item() == pytest.approx(1.0, rel=1e-12)
    root_half = math.sqrt(0.5)
    expected = [root_half, root_half] if exceed == "scale" else [30.0, 4.0]
    assert held(optimizer)[0].grad.tolist() == pytest.approx(expected, rel=1e-6)


def test_max_value_writes_only_where_an_element_exceeds_it():
    optimizer = sgd(torch.tensor([30.0]), torch.tensor([1.0]))
    large, small = (p.grad for p in held(optimizer))
    versions = large._version, small._version
    GradientClipper(optimizer, None, max_value=3.0)
    optimizer.step()
    assert (large.item(), small.item()) == (3.0, 1.0)
    assert large._version > versions[0]
    assert small._version == versions[1]


def test_the_verdict_comes_before_max_value_which_would_hide_an_infinity():
    optimizer = sgd(torch.tensor([1.0, math.inf]))
    clipper = GradientClipper(optimizer, 10.0, max_value=1.0)
    optimizer.step()
    assert bool(clipper.last.nonfinite)
    assert held(optimizer)[0].grad.tolist() == [0.0, 0.0]


def test_max_value_bounds_the_sums_of_duplicate_sparse_entries():
    weight = nn.Parameter(torch.zeros(3, 1))
    weight.grad = torch.sparse_coo_tensor([[0, 0, 1]], [[2.0], [2.0], [1.0]], (3, 1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper = GradientClipper(optimizer, None, max_value=3.0)
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(math.sqrt(17))
    assert weight.flatten().tolist() == [-3.0, -1.0, 0.0]


def test_sparse_entries_are_bounded_and_then_scaled_to_the_threshold():
    weight = nn.Parameter(torch.zeros(3, 1))
    weight.grad = torch.sparse_coo_tensor([[0, 0, 1]], [[2.0], [2.0], [3.0]], (3, 1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    GradientClipper(optimizer, 1.0, max_value=3.0)
    optimizer.step()
    root_half = math.sqrt(0.5)
    assert weight.flatten().tolist() == pytest.approx([-root_half, -root_half, 0.0], rel=1e-6)


def test_complex_gradients_and_max_value_are_refused_before_anything_is_written():
    weights = parameters(torch.full((2,), 5.0), torch.full((2,), 5 + 5j))
    optimizer = torch.optim.SGD(weights, lr=1.0)
    GradientClipper(optimizer, 1.0, max_value=1.0)
    with pytest.raises(gradclip.GradientError, match="complex elements cannot be bounded"):
        optimizer.step()
    assert weights[0].grad.tolist() == [5.0, 5.0]
    assert weights[0].tolist() == [1.0, 1.0]


# Bad input


@pytest.mark.parametrize("max_norm", [-1, math.nan, math.inf, True, "1.0", torch.ones(2)])
def test_a_bad_max_norm_is_refused_and_nothing_is_attached(max_norm):
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    with pytest.raises(ArgumentError, match="max_norm is "):
        GradientClipper(optimizer, max_norm)
    GradientClipper(optimizer, 1.0)


@pytest.mark.parametrize(
    ("option", "needed"),
    [
        ({"exceed": "clip"}, r"exceed is 'clip': give one of 'scale', 'observe', 'skip'"),
        ({"exceed": None}, "exceed is None: give one of"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore': give one of 'zero', 'skip', 'raise'"),
        ({"scope": "layer"}, "scope is 'layer': give one of 'global', 'group'"),
        ({"norm_type": 0}, "norm_type is 0: give a number > 0"),
        ({"max_value": -1.0}, "max_value is -1.0: give a finite number >= 0"),
        ({"max_value": True}, "max_value is True"),
        ({"engine": "cuda"}, "engine='cuda' names no engine: give 'auto' or one of"),
        ({"model": [1]}, "model is a list: give a torch.nn.Module"),
        ({"ranks": 2}, r"ranks is 2: give gradclip.Ranks\(group\), or None"),
        ({"log": 3}, "log is 3: give a directory, a SummaryWriter, a Sink"),
    ],
)
def test_a_bad_option_says_what_was_found_and_what_is_needed(option, needed):
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    with pytest.raises(ArgumentError, match=needed):
        GradientClipper(optimizer, 1.0, **option)
    GradientClipper(optimizer, 1.0)


def test_an_engine_that_is_not_there_is_an_error_and_not_replaced(monkeypatch):
    with pytest.raises(EngineUnavailableError, match="engine='triton' "):
        GradientClipper(sgd(torch.ones(1)), 1.0, engine="triton")
    monkeypatch.setattr(engines, "_load_native", lambda: "engine='native' is not available: reason")
    with pytest.raises(EngineUnavailableError, match="engine='native' is not available: reason"):
        GradientClipper(sgd(torch.ones(1)), 1.0, engine="native")


def test_an_engine_that_cannot_serve_the_parameters_is_refused():
    optimizer = sgd(torch.ones(1))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, device="meta"))]})
    if "native" in engines._ENGINES:
        with pytest.raises(EngineUnavailableError, match="engine='native' serves the CPU"):
            GradientClipper(optimizer, 1.0, engine="native")
    GradientClipper(optimizer, 1.0)


def test_positional_options_are_refused():
    with pytest.raises(TypeError, match="positional"):
        GradientClipper(sgd(torch.ones(1)), 1.0, 2.0)


@pytest.mark.parametrize("engine", [*engines._ENGINES, "auto"])
def test_an_engine_asked_for_by_name_serves(engine):
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, 1.0, engine=engine)
    optimizer.step()
    assert clipper.engine == (BEST if engine == "auto" else engine)
    assert measured_norm(optimizer) == pytest.approx(1.0, rel=1e-6)


def test_a_threshold_that_returns_the_wrong_shape_is_an_error_before_anything_is_written():
    class Two(Threshold):
        def thresholds(self, norms, context):
            return torch.ones(2)

    optimizer = sgd(torch.tensor([3.0, 4.0]))
    GradientClipper(optimizer, Two())
    with pytest.raises(ArgumentError, match=r"Two.thresholds\(\) returned the shape \(2,\)"):
        optimizer.step()
    assert held(optimizer)[0].grad.tolist() == [3.0, 4.0]


def test_a_function_that_raises_leaves_everything_as_it_was():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, lambda step: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert held(optimizer)[0].grad.tolist() == [3.0, 4.0]
    assert held(optimizer)[0].tolist() == [1.0, 1.0]
    assert clipper.steps == 0


# A threshold of one's own


class HalfOfLast(Threshold):
    """Allow half of the largest clipped norm seen so far."""

    def start(self, labels, device, dtype):
        self.largest = torch.full((len(labels),), 2.0, device=device, dtype=dtype)
        self.observed = []

    def thresholds(self, norms, context):
        return self.largest / 2

    def observe(self, norms, clipped_norms, context):
        self.observed.append((context.step, norms.item(), clipped_norms.item()))
        self.largest = torch.maximum(self.largest, clipped_norms)

    def state_dict(self):
        return {"largest": self.largest}

    def load_state_dict(self, state):
        self.largest = state["largest"]


def test_a_threshold_of_ones_own_observes_each_step_once():
    rule = HalfOfLast()
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, rule)
    optimizer.step()
    optimizer.step()
    assert rule.observed == [(0, 5.0, 1.0), (1, pytest.approx(1.0), pytest.approx(1.0))]
    assert clipper.state_dict()["threshold"]["largest"].item() == 2.0


def test_a_closure_evaluated_often_is_observed_once():
    rule = HalfOfLast()
    weight = nn.Parameter(torch.tensor([5.0, -3.0]))
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=5)
    GradientClipper(optimizer, rule)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert [step for step, _, _ in rule.observed] == [0]


# State


def test_the_state_loads_with_weights_only_and_continues(tmp_path):
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, 1.0)
    for value in (3.0, 0.1, math.nan):
        held(optimizer)[0].grad = torch.tensor([value, 0.0])
        optimizer.step()
    torch.save(clipper.state_dict(), tmp_path / "clipper.pt")
    clipper.close()
    resumed = GradientClipper(optimizer, 1.0)
    resumed.load_state_dict(torch.load(tmp_path / "clipper.pt", weights_only=True))
    assert resumed.steps == 3
    assert resumed.clip_rate() == 0.5
    held(optimizer)[0].grad = torch.tensor([3.0, 0.0])
    optimizer.step()
    assert resumed.last.step == 3
    assert resumed.clip_rate() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("steps"),
        lambda state: state.update(more=1),
        lambda state: state.update(steps=-1),
        lambda state: state.update(steps=1.5),
        lambda state: state["counters"].pop("finite"),
        lambda state: state["counters"].update(finite="many"),
        lambda state: state.update(counters=None),
        lambda state: state.update(threshold={"history": torch.ones(1)}),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(spoil):
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    before = clipper.state_dict()
    state = clipper.state_dict()
    spoil(state)
    with pytest.raises(StateError):
        clipper.load_state_dict(state)
    assert clipper.state_dict() == before


def test_a_state_that_is_no_mapping_is_refused():
    clipper = GradientClipper(sgd(torch.ones(1)), 1.0)
    with pytest.raises(StateError, match="state has list, needed are the keys"):
        clipper.load_state_dict([1])


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_clipper_is_refused(copier):
    clipper = GradientClipper(sgd(torch.ones(1)), 1.0)
    with pytest.raises(AttachError, match="cannot be copied or pickled"):
        copier(clipper)


# The end


def test_detach_is_full_and_may_be_repeated():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    clipper = GradientClipper(optimizer, 1.0)
    clipper.detach()
    clipper.detach()
    optimizer.step()
    assert held(optimizer)[0].grad.tolist() == [3.0, 4.0]
    assert clipper.steps == 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    GradientClipper(optimizer, 1.0)


def test_leaving_the_with_block_detaches_also_through_an_exception():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    with pytest.raises(KeyError), GradientClipper(optimizer, 1.0) as clipper:
        raise KeyError
    optimizer.step()
    assert held(optimizer)[0].grad.tolist() == [3.0, 4.0]
    clipper.close()


def test_a_clipper_nobody_holds_goes_on_clipping_and_dies_with_its_optimizer():
    optimizer = sgd(torch.tensor([3.0, 4.0]))
    reference = weakref.ref(GradientClipper(optimizer, 1.0))
    gc.collect()
    optimizer.step()
    assert measured_norm(optimizer) == pytest.approx(1.0, rel=1e-6)
    del optimizer
    gc.collect()
    assert reference() is None


def test_the_representation_names_optimizer_threshold_and_engine():
    clipper = GradientClipper(sgd(torch.ones(1)), 1.0)
    assert repr(clipper) == f"GradientClipper(SGD, Fixed(1.0), steps=0, engine='{BEST}')"


def test_every_error_is_one_of_ours():
    assert issubclass(NonFiniteGradientError, GradClipError)
    assert issubclass(NonFiniteGradientError, RuntimeError)


# Nothing waits for the device


class NoReading(TorchDispatchMode):
    """Refuse to read the value of a device's tensor on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        read = function is torch.ops.aten._local_scalar_dense.default
        if read and args[0].device.type != "cpu":
            raise AssertionError("a value was read on the host")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"max_value": 0.5}, {"norm_type": math.inf}], ids=str)
@pytest.mark.parametrize("exceed", ["scale", "observe"])
def test_off_the_cpu_an_ordinary_step_reads_no_value(options, exceed):
    with torch.device("meta"):
        weights = [nn.Parameter(torch.empty(30, 5)), nn.Parameter(torch.empty(3))]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer = torch.optim.SGD(weights, lr=0.1, foreach=False)
    clipper = GradientClipper(optimizer, 1.0, exceed=exceed, **options)
    with NoReading():
        optimizer.step()
        optimizer.step()
    assert clipper.last.norm.device.type == "meta"
    assert clipper.steps == 2
    clipper._recorder._buffer._waiting.clear()  # what has no data cannot be counted at the end

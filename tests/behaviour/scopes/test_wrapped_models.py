"""Models that are wrapped: names, exclusions and states are those of the plain model."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from gradclip import (
    ArgumentError,
    GradientClipper,
    MemorySink,
    NonFiniteGradientError,
    Ranks,
    Scope,
)
from gradclip.thresholds import MovingAverage


class Wrappable(nn.Module):
    """A model in which some submodules have names that wrappers use as well."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(OrderedDict(module=nn.Linear(3, 4)))
        self.module = nn.Linear(4, 2)
        self.head = nn.Linear(2, 1)

    def forward(self, inputs):
        return self.head(self.module(self.body(inputs)))


PLAIN = (
    *("body.module.weight", "body.module.bias"),
    *("module.weight", "module.bias", "head.weight", "head.bias"),
)


@pytest.fixture
def _one_process():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def wrapped_by_compile(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def within(wrapper):
    """Return a wrapper of the submodules."""

    def wrap(model):
        for name in ("body", "module", "head"):
            setattr(model, name, wrapper(getattr(model, name)))
        return model

    return wrap


def fsdp(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(model, **options)


WRAPPERS = {
    "compiled": wrapped_by_compile,
    "parallel": DataParallel,
    "averaged": AveragedModel,
    "distributed": DistributedDataParallel,
    "checkpointed": checkpoint_wrapper,
    "sharded": fsdp,
    "compiled within": within(wrapped_by_compile),
    "parallel within": within(DataParallel),
    "checkpointed within": within(checkpoint_wrapper),
    "all of them": lambda model: wrapped_by_compile(
        DistributedDataParallel(within(checkpoint_wrapper)(wrapped_by_compile(model)))
    ),
}
wrapped = pytest.mark.parametrize("wrapper", WRAPPERS)
one_process = pytest.mark.usefixtures("_one_process")


def optimizer_of_model(model: nn.Module, *, named: bool = False) -> torch.optim.Optimizer:
    parameters = model.named_parameters() if named else model.parameters()
    return torch.optim.SGD(parameters, lr=0.01)


@wrapped
@one_process
@pytest.mark.filterwarnings("ignore:.*FSDP|FullyShardedDataParallel|`torch.jit")
def test_labels_and_logs_have_plain_names(wrapper):
    """Whatever is around the model, or around a part of it."""
    model = WRAPPERS[wrapper](Wrappable())
    sink = MemorySink(per_parameter="all")
    optimizer = optimizer_of_model(model)
    options = {"scope": "parameter", "model": model, "log": sink, "nonfinite": "raise"}
    if wrapper == "sharded":
        options["ranks"] = Ranks()  # across ranks, labels are in alphabetical order
    with GradientClipper(optimizer, 1.0, **options) as clipper:
        assert sorted(clipper.labels) == sorted(PLAIN)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        next(model.parameters()).grad[0] = torch.nan
        with pytest.raises(NonFiniteGradientError, match=": body.module.weight"):
            optimizer.step()
    assert {*sink.steps[0].parameter_norms} == {*PLAIN}


@pytest.mark.parametrize("wrapper", ["compiled", "parallel", "checkpointed", "compiled within"])
def test_names_that_the_optimizer_was_given(wrapper):
    """Of a parallel module the names of all parameters begin alike."""
    optimizer = optimizer_of_model(WRAPPERS[wrapper](Wrappable()), named=True)
    assert GradientClipper(optimizer, 1.0, scope="parameter").labels == PLAIN


@pytest.mark.parametrize("pattern", ["head.*", "_orig_mod.head.*"])
def test_exclusions_name_what_is_inside(pattern):
    """A pattern may have the names of wrappers in it, or not; a function gets plain names."""
    model = wrapped_by_compile(Wrappable())
    named: list[str] = []
    scopes = [
        Scope("parameter", exclude=pattern),
        Scope("parameter", exclude=lambda name, _: named.append(name) or name.startswith("head")),
    ]
    for scope in scopes:
        clipper = GradientClipper(optimizer_of_model(model), 1.0, scope=scope, model=model)
        assert clipper.labels == PLAIN[:4]
    assert tuple(named) == PLAIN
    scope = Scope("parameter", exclude="module.head.*")
    with pytest.raises(ArgumentError, match="matches no parameter; there are body.module.weight"):
        GradientClipper(optimizer_of_model(model), 1.0, scope=scope, model=model)


def test_names_that_would_be_the_same_stay_as_they_are():
    """Two parameters never share a name."""
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False)})
    model.a._orig_mod = nn.Linear(1, 1, bias=False)
    clipper = GradientClipper(optimizer_of_model(model), 1.0, scope="parameter", model=model)
    assert clipper.labels == ("a.weight", "a._orig_mod.weight")


def with_labels(state: dict, rename) -> dict:
    return {**state, "labels": [rename(label) for label in state["labels"]]}


RENAMES = {
    "compiled": lambda label: f"_orig_mod.{label}",
    "parallel": lambda label: f"module.{label}",
    "both": lambda label: f"_orig_mod.module.{label}",
    "within": lambda label: label.replace("head.", "head._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("before", RENAMES)
@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_states_load_whatever_the_model_is_wrapped_in(before, scope):
    """Also states in which labels have the names of wrappers; others are refused."""
    model = Wrappable()
    wrapped_model = wrapped_by_compile(DataParallel(copy.deepcopy(model)))
    rule = MovingAverage(1.05, warmup=1)
    clipper = GradientClipper(optimizer_of_model(model), rule, scope=scope, model=model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    clipper.step()
    state = clipper.state_dict()
    other = GradientClipper(
        optimizer_of_model(wrapped_model),
        MovingAverage(1.05, warmup=1),
        scope=scope,
        model=wrapped_model,
    )
    other.load_state_dict(with_labels(state, RENAMES[before]))
    assert other.steps == 1
    assert other.state_dict()["labels"] == state["labels"]
    with pytest.raises(ValueError, match="has the labels"):
        other.load_state_dict(with_labels(state, lambda label: f"other.{label}"))

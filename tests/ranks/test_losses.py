"""The loss of a step across ranks: a mean in the collective of the norms, the same on all."""

import math
import re
from itertools import product
from typing import Any

import pytest
import torch
from torch import distributed, nn

from gradclip import (
    ArgumentError,
    AttachError,
    GradientClipper,
    MemorySink,
    NonFiniteGradientError,
    Ranks,
    Threshold,
)
from gradclip.thresholds import MeanDeviation
from tests.support.clippers import sgd
from tests.support.device import take_the_device_route
from tests.support.dtensors import full_gradients, mesh_of, quick, recorded, spread_parameter
from tests.support.processes import on_ranks
from tests.support.reference import parameter_with

NAN, INF = math.nan, math.inf


class Lowering(Threshold):
    """Lets no norm pass where the loss is above 3; needs the loss."""

    needs_loss = True

    def thresholds(self, norms, context):
        assert context.loss.shape == ()
        return torch.where(context.loss > 3, 0.0, 1e9).expand_as(norms).to(norms)


class Looking(Lowering):
    """The same, and can do without a loss, which is minus infinity where only a device knows."""

    needs_loss = False

    def thresholds(self, norms, context):
        if context.loss is None:
            return torch.ones_like(norms)
        assert not context.loss.isnan()
        return super().thresholds(norms, context)


class Halving(Threshold):
    """Reads no loss."""

    def thresholds(self, norms, context):
        return norms / 2


def place_of() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks."""
    return distributed.get_rank(), distributed.get_world_size()


def parameters_on(layout: str) -> tuple[dict[str, nn.Parameter], Ranks | None]:
    """Return the parameters of this rank by name, and the option for their ranks."""
    rank, count = place_of()
    full = full_gradients()
    if layout == "one mesh":
        return {name: spread_parameter(g, "one", "0") for name, g in full.items()}, None
    if layout == "two meshes":  # the second one of half of the ranks
        meshes = dict(zip(full, ("two", "two", "a", "b"), strict=True))
        words = {"two": "0 R", "a": "0", "b": "0"}
        spread = {n: spread_parameter(full[n], m, words[m]) for n, m in meshes.items()}
        return spread, None
    if layout == "stages of a mesh":
        own = [*full][mesh_of("a").get_local_rank() :: 2]
        named = {name: spread_parameter(full[name], "b", "0") for name in own}
        return named, Ranks(mesh_of("a"))
    if layout == "copies":
        return {name: parameter_with(gradient) for name, gradient in full.items()}, Ranks(
            replicated="*"
        )
    if layout == "all on the first":
        full = full if rank == 0 else {}
    own = [*full] if layout == "all on the first" else [*full][rank::count]
    named = {name: parameter_with(full[name]) for name in own}
    return named or {"none": parameter_with(None)}, Ranks()


def steps_with(losses: list[list[float | None]], layout: str, on_device: bool, **options: Any):
    """Take a step with the loss of this rank in each row; return losses, skips and collectives."""
    rank, count = place_of()
    named, ranks = parameters_on(layout)
    optimizer = torch.optim.SGD([*named.items()], lr=0.1)
    sink, found = MemorySink(), []
    with pytest.MonkeyPatch.context() as patch:
        if on_device:
            take_the_device_route(patch)
        given = {"max_norm": Lowering(), "exceed": "skip", "ranks": ranks, "log": sink} | options
        with GradientClipper(optimizer, **given) as clipper:
            for row in losses:
                own = row[rank % len(row)] if count > 2 else row[rank]
                clipper.loss = None if own is None else torch.tensor(own)
                with recorded() as calls:
                    optimizer.step()
                found.append((bool(clipper.last.skipped), len(calls)))
    return [step.loss for step in sink.steps], found


LOSSES = [[1.0, 3.0], [2.0, None], [None, 5.0], [NAN, 1.0], [9.0, 1.0], [1.0, 1.0]]
NEEDED = [2.0, 2.0, 5.0, NAN, 5.0, 1.0]
LAYOUTS = ("one mesh", "stages", "copies", "all on the first")
CASES = [*product(LAYOUTS, [2.0, INF], ["global", "parameter"], [False, True])]
QUICK = [
    ("one mesh", 2.0, "global", False),
    ("one mesh", INF, "parameter", True),
    ("stages", INF, "global", False),
    ("stages", 2.0, "parameter", True),
    ("copies", 2.0, "global", False),
    ("all on the first", 2.0, "global", False),
    ("all on the first", INF, "global", True),
]


@pytest.mark.parametrize(("layout", "order", "scope", "on_device"), quick(CASES, *QUICK))
def test_the_mean_over_the_ranks_that_gave_one(ranks, layout, order, scope, on_device):
    """It needs no collective of its own, and all ranks skip by it alike."""
    options = {"norm_type": order, "scope": scope}
    for losses, found in ranks.run(run_steps, LOSSES, layout, on_device, options):
        assert losses == pytest.approx(NEEDED, rel=1e-6, nan_ok=True)
        assert found == [(loss > 3, 1) for loss in NEEDED]


def run_steps(losses: Any, layout: str, on_device: bool, options: Any) -> Any:
    return steps_with(losses, layout, on_device, **options)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spike_of_one_rank_is_skipped_by_all(ranks, layout, on_device):
    """What the rule has learned is the same on all, too."""
    calm = [[2.0 + step % 3 / 10, 2.1] for step in range(6)]
    given = [*calm, [2.0, 9.0], [2.0, 2.0], [NAN, 2.0]]
    results = ranks.run(run_rule, given, layout, on_device)
    assert [skipped for skipped, _ in results[0][0]] == [False] * 6 + [True, False, True]
    assert all(repr(result) == repr(results[0]) for result in results)


def run_rule(losses: Any, layout: str, on_device: bool) -> Any:
    rule = MeanDeviation(6, 6, loss=True)
    _, found = steps_with(losses, layout, on_device, max_norm=rule)
    return found, rule.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["two meshes", "stages of a mesh"])
@pytest.mark.parametrize("order", [2.0, INF])
def test_meshes_within_others(four_ranks, layout, order):
    """The loss of a rank counts once, whatever number of collectives it enters."""
    given, options = [[1.0, 2.0, None, 6.0], [None] * 3 + [2.0]], {"norm_type": order}
    for losses, _ in four_ranks.run(run_steps, given, layout, False, options):
        assert losses == pytest.approx([3.0, 2.0])


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("layout", ["one mesh", "stages", "all on the first"])
@on_ranks("two_ranks")
def test_a_step_for_which_no_rank_gave_a_loss(layout, on_device):
    """The logs have none there, though the device alone may know."""
    given = [[None, None], [1.0, 3.0], [1.0, 9.0]]
    losses, found = steps_with(given, layout, on_device, max_norm=Looking(), exceed="skip")
    assert losses == [None, 2.0, 5.0]
    assert [skipped for skipped, _ in found[1:]] == [False, True]


@pytest.mark.parametrize("given", [[None, 5.0], [None, None]])
@pytest.mark.parametrize("on_device", [False, True])
@on_ranks("two_ranks")
def test_the_error_for_a_norm_names_a_loss_that_was_given(given, on_device):
    """It names none where no rank gave one, though the device alone may know."""
    own = given[distributed.get_rank()]
    with pytest.MonkeyPatch.context() as patch:
        if on_device:
            take_the_device_route(patch)
        clipper = GradientClipper(sgd([NAN]), 1.0, nonfinite="raise", ranks=Ranks())
        clipper.loss = None if own is None else torch.tensor(own)
        with pytest.raises(NonFiniteGradientError) as error:
            clipper.step()
    assert re.findall(r"The loss was (\S+)\. ", str(error.value)) == (["5"] if any(given) else [])


@pytest.mark.parametrize("layout", ["one mesh", "stages", "all on the first"])
@on_ranks("two_ranks")
def test_a_missing_loss_is_an_error_on_all_ranks(layout):
    """Where the rule needs one; a rank alone need not have it."""
    with pytest.raises(ArgumentError, match="decides by the loss of the step, and there is none"):
        steps_with([[None, None]], layout, on_device=False)
    assert steps_with([[None, 1.0]], layout, on_device=False)[0] == [1.0]


@on_ranks("two_ranks")
def test_ranks_that_would_decide_by_different_losses_are_refused():
    """As those of DistributedDataParallel, whose norms need no collective, without ``ranks=``."""
    rank = distributed.get_rank()
    needed = r'is averaged over 1 of 2 ranks, so .*: give ranks=Ranks\(replicated="\*"\) where each'
    with pytest.raises(AttachError, match=needed):
        GradientClipper(sgd([3.0, 4.0]), Lowering())
    groups = [distributed.new_group([each]) for each in range(2)]
    with pytest.warns(UserWarning, match="averaged over 1 of 2 ranks, so .* if the others train"):
        GradientClipper(sgd([3.0, 4.0]), Lowering(), ranks=Ranks(groups[rank])).close()


class Peeking(Looking):
    """Reads the loss when it learns, or when it decides as well."""

    def __init__(self, decides: bool) -> None:
        self.decides = decides

    def thresholds(self, norms, context):
        return super().thresholds(norms, context) if self.decides else norms / 2

    def observe(self, norms, clipped_norms, context):
        assert context.loss is None or not self.decides


@pytest.mark.parametrize("decides", [True, False])
@on_ranks("two_ranks")
def test_a_rule_that_reads_the_loss_of_a_rank_alone_is_refused(decides):
    """When it reads it, if it does not say before that it does; a step without one passes."""
    optimizer = sgd([3.0, 4.0])
    clipper = GradientClipper(optimizer, Peeking(decides))
    optimizer.step()
    gradient = optimizer.param_groups[0]["params"][0].grad
    before = gradient.clone()
    clipper.loss = 2.0 + distributed.get_rank()
    needed = r'is averaged over 1 of 2 ranks, so .*: give ranks=Ranks\(replicated="\*"\) where each'
    with pytest.raises(AttachError, match=needed):
        optimizer.step()
    assert torch.equal(gradient, before) or not decides


@on_ranks("two_ranks")
def test_a_rank_that_is_said_to_train_alone_reads_its_own_loss():
    """And an own rule that reads no loss clips as ever, beside losses of the ranks."""
    groups = [distributed.new_group([each]) for each in range(2)]
    own = Ranks(groups[distributed.get_rank()])
    for rule, ranks in ((Looking(), own), (Halving(), None)):
        clipper = GradientClipper(sgd([3.0, 4.0]), rule, ranks=ranks)
        clipper.loss = 2.0 + 2 * distributed.get_rank()
        clipper.step()
        above = distributed.get_rank() == 1
        assert clipper.last.threshold.item() == ((0.0 if above else 1e9) if ranks else 2.5)


@on_ranks("two_ranks")
def test_a_rank_alone_keeps_its_own_loss():
    """No collective is made for it."""
    clipper = GradientClipper(sgd([3.0, 4.0]), 1.0)
    clipper.loss = 2.0 + distributed.get_rank()
    with recorded() as calls:
        clipper.step()
    assert clipper.last.loss.item() == 2.0 + distributed.get_rank()
    assert calls == []

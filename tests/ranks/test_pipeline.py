"""Pipelines of torch.distributed.pipelining, against one process that has the whole model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy

from gradclip import GradientClipper, Ranks
from tests.support.dtensors import norms_by_label, quick, recorded

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.10", reason="pipelines of this torch do not run on gloo"
)

LETTERS, WIDTH, BLOCKS, BATCH, MICROBATCHES, STEPS = 11, 6, 8, 8, 4, 6
TIED, HEAD = "embed.weight", "head.weight"
LIMITS = {"global": 5.0, "parameter": 0.7}
SCHEDULES = ["ScheduleGPipe", "Schedule1F1B", "ScheduleInterleaved1F1B"]


class Part(nn.Module):
    """A stage with the names of the whole; the last has the embedding again, or as a head."""

    def __init__(self, stage: int, stages: int, last: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stage, self.stages = stage, stages
        self.first, self.last = stage == 0, stage == stages - 1
        embed = nn.Embedding(LETTERS, WIDTH)
        blocks = [nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS)]
        own = {str(i): block for i, block in enumerate(blocks) if i * stages // BLOCKS == stage}
        self.tied_name = TIED if self.first else last
        if self.first or self.last:
            self.add_module(self.tied_name.split(".")[0], embed)
        self.blocks = nn.ModuleDict(own)
        self.double()

    @property
    def tied(self) -> nn.Parameter:
        return self.get_parameter(self.tied_name)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.first:
            inputs = self.embed(inputs)
        for block in self.blocks.values():
            inputs = inputs + block(inputs).tanh()
        return inputs @ self.tied.T if self.last else inputs


def backward_of(kind: str, parts: list[Part]) -> Callable[[Tensor, Tensor], None]:
    from torch.distributed import pipelining

    if kind == "whole":
        return lambda letters, targets: cross_entropy(parts[0](letters), targets).backward()
    device, make = torch.device("cpu"), pipelining.PipelineStage
    stages = [make(part, part.stage, part.stages, device) for part in parts]
    given = stages if len(stages) > 1 else stages[0]
    schedule = getattr(pipelining, kind)(given, MICROBATCHES, loss_fn=cross_entropy)
    ends = distributed.new_group([0, distributed.get_world_size() - 1])

    def backward(letters: Tensor, targets: Tensor) -> None:
        inputs = (letters,) if parts[0].first else ()
        schedule.step(*inputs, target=targets if parts[-1].last else None)
        for part in parts:
            if part.first or part.last:
                distributed.all_reduce(part.tied.grad, group=ends)

    return backward


def one_name(name: str, parameter: Any) -> str | None:
    return "tokens" if name in (TIED, HEAD) else None


def trained_stages(kind: str, scope: str, last: str = TIED) -> Any:
    """Train a few steps; return the norms, weights and collectives of each, and the counters."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    own = [rank, rank + count] if kind == "ScheduleInterleaved1F1B" else [rank]
    parts = [Part(stage, count * len(own), last) for stage in own]
    ranks = Ranks(replicated=TIED if last == TIED else one_name)
    if kind == "whole":
        parts, ranks = [Part(0, 1, TIED)], None
    named = {name: p for part in parts for name, p in part.named_parameters()}
    # Names come from the stage, or where there are several from the optimizer.
    model = parts[0] if len(parts) == 1 else None
    given = [*named.items()] if model is None else model.parameters()
    optimizer = torch.optim.SGD(given, lr=0.2, momentum=0.9)
    clipper = GradientClipper(optimizer, LIMITS[scope], scope=scope, model=model, ranks=ranks)
    backward, steps = backward_of(kind, parts), []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        letters, targets = torch.randint(LETTERS, (2, BATCH), generator=generator)
        optimizer.zero_grad()
        backward(letters, targets)
        with recorded() as calls:
            optimizer.step()
        weights = {TIED if name == HEAD else name: p.detach().clone() for name, p in named.items()}
        steps.append((norms_by_label(clipper), weights, calls))
    clipper.close()
    return steps, clipper.state_dict()["counters"]


@pytest.mark.parametrize("scope", LIMITS)
@pytest.mark.parametrize("kind", quick([*SCHEDULES, "a head"], "ScheduleGPipe", "a head"))
def test_tied_weights(ranks, kind, scope):
    """Norms and weights are those of one process with the whole model: a copy counts once."""
    whole, counters = ranks.run(trained_stages, "whole", scope)[0]
    names_of_last = ("Schedule1F1B", scope, HEAD) if kind == "a head" else (kind, scope, TIED)
    results = ranks.run(trained_stages, *names_of_last)
    names: set[str] = set()
    for steps, own_counters in results:
        assert own_counters == counters
        for (norms, weights, calls), needed, first in zip(steps, whole, results[0][0], strict=True):
            assert repr(norms) == repr(first[0])  # the same bits and order on all ranks
            assert norms == pytest.approx(needed[0], rel=1e-6)
            assert calls == ["sum"]
            for name, weight in weights.items():
                torch.testing.assert_close(weight, needed[1][name], rtol=1e-9, atol=1e-12)
        names |= weights.keys()
    assert names == whole[0][1].keys()
    exceeding = {norm > LIMITS[scope] for norms, *_ in whole for norm in norms.values()}
    assert exceeding == {True, False}

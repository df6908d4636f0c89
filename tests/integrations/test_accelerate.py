"""A clipper on the optimizers that Accelerate returns, against training by hand."""

from typing import Any

import pytest
from accelerate import Accelerator

from gradclip import AttachError, GradientClipper, MemorySink
from tests.support import trainings
from tests.support.trainings import THRESHOLD, by_hand, loader, momentum, net_of


def prepared() -> Any:
    accelerator, net = Accelerator(cpu=True), net_of()
    return accelerator, *accelerator.prepare(net, momentum(net), loader())


def train_accelerated(
    accelerator: Any, net: Any, optimizer: Any, batches: Any, own: float = 0.0
) -> list[Any]:
    """Train, with a clipping by Accelerate itself if asked for; return what that returned."""
    returned = []
    for batch in batches:
        optimizer.zero_grad()
        accelerator.backward(trainings.loss_of(net, batch))
        if own:
            returned.append(float(accelerator.clip_grad_norm_(net.parameters(), own)))
        optimizer.step()
    return returned


@pytest.mark.parametrize("own", [0.5, float("inf")])
def test_the_clipping_of_accelerate(own):
    """The clipper measures after it; a norm that it was only asked for changes nothing."""
    accelerator, net, optimizer, batches = prepared()
    clipper = GradientClipper(optimizer, THRESHOLD, log=(sink := MemorySink()))
    with pytest.raises(AttachError, match="Another GradientClipper"):
        GradientClipper(optimizer.optimizer, THRESHOLD)
    returned = train_accelerated(accelerator, net, optimizer, batches, own)
    clipper.close()
    expected, norms = by_hand(before=own)
    assert trainings.norms_of(sink) == pytest.approx(norms, rel=1e-6)
    assert max(norms) == pytest.approx(min(own, max(returned)), rel=1e-4)
    assert (clipper.clip_rate() == 0) == (own < THRESHOLD)
    trainings.assert_close(net, expected)


def test_saved_states(tmp_path):
    """The clipper is saved and loaded with the accelerator's state."""
    runs = []
    for resumes in (False, True):
        accelerator, net, optimizer, batches = prepared()
        clipper = GradientClipper(optimizer, trainings.rule_of(), model=net)
        accelerator.register_for_checkpointing(clipper)
        if resumes:
            accelerator.load_state(str(tmp_path))
            assert clipper.steps == 5
        else:
            train_accelerated(accelerator, net, optimizer, [*batches][:5])
            accelerator.save_state(str(tmp_path))
        train_accelerated(accelerator, net, optimizer, [*batches][5:])
        runs.append((trainings.values(net).tolist(), str(clipper.state_dict())))
    assert runs[0] == runs[1]

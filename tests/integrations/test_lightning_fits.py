"""The callback from one fit to the next: checkpoints, copies, tuners."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import gradclip
from gradclip import (
    AttachError,
    GradientClipper,
    MemorySink,
    StateError,
)
from gradclip.integrations.lightning import GradClipCallback
from gradclip.thresholds import Schedule
from tests.integrations.lightning_runs import (
    BATCHES,
    IGNORED,
    THRESHOLD,
    adversarial,
    assert_close,
    by_hand,
    checkpoint_of,
    data,
    evaluated,
    in_turn,
    loss_of,
    norms_of,
    numbers_of,
    regression,
    rule_of,
    trainer_of,
    values,
)

pytestmark = [*IGNORED, pytest.mark.usefixtures("nothing_stays_attached")]


# Checkpoints, and fits one after the other


class LateStrategy(SingleDeviceStrategy):
    """Loads a checkpoint when the fit has started, as those do that spread a model."""

    restore_checkpoint_after_setup = True


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("steps", [5, BATCHES])
def test_a_resumed_run_makes_the_same_decisions_and_continues_the_curves(steps, late, tmp_path):
    expected = GradClipCallback(rule_of(), log=(whole := MemorySink()))
    straight = regression(training_step=in_turn)
    trainer_of(expected, max_epochs=3, max_steps=14).fit(straight, data())

    first = GradClipCallback(rule_of(), log=(begun := MemorySink()))
    module = regression(training_step=in_turn)
    path = checkpoint_of(tmp_path / "a.ckpt", [first], module, max_steps=steps)
    second = GradClipCallback(rule_of(), log=(rest := MemorySink()))
    resumed = regression(training_step=in_turn)
    strategy = LateStrategy("cpu") if late else "auto"
    trainer = trainer_of(second, max_epochs=3, max_steps=14, strategy=strategy)
    trainer.fit(resumed, data(), ckpt_path=path, weights_only=None if late else True)

    assert torch.equal(values(resumed.net), values(straight.net))
    assert numbers_of(begun) + numbers_of(rest) == numbers_of(whole)
    assert repr(second.state_dict()) == repr(expected.state_dict())
    assert second.clippers[0].steps == trainer.global_step == 14
    assert 0 < second.clippers[0].clip_rate() < 1


def test_a_run_that_is_resumed_without_a_state_counts_as_the_trainer_does(tmp_path):
    path = checkpoint_of(tmp_path / "a.ckpt", [], regression())
    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    trainer_of(callback, max_epochs=2).fit(regression(), data(), ckpt_path=path)
    assert [step.step for step in sink.steps] == [*range(BATCHES, 2 * BATCHES)]

    path = checkpoint_of(tmp_path / "b.ckpt", [], adversarial())
    callback = GradClipCallback(THRESHOLD)
    trainer_of(callback, max_epochs=2).fit(adversarial(), data(), ckpt_path=path)
    assert [clipper.steps for clipper in callback.clippers] == [2 * BATCHES] * 2


def test_a_checkpoint_of_other_clippers_is_refused(tmp_path):
    path = checkpoint_of(tmp_path / "a.ckpt", [GradClipCallback(THRESHOLD)], adversarial())
    with pytest.raises(StateError, match="of 2 clippers, and there are 1"):
        trainer_of(GradClipCallback(THRESHOLD, joint=True), max_epochs=2).fit(
            adversarial(), data(), ckpt_path=path
        )
    with pytest.raises(StateError, match="needed is the key 'clippers'"):
        GradClipCallback(THRESHOLD).load_state_dict({"steps": 3})


def test_a_second_fit_of_a_trainer_continues_and_one_of_another_begins_anew():
    callback = GradClipCallback(rule_of(), log=(sink := MemorySink()))
    module = regression()
    trainer = trainer_of(callback)
    trainer.fit(module, data())
    first = callback.clippers[0]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    assert callback.clippers[0] is not first
    assert callback.clippers[0].steps == trainer.global_step == 2 * BATCHES
    assert [step.step for step in sink.steps] == [*range(2 * BATCHES)]
    thresholds = [step.threshold for step in sink.steps]
    assert thresholds[BATCHES:] == thresholds_of([step.norm for step in sink.steps])[BATCHES:]

    trainer_of(callback).fit(regression(), data())
    assert callback.clippers[0].steps == BATCHES
    anew = sink.steps[2 * BATCHES :]
    assert [step.threshold for step in anew] == thresholds[:BATCHES]

    callback.load_state_dict(callback.state_dict())
    trainer_of(callback).fit(regression(), data())
    assert callback.clippers[0].steps == 2 * BATCHES


def test_evaluation_attaches_nothing_and_takes_no_state(tmp_path):
    first = GradClipCallback(rule_of())
    path = checkpoint_of(tmp_path / "a.ckpt", [first], regression())
    callback = GradClipCallback(rule_of())
    trainer = trainer_of(callback)
    module = evaluated()
    for evaluate in (trainer.validate, trainer.test):
        evaluate(module, data(), ckpt_path=path, verbose=False)
        assert callback.clippers == []
        assert callback.state_dict() == {}
    trainer.fit(regression(), data())
    assert callback.clippers[0].steps == BATCHES

    callback = GradClipCallback(rule_of())
    trainer_of(callback).validate(module, data(), verbose=False)
    callback.load_state_dict(first.state_dict())
    assert repr(callback.state_dict()) == repr(first.state_dict())


def test_validation_within_a_fit_disturbs_nothing():
    callback, module = GradClipCallback(THRESHOLD), evaluated()
    trainer_of(callback, val_check_interval=3).fit(module, data(), data())
    assert_close(module.net, by_hand()[0])


def thresholds_of(norms: list[float]) -> list[float]:
    """Return what the rule makes of norms."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer, found = SGD([parameter], lr=0.0), []
    with GradientClipper(optimizer, rule_of()) as clipper:
        for norm in norms:
            parameter.grad = torch.full_like(parameter, norm)
            optimizer.step()
            found.append(clipper.last.threshold.item())
    return found


class Replaces(pl.Callback):
    """Has other optimizers made at a batch in the middle."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            trainer.strategy.setup_optimizers(trainer)


def test_optimizers_that_are_replaced_are_clipped_as_the_first_were():
    def plain(self: Any) -> Any:
        return SGD(self.parameters(), lr=0.05)

    callbacks = [GradClipCallback(rule_of(), log=MemorySink()) for _ in range(2)]
    nets = []
    for callback, others in zip(callbacks, ([], [Replaces(5)]), strict=True):
        module = regression(configure_optimizers=plain)
        trainer_of(*others, callback, max_epochs=2).fit(module, data())
        nets.append(module.net)
    torch.testing.assert_close(values(nets[0]), values(nets[1]), rtol=0, atol=0)
    states = [repr(callback.state_dict()) for callback in callbacks]
    assert states[0] == states[1]
    logs = [numbers_of(callback._logs[0]) for callback in callbacks]
    assert logs[0] == logs[1]
    assert [row[0] for row in logs[1]] == [*range(2 * BATCHES)]


def test_an_optimizer_of_other_parameters_has_a_clipper_that_begins_anew():
    def head(self: Any) -> Any:
        trained = self.net[2] if self.trainer.global_step else self
        return SGD(trained.parameters(), lr=0.05)

    callback = GradClipCallback(rule_of(), scope="parameter", log=(sink := MemorySink()))
    with pytest.warns(UserWarning, match="replaced by one whose clipper begins anew: .*label"):
        trainer_of(Replaces(5), callback).fit(regression(configure_optimizers=head), data())
    assert callback.clippers[0].labels == ("net.2.weight", "net.2.bias")
    assert callback.clippers[0].steps == BATCHES
    assert [*dict.fromkeys(step.step for step in sink.steps)] == [*range(BATCHES)]


def test_an_optimizer_that_is_replaced_within_a_batch_is_refused():
    class Within(pl.Callback):
        def on_before_backward(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.strategy.setup_optimizers(trainer)

    def step(self: Any, batch: Any, index: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(loss_of(self.net, batch, index))
        self.optimizers().step()

    module = regression(automatic_optimization=False, training_step=step)
    with pytest.raises(AttachError, match="SGD came into the fit within a batch"):
        trainer_of(Within(), GradClipCallback(THRESHOLD)).fit(module, data())


class SuddenError(Exception):
    pass


def test_an_exception_detaches_and_writes_what_was_seen():
    def fail(self: Any, batch: Any, index: int) -> Tensor:
        if index == 5:
            raise SuddenError
        return loss_of(self.net, batch, index)

    callback = GradClipCallback(THRESHOLD, log=(sink := MemorySink()))
    trainer = trainer_of(callback)
    with pytest.raises(SuddenError):
        trainer.fit(regression(training_step=fail), data())
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in trainer.optimizers)
    assert norms_of(sink) == pytest.approx(by_hand()[1][:5], rel=1e-4)
    assert callback.state_dict()["clippers"][0]["steps"] == 5
    module = regression()
    trainer_of(callback).fit(module, data())
    assert_close(module.net, by_hand()[0])


def test_an_error_of_the_clipper_ends_the_fit():
    def explode(self: Any, batch: Any, index: int) -> Tensor:
        return loss_of(self.net, batch, index) * (math.nan if index == 3 else 1.0)

    callback = GradClipCallback(THRESHOLD, nonfinite="raise")
    with pytest.raises(gradclip.NonFiniteGradientError, match="net.0.weight"):
        trainer_of(callback).fit(regression(training_step=explode), data())


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda what: pickle.loads(pickle.dumps(what))], ids=["copy", "pickle"]
)
def test_a_copy_has_the_options_and_begins_anew(copier):
    callback = GradClipCallback(rule_of(), scope="parameter", joint=True, log=None)
    trainer = trainer_of(callback)
    trainer.fit(regression(), data())
    twin = copier(callback)
    assert twin.clippers == []
    assert twin.state_dict() == {}
    trainer_of(twin).fit(regression(), data())
    assert repr(twin.state_dict()) == repr(callback.state_dict())
    assert len(twin.clippers[0].labels) == 4

    waiting = GradClipCallback(rule_of(), scope="parameter", log=None)
    waiting.load_state_dict(callback.state_dict())
    assert repr(copier(waiting).state_dict()) == repr(callback.state_dict())


def test_a_copy_made_within_a_run_is_free():
    class Copies(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            twins.append(copy.deepcopy(callback))

        on_validation_batch_end = on_train_batch_end

    twins: list[GradClipCallback] = []
    callback = GradClipCallback(THRESHOLD)
    module = evaluated()
    trainer = trainer_of(callback, Copies(), limit_val_batches=1)
    trainer.validate(module, data(), verbose=False)
    trainer.fit(module, data(), data())
    assert_close(module.net, by_hand()[0])
    for twin in (twins[0], twins[-1]):
        assert twin.clippers == []
        twin.load_state_dict(callback.state_dict())
        assert twin.state_dict() == callback.state_dict()


def test_what_a_function_is_bound_to_is_not_copied():
    class Plan:
        def at(self, step: int) -> float:
            asked.append(self)
            return THRESHOLD

    asked: list[Plan] = []
    plan = Plan()
    for given in (plan.at, Schedule(plan.at)):
        module = regression()
        trainer_of(GradClipCallback(given)).fit(module, data())
        assert_close(module.net, by_hand()[0])
    assert {*map(id, asked)} == {id(plan)}


# Tuners


@pytest.mark.filterwarnings("ignore:.*litlogger")
@pytest.mark.parametrize("as_callback", [False, True])
def test_the_finder_of_learning_rates_leaves_no_trace(as_callback, tmp_path):
    def configure(self: Any) -> Optimizer:
        return SGD(self.net.parameters(), lr=self.lr, momentum=0.9)

    module = regression(configure_optimizers=configure, lr=0.05)
    callback = GradClipCallback(rule_of(), log=(sink := MemorySink()))
    finder = pl.callbacks.LearningRateFinder(num_training_steps=6, update_attr=False)
    options = {"max_epochs": 1, "default_root_dir": tmp_path}
    trainer = trainer_of(callback, *[finder] * as_callback, **options)
    if not as_callback:
        Tuner(trainer).lr_find(module, data(), num_training=6, update_attr=False)
        assert callback.state_dict() == {}
    trainer.fit(module, data())
    expected = GradClipCallback(rule_of(), log=(untuned := MemorySink()))
    straight = regression()
    trainer_of(expected).fit(straight, data())
    assert_close(module.net, straight.net)
    assert numbers_of(sink) == numbers_of(untuned)


def test_the_finder_of_batch_sizes_leaves_no_trace(tmp_path):
    module = regression(batch_size=2)
    module.train_dataloader = data
    callback = GradClipCallback(THRESHOLD)
    trainer = trainer_of(callback, default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(module, max_trials=1, steps_per_trial=2)
    assert callback.state_dict() == {}
    trainer.fit(module)
    assert callback.clippers[0].steps == BATCHES
    assert_close(module.net, by_hand()[0])

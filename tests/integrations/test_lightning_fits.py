"""The callback from one fit to the next: checkpoints, replaced optimizers, copies, tuners."""

import copy
import math
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.optim import SGD, Optimizer

from gradclip import MemorySink, NonFiniteGradientError
from gradclip.integrations.lightning import GradClipCallback
from gradclip.thresholds import Percentile, Schedule
from tests.support import lightning, trainings
from tests.support.lightning import fit
from tests.support.trainings import BATCHES, THRESHOLD, by_hand, loader

pytestmark = trainings.IGNORED

# Checkpoints, and fits one after the other


class LateStrategy(SingleDeviceStrategy):
    """Loads a checkpoint when the fit has started, as strategies do that spread a model."""

    restore_checkpoint_after_setup = True


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("steps", [5, BATCHES])
def test_a_resumed_run(steps, late, tmp_path):
    """It makes the same decisions and continues the curves."""
    sinks = [MemorySink() for _ in range(3)]
    whole, first, second = (GradClipCallback(trainings.rule_of(), log=sink) for sink in sinks)
    modules = [lightning.regression(training_step=lightning.in_turn) for _ in range(3)]
    fit(modules[0], whole, max_epochs=3, max_steps=14)
    fit(modules[1], first, max_steps=steps).save_checkpoint(tmp_path / "a.ckpt")
    strategy = LateStrategy("cpu") if late else "auto"
    trainer = lightning.trainer_of(second, max_epochs=3, max_steps=14, strategy=strategy)
    given = {"ckpt_path": str(tmp_path / "a.ckpt"), "weights_only": None if late else True}
    trainer.fit(modules[2], loader(), **given)
    assert torch.equal(trainings.values(modules[2].net), trainings.values(modules[0].net))
    numbers = [lightning.numbers_of(sink) for sink in sinks]
    assert numbers[1] + numbers[2] == numbers[0]
    assert repr(second.state_dict()) == repr(whole.state_dict())
    assert second.clippers[0].steps == trainer.global_step == 14
    assert 0 < second.clippers[0].clip_rate() < 1


@pytest.mark.parametrize("made", [lightning.regression, lightning.adversarial])
def test_a_run_resumed_without_a_state(made, tmp_path):
    """It counts on from the trainer's step."""
    fit(made(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    callback = GradClipCallback(THRESHOLD)
    fit(made(), callback, max_epochs=2, resume=str(tmp_path / "a.ckpt"))
    assert {clipper.steps for clipper in callback.clippers} == {2 * BATCHES}


def without_momentum() -> Any:
    """Return a module that trains without momentum, which an optimizer made anew has lost."""
    return lightning.regression(configure_optimizers=lambda self: SGD(self.parameters(), lr=0.05))


def plain_fit(*others: Any, epochs: int = 2) -> Any:
    callback = GradClipCallback(trainings.rule_of(), log=(sink := MemorySink()))
    trainer = fit(module := without_momentum(), *others, callback, max_epochs=epochs)
    return trainer, module, callback, sink


def test_several_fits():
    """A second fit of a trainer continues, one of another begins anew, unless a state is loaded."""
    trainer, module, callback, sink = plain_fit(epochs=1)
    first = callback.clippers[0]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert callback.clippers[0] is not first
    assert callback.clippers[0].steps == trainer.global_step == 2 * BATCHES
    fit(without_momentum(), callback)
    assert callback.clippers[0].steps == BATCHES
    expected = lightning.numbers_of(plain_fit()[-1])
    assert lightning.numbers_of(sink) == expected + expected[:BATCHES]

    callback.load_state_dict(callback.state_dict())
    fit(lightning.regression(), callback)
    assert callback.clippers[0].steps == 2 * BATCHES


def test_evaluation(tmp_path):
    """It attaches nothing, and takes no state from a checkpoint, but one that is loaded stays."""
    first = GradClipCallback(trainings.rule_of())
    fit(lightning.regression(), first).save_checkpoint(tmp_path / "a.ckpt")
    callback, module = GradClipCallback(trainings.rule_of()), lightning.evaluated()
    trainer = lightning.trainer_of(callback)
    for evaluate in (trainer.validate, trainer.test):
        evaluate(module, loader(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
        assert (callback.clippers, callback.state_dict()) == ([], {})
    trainer.fit(lightning.regression(), loader())
    assert callback.clippers[0].steps == BATCHES

    callback = GradClipCallback(trainings.rule_of())
    trainer = lightning.trainer_of(callback, gradient_clip_val=0.5)  # with which a fit is refused
    trainer.validate(module, loader(), verbose=False)
    callback.load_state_dict(first.state_dict())
    assert repr(callback.state_dict()) == repr(first.state_dict())


# Optimizers that are replaced


REPLACED = lightning.replacing("on_train_batch_end", 5)


def test_replaced_optimizers():
    """They are clipped as the first were, in the same curves."""
    runs = [plain_fit(), plain_fit(REPLACED)]
    first, second = [
        (trainings.values(module).tolist(), repr(callback.state_dict()), lightning.numbers_of(sink))
        for _, module, callback, sink in runs
    ]
    assert first == second
    assert [number[0] for number in second[2]] == [*range(2 * BATCHES)]


def test_a_replaced_optimizer_of_other_parameters():
    """It has a clipper that begins anew, with a warning, and counts on."""

    def head(self: Any) -> Any:
        return SGD((self.net[2] if self.trainer.global_step else self).parameters(), lr=0.05)

    callback = GradClipCallback(trainings.rule_of(), scope="parameter", log=(sink := MemorySink()))
    with pytest.warns(UserWarning, match="replaced by one whose clipper begins anew: .*label"):
        fit(lightning.regression(configure_optimizers=head), REPLACED, callback)
    assert callback.clippers[0].labels == ("net.2.weight", "net.2.bias")
    assert callback.clippers[0].steps == BATCHES
    assert [*dict.fromkeys(step.step for step in sink.steps)] == [*range(BATCHES)]


# Errors


class SuddenError(Exception):
    pass


@pytest.mark.parametrize("error", [SuddenError, NonFiniteGradientError])
def test_an_exception(error):
    """One of the training or of the clipper detaches and writes the steps so far."""

    def fail(self: Any, batch: Any, index: int) -> Tensor:
        if index == 5 and error is SuddenError:
            raise SuddenError("net.0.weight")
        return trainings.loss_of(self.net, batch) * (math.nan if index == 5 else 1.0)

    callback = GradClipCallback(THRESHOLD, nonfinite="raise", log=(sink := MemorySink()))
    trainer = lightning.trainer_of(callback)
    with pytest.raises(error, match=r"net\.0\.weight"):
        trainer.fit(lightning.regression(training_step=fail), loader())
    trainings.assert_free(trainer.optimizers[0])
    assert trainings.norms_of(sink)[:5] == pytest.approx(by_hand()[1][:5], rel=1e-4)
    steps = 5 if error is SuddenError else 6  # a step that raises counts
    assert callback.state_dict()["clippers"][0]["steps"] == len(sink.steps) == steps
    fit(module := lightning.regression(), callback)
    trainings.assert_close(module.net, by_hand()[0])


# Copies


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies(copier):
    """They have the options and begin anew, or with a state that waits for a fit."""
    callback = GradClipCallback(trainings.rule_of(), scope="parameter", joint=True, log=None)
    fit(lightning.regression(), callback)
    twin = copier(callback)
    assert (twin.clippers, twin.state_dict()) == ([], {})
    fit(lightning.regression(), twin)
    assert repr(twin.state_dict()) == repr(callback.state_dict())
    assert len(twin.clippers[0].labels) == 4

    waiting = GradClipCallback(trainings.rule_of(), scope="parameter", log=None)
    waiting.load_state_dict(callback.state_dict())
    assert repr(copier(waiting).state_dict()) == repr(callback.state_dict())


def test_copies_made_within_a_run():
    """They are free, and take a state."""
    twins: list[GradClipCallback] = []
    hooks = ("on_train_batch_end", "on_validation_batch_end")
    copies = dict.fromkeys(hooks, lambda *_: twins.append(copy.deepcopy(callback)))
    callback, module = GradClipCallback(THRESHOLD), lightning.evaluated(**copies)
    trainer = lightning.trainer_of(callback, limit_val_batches=1)
    trainer.validate(module, loader(), verbose=False)
    trainer.fit(module, loader(), loader())
    trainings.assert_close(module.net, by_hand()[0])
    for twin in (twins[0], twins[-1]):
        assert twin.clippers == []
        twin.load_state_dict(callback.state_dict())
        assert twin.state_dict() == callback.state_dict()


def test_bound_functions():
    """The object that a schedule is bound to is not copied."""

    class Asked(list):
        def at(self, step: int) -> float:
            self.append(step)
            return THRESHOLD

    for max_norm in ((asked := Asked()).at, Schedule(asked.at)):
        fit(module := lightning.regression(), GradClipCallback(max_norm))
        trainings.assert_close(module.net, by_hand()[0])
    assert {*asked} == {*range(BATCHES)}


# Tuners


TUNINGS = {
    "callback": lambda tuner, module: None,
    "rates": lambda tuner, module: tuner.lr_find(module, num_training=6, update_attr=False),
    "sizes": lambda tuner, module: tuner.scale_batch_size(module, max_trials=1, steps_per_trial=2),
}


@pytest.mark.filterwarnings("ignore:.*litlogger")
@pytest.mark.parametrize("tuning", TUNINGS)
def test_tuners(tuning, tmp_path):
    """Those of learning rates and of batch sizes leave no trace."""

    def configure(self: Any) -> Optimizer:
        return SGD(self.net.parameters(), lr=self.lr, momentum=0.9)

    tuned = {"lr": 0.05, "batch_size": 2, "train_dataloader": lambda _: loader()}
    module = lightning.regression(configure_optimizers=configure, **tuned)
    callback = GradClipCallback(trainings.rule_of(), log=(sink := MemorySink()))
    finder = pl.callbacks.LearningRateFinder(num_training_steps=6, update_attr=False)
    finders = [finder] * (tuning == "callback")
    trainer = lightning.trainer_of(callback, *finders, default_root_dir=tmp_path)
    TUNINGS[tuning](Tuner(trainer), module)
    assert callback.state_dict() == {}
    trainer.fit(module)
    untuned = GradClipCallback(trainings.rule_of(), log=(expected := MemorySink()))
    fit(straight := lightning.regression(), untuned)
    trainings.assert_close(module.net, straight.net)
    assert lightning.numbers_of(sink) == lightning.numbers_of(expected)


# Groups that a callback adds, and adds again before a resumed fit


class Unfreezing(pl.callbacks.BaseFinetuning):
    """Gives the optimizer the first layer after an epoch; at a resume Lightning does it again."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.02)


def finetuned(self: Any) -> Any:
    trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9)


def unfreeze(self: Any) -> None:
    """Train what the optimizer has: Lightning freezes it anew at a resume."""
    for group in self.optimizers().param_groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)


@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_resumed_fit_with_groups_that_a_callback_added(tmp_path, scope, order):
    """It goes on exactly, whichever callback comes first."""
    overrides = {"configure_optimizers": finetuned, "on_train_start": unfreeze}

    def fit_for(epochs: int, resume: Any = None) -> tuple[Any, GradClipCallback, Any]:
        module = lightning.regression(**overrides)
        clipping = GradClipCallback(Percentile(50, window=6), scope=scope, log=None)
        both = [clipping, Unfreezing()]
        callbacks = both if order == "before" else both[::-1]
        trainer = fit(module, *callbacks, max_epochs=epochs, resume=resume)
        return module, clipping, trainer

    needed, clipping, _ = fit_for(4)
    path = tmp_path / "half.ckpt"
    fit_for(2)[2].save_checkpoint(path)
    module, resumed, _ = fit_for(4, resume=path)
    assert resumed.clippers[0].labels == clipping.clippers[0].labels
    assert resumed.clippers[0].steps == 4 * BATCHES
    ours, theirs = (each.clippers[0].state_dict() for each in (resumed, clipping))
    assert ours["counters"] == theirs["counters"]
    trainings.assert_close(module.net, needed.net)

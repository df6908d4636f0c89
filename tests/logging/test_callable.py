"""Any logger that takes a dict of numbers."""

import sys
from types import SimpleNamespace

import pytest

import gradclip
from gradclip import CallableSink, GradientClipper
from tests.support.curves import log_run
from tests.support.docs import SNIPPETS


def test_loggers_get_the_numbers_of_each_step_under_their_prefix():
    plain, others = {}, []
    one = CallableSink(lambda numbers, step: plain.update({step: numbers}))
    other = CallableSink(lambda numbers, _: others.append(numbers), prefix="d", per_parameter=1)
    log_run([one, other], 4.0, 1.0)
    assert [*plain] == [0, 1]
    norms = {"grad_norm/pre": 4.0, "grad_norm/post": 2.0, "grad_norm/threshold": 2.0}
    counts = {"grad_norm/nonfinite_steps": 0, "grad_norm/skipped_steps": 0}
    assert plain[0] == norms | {"grad_norm/step": 0, "grad_norm/clip_rate": 1.0} | counts
    needed = {tag.replace("grad_norm", "d"): number for tag, number in plain[0].items()}
    assert others[0] == needed | {"d/parameter_norm/group 0, parameter 0": 4.0}


def test_weights_and_biases_takes_every_step(training, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="there is no wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = training()
    with wandb.init(mode="offline", dir=tmp_path) as logger:
        logger.define_metric("grad_norm/*", step_metric="grad_norm/step")
        sink = CallableSink(lambda numbers, step: logger.log(numbers), flush_every=2)
        with GradientClipper(run.optimizer, 2.0, log=sink):
            for loss, norm in enumerate((4.0, 1.0, 3.0)):
                logger.log({"loss": loss})
                run.take(norm)
        assert logger.step == 6  # three of its own, and three that came later
        assert dict(logger.summary)["grad_norm/pre"] == 3.0
        assert dict(logger.summary)["grad_norm/step"] == 2


def test_the_snippet_for_weights_and_biases_runs(training, monkeypatch):
    """With a stand-in that keeps what it is given."""
    run, axes, logged = training(), {}, []
    names = {"gradclip": gradclip, "GradientClipper": GradientClipper, "optimizer": run.optimizer}
    standing_in = SimpleNamespace(
        define_metric=lambda name, step_metric: axes.update({name: step_metric}), log=logged.append
    )
    wandb = SimpleNamespace(init=lambda project: standing_in)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    [snippet] = [code for code in SNIPPETS if "wandb" in code]
    exec(snippet, names)
    run.take(4.0, 1.0)
    names["clipper"].close()
    assert {*axes.values()} == {"grad_norm/step"}
    assert {tag.partition("/")[0] for tag in logged[0]} <= {
        name.removesuffix("/*") for name in axes
    }
    assert [numbers["grad_norm/step"] for numbers in logged] == [0, 1]

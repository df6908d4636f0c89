from __future__ import annotations

import pytest

from gradclip import ArgumentError, CallableSink, GradientClipper


def test_a_logger_gets_the_numbers_of_each_step(training):
    run, logged = training(), []
    sink = CallableSink(lambda numbers, step: logged.append((step, numbers)))
    with GradientClipper(run.optimizer, 2.0, log=sink):
        run.take(4.0, 1.0)
    assert [step for step, _ in logged] == [0, 1]
    assert logged[0][1] == {
        "grad_norm/step": 0,
        "grad_norm/pre": 4.0,
        "grad_norm/post": 2.0,
        "grad_norm/threshold": 2.0,
        "grad_norm/clip_rate": 1.0,
        "grad_norm/nonfinite_steps": 0,
        "grad_norm/skipped_steps": 0,
    }


def test_names_and_cadence_can_be_chosen(training):
    run, logged = training(), []
    sink = CallableSink(
        lambda numbers, step: logged.append(numbers), every=2, flush_every=1, prefix="norms"
    )
    with GradientClipper(run.optimizer, None, log=sink):
        run.take(4.0, 1.0, 3.0)
        assert [numbers["norms/pre"] for numbers in logged] == [4.0, 3.0]
    assert "norms/threshold" not in logged[0]


def test_a_logger_that_fails_is_reported_once_and_training_goes_on(training):
    def log(numbers, step):
        raise ConnectionError("no route")

    run = training()
    clipper = GradientClipper(run.optimizer, 2.0, log=CallableSink(log))
    run.take(1.0)
    with pytest.warns(RuntimeWarning, match="CallableSink failed .* ConnectionError: no route"):
        clipper.close()


@pytest.mark.parametrize("log", [None, 3, "wandb", dict])
def test_what_cannot_be_called_is_refused(log):
    with pytest.raises(ArgumentError, match="give a function of a dict of numbers and the index"):
        CallableSink(log)


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

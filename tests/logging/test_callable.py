"""Any logger that takes a dict of numbers."""

import pytest

from gradclip import ArgumentError, CallableSink, GradientClipper
from tests.support.curves import TAGS, log_run


def test_logger_gets_the_numbers_of_each_step():
    logged = {}
    log_run(CallableSink(lambda numbers, step: logged.update({step: numbers})), 4.0, 1.0)
    assert [*logged] == [0, 1]
    norms = {"grad_norm/pre": 4.0, "grad_norm/post": 2.0, "grad_norm/threshold": 2.0}
    counts = {"grad_norm/nonfinite_steps": 0, "grad_norm/skipped_steps": 0}
    assert logged[0] == norms | {"grad_norm/step": 0, "grad_norm/clip_rate": 1.0} | counts


def test_prefix():
    logged = []
    sink = CallableSink(lambda numbers, step: logged.append(numbers), prefix="d", per_parameter=1)
    log_run(sink, 3.0, max_norm=None)
    tags = {tag.replace("grad_norm", "d") for tag in TAGS} - {"d/threshold"}
    assert {*logged[0]} == tags | {"d/step", "d/parameter_norm/group 0, parameter 0"}


@pytest.mark.parametrize("log", [None, 3, "wandb", dict])
def test_invalid_loggers_are_refused(log):
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

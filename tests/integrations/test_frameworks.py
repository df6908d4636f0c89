"""A clipper in each framework, against the same training by hand, on one process and on two."""

import importlib
import importlib.util
import json
import math
import sys
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest

from gradclip import ArgumentError, GradientClipper, MemorySink
from tests.support import trainings
from tests.support.frameworks import TRAININGS, Way
from tests.support.reference import gradient_norm
from tests.support.torchrun import torchrun
from tests.support.trainings import BATCHES, THRESHOLD, by_hand

pytestmark = trainings.IGNORED


def trained_by(name: str, folder: Any, clipping: Any, **way: Any) -> Any:
    package = name.split()[0]
    pytest.importorskip(package, reason=f"there is no {package}")
    return TRAININGS[name](folder, clipping, Way(**way))


WAYS = {
    "plain": {},
    "two epochs": {"epochs": 2},
    "two batches a step": {"accumulate": 2},
    "bfloat16": {"bf16": True},
}


FRAMEWORKS = ("lightning", "pytorch_lightning", "transformers", "accelerate")
CASES = [*product(FRAMEWORKS, WAYS), ("lightning", "three batches a step")]
CASES += product(("accelerate inner", "accelerate before prepare"), ["plain"])


@pytest.mark.parametrize(("name", "way"), CASES)
def test_ways_to_train(name, way, tmp_path):
    """Each step is clipped once, and its norm is the true one."""
    sink, same = MemorySink(), WAYS.get(way, {"accumulate": 3})
    net, clipper = trained_by(name, tmp_path, {"max_norm": THRESHOLD, "log": sink}, **same)
    expected, norms = by_hand(**same)
    trainings.assert_close(net, expected)
    trainings.assert_unlike(net, by_hand(**same, threshold=math.inf)[0])
    assert trainings.norms_of(sink) == pytest.approx(norms, rel=1e-6)
    assert clipper.steps == len(norms)
    assert clipper.clip_rate() == sum(norm > THRESHOLD for norm in norms) / len(norms) > 0


# The Trainer of Transformers measures the scaled gradients of the first step, which overflows.
@pytest.mark.parametrize(
    ("name", "skipped"),
    [("lightning", 3), ("transformers", 0), ("accelerate", 3), ("accelerate unscaling", 3)],
)
def test_grad_scaler(name, skipped, tmp_path):
    """Norms are true, and overflows do not count."""
    scaler = trainings.overflowing_scaler()
    clipping = {"max_norm": THRESHOLD, "log": (sink := MemorySink())}
    net, clipper = trained_by(name, tmp_path, clipping, scaler=scaler)
    assert scaler.get_scale() == 2.0**7
    expected, norms = by_hand(skipped=skipped)
    trainings.assert_close(net, expected)
    assert trainings.norms_of(sink) == pytest.approx(norms, rel=1e-6)
    assert clipper.steps == BATCHES - 1


SCRIPT = """
import json, sys, torch
from gradclip import MemorySink
from tests.integrations import test_frameworks
from tests.support import trainings

torch.set_num_threads(1)
clipping = {"max_norm": trainings.rule_of(), "log": (sink := MemorySink())}
net, clipper = test_frameworks.trained_by(sys.argv[1], "out", clipping, processes=2)
results = trainings.values(net).tolist(), repr(clipper.state_dict()), trainings.norms_of(sink)
print("\\n" + json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning", "lightning fsdp2", "transformers", "accelerate"])
def test_two_processes(name, tmp_path):
    """They agree with each other, and with one process that has the whole batches."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    printed = torchrun(script, name, processes=2, cwd=tmp_path)
    ranks = [json.loads(text.splitlines()[-1]) for text in printed]
    net, norms = trainings.net_of(), []
    optimizer = trainings.momentum(net)
    with GradientClipper(optimizer, trainings.rule_of()) as clipper:
        for batch in trainings.loader():
            optimizer.zero_grad()
            trainings.loss_of(net, batch).backward()
            norms.append(gradient_norm(net.parameters()))
            optimizer.step()
        assert 0 < clipper.clip_rate() < 1
    for rank, (weights, state, logged) in enumerate(ranks):
        assert weights == pytest.approx(trainings.values(net).tolist(), rel=1e-4, abs=1e-6)
        assert [weights, state] == ranks[0][:2]  # the state has the norms that a rule learns from
        if rank == 0 or "lightning" not in name:
            assert logged == ranks[0][2] == pytest.approx(norms, rel=1e-5)
    if "lightning" in name:  # where the first process alone logs
        from tests.support import lightning

        assert ranks[1][2] == []
        assert len(lightning.rows_in(tmp_path / "out/table")) == BATCHES
        assert len(lightning.scalars_in(tmp_path / "out/board")["grad_norm/pre"]) == BATCHES
        assert len([*(tmp_path / "out/board").iterdir()]) == 1


# Callbacks


def callback_class(framework: str) -> Any:
    pytest.importorskip(framework, reason=f"there is no {framework}")
    return importlib.import_module(f"gradclip.integrations.{framework}").GradClipCallback


REFUSED = [
    ("lightning transformers", {"exceed": "clip"}, "exceed is 'clip'"),
    ("lightning transformers", {"scope": "layer"}, "scope is 'layer'"),
    ("lightning transformers", {"norm_type": -1}, "norm_type is -1"),
    ("lightning transformers", {"max_norm": -1.0}, "max_norm is -1.0"),
    ("lightning transformers", {"scoop": "unit"}, "scoop"),
    ("lightning transformers", {"log": False}, "log is False"),
    ("lightning", {"optimizer": None}, "optimizer"),
    ("lightning", {"every": 0}, "every is 0"),
    ("lightning", {"log": [True, 5]}, "log is 5"),
    ("transformers", {"model": None}, "model was given"),
]


@pytest.mark.parametrize(
    ("framework", "options", "message"),
    [(framework, *row) for frameworks, *row in REFUSED for framework in frameworks.split()],
)
def test_options(framework, options, message):
    """They are checked when the callback is made; those that no clipper has are a TypeError."""
    error = TypeError if {"scoop", "optimizer"} & {*options} else ArgumentError
    with pytest.raises(error, match=message):
        callback_class(framework)(**{"max_norm": 1.0, **options})


LIGHTNING = ["lightning.pytorch", "pytorch_lightning"]
MISSING = [
    ("transformers", ["transformers"], r'pip install "gradclip\[transformers\]"'),
    ("lightning", LIGHTNING, r'neither .* pip install "gradclip\[lightning\]"'),
    *(("lightning", [name], "") for name in LIGHTNING),
]


@pytest.mark.parametrize(("framework", "missing", "message"), MISSING)
def test_missing_packages(framework, missing, message, monkeypatch):
    """The import says what to install; one of Lightning's packages is enough."""
    callback_class(framework)
    known = sys.modules[f"gradclip.integrations.{framework}"]
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location(known.__name__, known.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=message) if message else nullcontext():
        spec.loader.exec_module(module)
    if not message:
        bases = {base.__module__.split(".")[0] for base in module.GradClipCallback.__mro__}
        assert {"lightning", "pytorch_lightning"} - bases == {missing[0].split(".")[0]}

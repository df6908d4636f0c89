"""GradClipCallback in real Trainers, against loops that are clipped by hand."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="there is no transformers")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer  # noqa: E402

from gradclip import (  # noqa: E402
    ArgumentError,
    AttachError,
    GradientClipper,
    MemorySink,
    SkipLimitError,
    clip_grad_norm_,
)
from gradclip.integrations.transformers import GradClipCallback  # noqa: E402
from gradclip.thresholds import Percentile  # noqa: E402

pytestmark = [
    # The Trainer's data loader asks for pinned memory, also where there is no accelerator.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

THRESHOLD = 0.7
STEPS = 8
NUMBERS = {
    "grad_norm/pre",
    "grad_norm/post",
    "grad_norm/threshold",
    "grad_norm/clip_rate",
    "grad_norm/nonfinite_steps",
    "grad_norm/skipped_steps",
}


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=40,
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def texts(count: int = 32) -> list[dict[str, Tensor]]:
    words = torch.randint(0, 40, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in words]


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Batches:
    """A collator that remembers what it has made."""

    def __init__(self) -> None:
        self.made: list[dict[str, Tensor]] = []

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.made.append(default_data_collator(rows))
        return {name: value.clone() for name, value in self.made[-1].items()}


def trainer_of(folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> Any:
    model = arguments.pop("model", None) or model_of()
    kind = arguments.pop("kind", Trainer)
    optimizer = arguments.pop("optimizer", momentum)(model)
    given: dict[str, Any] = {
        "max_grad_norm": 0,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return kind(
        model,
        TrainingArguments(str(folder), **{**given, **arguments}),
        train_dataset=texts(),
        eval_dataset=texts(4),
        data_collator=Batches(),
        optimizers=(optimizer, None),
        callbacks=[*callbacks],
    )


def by_hand(
    batches: list[dict[str, Tensor]],
    *,
    threshold: float = THRESHOLD,
    accumulate: int = 1,
    bf16: bool = False,
) -> tuple[nn.Module, list[float]]:
    """Train as the Trainer does, and clip before each step; return the model and the norms."""
    model = model_of().train()
    optimizer = momentum(model)
    norms = []
    for first in range(0, len(batches), accumulate):
        parts = batches[first : first + accumulate]
        count = sum(part["labels"].numel() for part in parts)  # as the Trainer counts
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**part, num_items_in_batch=count).loss
            loss.backward()
        norms.append(float(clip_grad_norm_(model.parameters(), threshold)))
        optimizer.step()
        optimizer.zero_grad()
    return model, norms


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def entries(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def taken(trainer: Any, count: int = STEPS) -> list[dict[str, Tensor]]:
    """Return the batches that were trained with; the loader has made one more in advance."""
    evaluated = torch.stack([row["input_ids"] for row in trainer.eval_dataset])
    made = trainer.data_collator.made
    return [each for each in made if not torch.equal(each["input_ids"], evaluated)][:count]


def assert_free(optimizer: Any) -> None:
    """Assert that no clipper holds an optimizer any more."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    GradientClipper(optimizer, 1.0).close()


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=["plain", "accumulated", "bf16"],
)
def test_weights_and_norms_equal_those_of_a_loop_clipped_by_hand(tmp_path, options):
    sink = MemorySink()
    callback = GradClipCallback(THRESHOLD, log=sink)
    trainer = trainer_of(tmp_path, callback, **options)
    trainer.train()
    accumulate = options.get("gradient_accumulation_steps", 1)
    batches = taken(trainer, STEPS * accumulate)
    expected, norms = by_hand(batches, accumulate=accumulate, bf16="bf16" in options)
    assert [step.norm for step in sink.steps] == norms
    assert min(norms) < THRESHOLD < max(norms)
    assert torch.equal(values(trainer.model), values(expected))
    assert callback.clipper.steps == STEPS
    free, _ = by_hand(batches, threshold=math.inf, accumulate=accumulate, bf16="bf16" in options)
    assert (values(free) - values(expected)).abs().max() > 1e-3


def test_clipping_agrees_with_the_trainers_own(tmp_path):
    ours = trainer_of(tmp_path, GradClipCallback(THRESHOLD))
    theirs = trainer_of(tmp_path, max_grad_norm=THRESHOLD)
    ours.train()
    theirs.train()
    torch.testing.assert_close(values(ours.model), values(theirs.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", [1.0, 0.5, None])
def test_the_trainers_own_clipping_is_refused(tmp_path, own):
    trainer = trainer_of(tmp_path, GradClipCallback(1.0))
    trainer.args.max_grad_norm = own
    before = values(trainer.model).clone()
    with pytest.raises(ArgumentError, match=f"max_grad_norm={own}, .* give max_grad_norm=0"):
        trainer.train()
    assert torch.equal(values(trainer.model), before)
    trainer.args.max_grad_norm = 0
    trainer.train()
    assert_free(trainer.optimizer)


def test_options_are_checked_when_the_callback_is_made():
    for options in ({"exceed": "clip"}, {"scope": "layer"}, {"norm_type": -1}):
        with pytest.raises(ArgumentError):
            GradClipCallback(1.0, **options)
    with pytest.raises(ArgumentError):
        GradClipCallback(-1.0)
    with pytest.raises(ArgumentError, match="model was given"):
        GradClipCallback(1.0, model=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="scop"):
        GradClipCallback(1.0, scop="unit")


def test_an_optimizer_that_stands_for_others_is_refused(tmp_path):
    trainer = trainer_of(
        tmp_path, GradClipCallback(1.0), optimizer=lambda model: LayerWiseDummyOptimizer()
    )
    with pytest.raises(AttachError, match="LayerWiseDummyOptimizer holds no parameter"):
        trainer.train()


def test_labels_and_errors_have_the_names_of_the_model(tmp_path):
    callback = GradClipCallback(1.0, scope="parameter")
    trainer_of(tmp_path, callback, max_steps=1).train()
    assert "transformer.h.1.mlp.c_fc.weight" in callback.clipper.labels


# The history


def test_the_history_has_the_norms_of_the_steps_that_are_logged(tmp_path):
    trainer = trainer_of(tmp_path, GradClipCallback(THRESHOLD), eval_strategy="steps", eval_steps=3)
    trainer.train()
    _, norms = by_hand(taken(trainer))
    logged = entries(trainer)
    assert [entry["step"] for entry in logged] == [2, 4, 6, 8]
    for entry in logged:
        norm = norms[entry["step"] - 1]
        assert entry["grad_norm/pre"] == norm
        assert entry["grad_norm/post"] == pytest.approx(min(norm, THRESHOLD), rel=1e-12)
        assert entry["grad_norm/threshold"] == THRESHOLD
        so_far = norms[: entry["step"]]
        assert entry["grad_norm/clip_rate"] == sum(n > THRESHOLD for n in so_far) / len(so_far)
        # What the Trainer says of itself is the norm before clipping.
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for entry in trainer.state.log_history:
        assert NUMBERS.isdisjoint(entry) == ("loss" not in entry)


def test_what_the_trainer_reports_to_gets_them_too(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = trainer_of(tmp_path, GradClipCallback(THRESHOLD), report_to=["tensorboard"])
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    points = {point.step: point.value for point in events.Scalars("train/grad_norm/pre")}
    logged = {entry["step"]: entry["grad_norm/pre"] for entry in entries(trainer)}
    assert points == pytest.approx(logged, rel=1e-6)
    assert {f"train/{name}" for name in NUMBERS} <= {*events.Tags()["scalars"]}


class Quiet(Trainer):  # type: ignore[misc]
    """Reports, and keeps no history."""

    def log(self, logs, start_time=None):
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)


def test_a_trainer_without_a_history_reports_them(tmp_path):
    heard = []

    class Hearing(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append({*logs} >= NUMBERS)

    trainer = trainer_of(tmp_path, Hearing(), GradClipCallback(THRESHOLD), kind=Quiet)
    trainer.state.log_history.append({"step": 99})
    trainer.train()
    assert heard == [True] * (STEPS // 2) + [False]
    assert not trainer.state.log_history


def test_with_log_all_steps_go_there_and_none_to_the_history(tmp_path):
    trainer = trainer_of(tmp_path, GradClipCallback(THRESHOLD, log=str(tmp_path / "runs")))
    trainer.train()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [point.step for point in events.Scalars("grad_norm/pre")] == [*range(STEPS)]
    assert all(NUMBERS.isdisjoint(entry) for entry in trainer.state.log_history)


# The end, and the next training


def test_a_second_training_begins_anew_with_the_same_optimizer(tmp_path):
    rule = Percentile(50)
    callback = GradClipCallback(rule)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    first = callback.clipper
    assert_free(trainer.optimizer)
    trainer.train()
    assert callback.clipper is not first
    assert callback.clipper.steps == first.steps == STEPS
    assert entries(trainer)[-1]["grad_norm/clip_rate"] == callback.clipper.clip_rate()
    # Each learned for itself.
    learned = callback.clipper.state_dict()["threshold"]
    assert int(learned["counts"].max()) == STEPS
    assert_free(trainer.optimizer)


class Failing(TrainerCallback):
    """Raises at a step, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = -1
            raise KeyError("a failure")


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_has_the_options_and_begins_anew(tmp_path, copier):
    callback = GradClipCallback(Percentile(50), scope="parameter")
    trainer_of(tmp_path, callback).train()
    copied = copier(callback)
    assert copied.clipper is None
    trainer_of(tmp_path, copied).train()
    assert copied.clipper.labels == callback.clipper.labels
    assert repr(copied.clipper.state_dict()) == repr(callback.clipper.state_dict())


def test_after_an_error_the_next_training_works(tmp_path):
    callback = GradClipCallback(THRESHOLD)
    trainer = trainer_of(tmp_path, callback, Failing(3))
    with pytest.raises(KeyError):
        trainer.train()
    assert callback.clipper.steps == 3
    trainer.train()
    assert callback.clipper.steps == STEPS
    assert_free(trainer.optimizer)


def test_after_an_error_close_frees_the_optimizer(tmp_path):
    callback = GradClipCallback(1e-6, exceed="skip", skip_limit=2)
    callback.close()
    trainer = trainer_of(tmp_path, callback)
    with pytest.raises(SkipLimitError):
        trainer.train()
    callback.close()
    assert_free(trainer.optimizer)


def test_skipped_steps_leave_the_model_as_it_is(tmp_path):
    trainer = trainer_of(tmp_path, GradClipCallback(1e-6, exceed="skip"))
    before = values(trainer.model).clone()
    trainer.train()
    assert torch.equal(values(trainer.model), before)
    assert entries(trainer)[-1]["grad_norm/skipped_steps"] == STEPS


# Checkpoints

RESUMED = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}


def learning(**options: Any) -> GradClipCallback:
    return GradClipCallback(Percentile(30, window=4), scope="parameter", **options)


@pytest.mark.parametrize("restores", [False, True], ids=["default", "restoring callbacks"])
@pytest.mark.parametrize("same", [False, True], ids=["another trainer", "the same trainer"])
def test_a_resumed_training_goes_on_exactly(tmp_path, same, restores):
    options = {**RESUMED, "restore_callback_states_from_checkpoint": restores}
    sinks = [MemorySink(), MemorySink()]
    whole = learning(log=sinks[0])
    trainer = trainer_of(tmp_path, whole, **options)
    trainer.train()
    expected, state = values(trainer.model).clone(), str(whole.clipper.state_dict())
    steps = [step._replace(wall_time=0.0) for step in sinks[0].steps]

    resumed = whole if same else learning(log=sinks[1])
    if not same:
        trainer = trainer_of(tmp_path, resumed, model=model_of(5), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(values(trainer.model), expected)
    assert str(resumed.clipper.state_dict()) == state
    later = [step._replace(wall_time=0.0) for step in sinks[0 if same else 1].steps]
    assert later[-(STEPS - 3) :] == steps[3:]
    ours = [each for each in trainer.callback_handler.callbacks if isinstance(each, type(whole))]
    assert len(ours) == 1
    assert_free(trainer.optimizer)


def test_restored_callbacks_of_other_trainers_are_not_mixed_up(tmp_path):
    options = {**RESUMED, "restore_callback_states_from_checkpoint": True}
    first = learning()
    trainer_of(tmp_path, first, **options).train()
    second, other = learning(), GradClipCallback(7.0)
    trainer = trainer_of(tmp_path, second, **options)
    trainer_of(tmp_path, other, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert str(second.clipper.state_dict()) == str(first.clipper.state_dict())
    assert other.clipper is None


def test_the_checkpoint_is_json(tmp_path):
    trainer_of(tmp_path, learning(), **RESUMED).train()
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert isinstance(state["stateful_callbacks"]["GradClipCallback"]["clipper"], str)


def test_a_checkpoint_without_a_clipper_is_gone_on_from(tmp_path):
    trainer_of(tmp_path, **RESUMED).train()
    fixed = GradClipCallback(THRESHOLD)
    trainer_of(tmp_path, fixed, **RESUMED).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert fixed.clipper.steps == STEPS
    assert fixed.clipper.clip_rate() > 0
    trainer_of(tmp_path, **RESUMED).train()
    trainer = trainer_of(tmp_path, learning(), **RESUMED)
    with pytest.warns(UserWarning, match="no state of a clipper, so that its rule begins"):
        trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")


def test_a_checkpoint_of_another_clipper_is_warned_of(tmp_path):
    trainer_of(tmp_path, learning(), **RESUMED).train()
    callback = GradClipCallback(THRESHOLD)
    trainer = trainer_of(tmp_path, callback, **RESUMED)
    with pytest.warns(UserWarning, match="begins anew: The threshold is Fixed .* 'Percentile'"):
        trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert callback.clipper.steps == STEPS


def test_other_callbacks_are_restored_beside_it(tmp_path):
    options = {
        **RESUMED,
        "restore_callback_states_from_checkpoint": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    for resume in (None, f"{tmp_path}/checkpoint-3"):
        trainer = trainer_of(tmp_path, learning(), EarlyStoppingCallback(9), **options)
        trainer.train(resume_from_checkpoint=resume)
    assert len(entries(trainer)) == STEPS // 2


# Scaled losses


def test_under_a_grad_scaler_the_norms_are_true_and_overflows_do_not_count(tmp_path):
    sink = MemorySink()
    callback = GradClipCallback(THRESHOLD, log=sink)
    trainer = trainer_of(tmp_path, callback)
    # A power of 2, so that scaling changes no bits. The first scale is too large.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    trainer.accelerator.scaler = scaler
    trainer.train()
    assert scaler.get_scale() == 2.0**7
    expected, norms = by_hand(taken(trainer)[1:])
    assert [step.norm for step in sink.steps] == pytest.approx(norms, rel=1e-6)
    assert callback.clipper.steps == STEPS - 1
    torch.testing.assert_close(values(trainer.model), values(expected), rtol=1e-5, atol=1e-6)


# Norms that are not finite


def spoiling(number: float) -> Callable[..., Any]:
    class Spoiling(Trainer):  # type: ignore[misc]
        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            if self.state.global_step == 3:
                next(model.parameters()).grad[0, 0] = number
            return loss

    return Spoiling


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, number):
    trainer = trainer_of(
        tmp_path, GradClipCallback(THRESHOLD, nonfinite="skip"), kind=spoiling(number)
    )
    trainer.train()
    batches = taken(trainer)
    expected, _ = by_hand(batches[:3] + batches[4:])
    assert torch.equal(values(trainer.model), values(expected))
    assert entries(trainer)[-1]["grad_norm/nonfinite_steps"] == 1
    assert entries(trainer)[-1]["grad_norm/skipped_steps"] == 1


def test_a_step_that_the_scaler_left_out_adds_nothing_to_the_history(tmp_path):
    trainer = trainer_of(
        tmp_path, GradClipCallback(THRESHOLD), logging_steps=1, kind=spoiling(math.inf)
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.train()
    logged = entries(trainer)
    assert [NUMBERS.isdisjoint(entry) for entry in logged] == [each == 3 for each in range(STEPS)]


# Without transformers


def test_without_transformers_the_import_says_what_to_install(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError('No module named this')")
    code = "import gradclip.integrations.transformers"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert found.returncode
    assert 'pip install "gradclip[transformers]"' in found.stderr.splitlines()[-1]


def test_gradclip_alone_imports_no_transformers():
    code = "import gradclip, sys; print('transformers' in sys.modules)"
    paths = os.pathsep.join(sys.path)
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
    )
    assert found.stdout.strip() == "False"


# Several processes


def train_alone(folder: Path, batch: int) -> dict[str, Any]:
    """Train on this process's part of the batches; the script below calls it on each rank."""
    sink = MemorySink()
    trainer = trainer_of(
        folder,
        GradClipCallback(THRESHOLD, log=sink),
        per_device_train_batch_size=batch,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        max_steps=5,
        average_tokens_across_devices=True,
    )
    trainer.train()
    return {
        "norms": [step.norm for step in sink.steps],
        "weights": values(trainer.model).tolist(),
    }


@pytest.mark.slow
def test_two_processes_clip_like_one_with_the_whole_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('tests_here', {__file__!r})\n"
        "here = module_from_spec(spec)\n"
        "spec.loader.exec_module(here)\n"
        "found = here.train_alone(sys.argv[1], 2)\n"
        "with open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}.json', 'w') as file:\n"
        "    json.dump(found, file)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*command, "--nproc-per-node=2", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    whole = train_alone(tmp_path, 4)
    assert ranks[0] == ranks[1]
    assert ranks[0]["norms"] == pytest.approx(whole["norms"], rel=1e-5)
    assert ranks[0]["weights"] == pytest.approx(whole["weights"], rel=1e-4, abs=1e-6)
    assert min(whole["norms"]) < THRESHOLD < max(whole["norms"])

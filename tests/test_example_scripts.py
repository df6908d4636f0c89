"""The examples that train language models: every model, every rule of ``--clip``."""

from __future__ import annotations

import importlib
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("rules", "word_language_model", "char_gpt")
MODELS = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU", "Transformer")
RULES = ("warmup", "percentile", "zscore", "mean", "median", "average", "growth", "agc")
TINY = {
    "word_language_model": "--emsize 16 --nhid 16 --nlayers 1 --batch-size 8 --bptt 8 --dropout 0",
    "char_gpt": "--width 16 --layers 1 --heads 2 --context 16 --batch-size 8 --sample 5 --lr 0.02",
}
SHOWN = {
    "word_language_model": r"^step +(\d+)  perplexity +(\S+)  (\d+)% of the norms clipped$",
    "char_gpt": r"^step +(\d+)  nats per letter: training (\S+), validation \S+  (\d+)% of ",
}


@pytest.fixture(scope="module")
def modules():
    """The scripts as modules, imported as they are where they lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in NAMES}
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def one_thread():
    """Compute in one thread: for such small models others are in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(modules, capsys):
    """Run a script with a few options; return what it printed."""

    def run(name, options, *, steps=30, interval=10):
        given = f"{TINY[name]} --steps {steps} --log-interval {interval} {options}"
        modules[name].main(given.split())
        printed, complaints = capsys.readouterr()
        assert complaints == ""
        return printed

    return run


def curve(name, printed):
    """Return the steps, the perplexities or losses, and the shares of steps clipped, in percent."""
    rows = re.findall(SHOWN[name], printed, re.MULTILINE)
    return [list(map(float, column)) for column in zip(*rows, strict=True)]


def assert_learns(name, printed, *, steps=30, interval=10):
    shown, values, _ = curve(name, printed)
    assert shown == [*range(interval, steps + 1, interval)]
    assert all(map(math.isfinite, values))
    assert values[-1] < 0.95 * values[0]


def scalars(folder):
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: {point.step: point.value for point in reader.Scalars(tag)}
        for tag in reader.Tags()["scalars"]
    }


@pytest.mark.parametrize("model", MODELS)
def test_each_word_model_learns_and_is_clipped(run, model):
    printed = run("word_language_model", f"--model {model}")
    assert_learns("word_language_model", printed)
    assert curve("word_language_model", printed)[2][-1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["0.25", "none", *RULES])
def test_word_models_learn_with_each_rule(run, clip):
    assert_learns("word_language_model", run("word_language_model", f"--lr 4 --clip {clip}"))


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["0.25", "none", *RULES])
def test_the_gpt_learns_with_each_rule(run, clip):
    assert_learns("char_gpt", run("char_gpt", f"--clip {clip}"))


def test_the_words_of_clip_are_the_rules_that_are_tested(capsys):
    runpy.run_path(str(EXAMPLES / "rules.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert re.findall(r"^--clip (\S+)", shown, re.MULTILINE) == ["1.0", "none", *RULES]


@pytest.mark.parametrize(
    ("clip", "shown", "scope"),
    [
        ("0.25", "Fixed(0.25)", "global"),
        ("none", "None", "global"),
        ("percentile:5", "Percentile(5.0, window=1000)", "global"),
        ("zscore", "ZScore(2.5, decay=0.97, warmup=25, eps=1e-06)", "global"),
        ("growth:1.1", "GrowthLimit(1.1)", "parameter"),
        ("agc:0.02", "RelativeToWeights(0.02, eps=0.001)", "unit"),
    ],
)
def test_a_number_after_the_word_is_the_first_argument_of_the_rule(modules, clip, shown, scope):
    found = modules["rules"].clipping(clip)
    assert (repr(found["max_norm"]), found["scope"]) == (shown, scope)


@pytest.mark.parametrize("model", ["LSTM", "Transformer"])
def test_clip_holds_the_logged_norms_of_word_models_below_it(run, tmp_path, model):
    printed = run("word_language_model", f"--model {model} --clip 0.25 --log {tmp_path}")
    assert f"Curves: tensorboard --logdir {tmp_path}" in printed
    found = scalars(tmp_path)
    before, after = found["grad_norm/pre"], found["grad_norm/post"]
    assert [*before] == [*after] == [*range(30)]
    assert max(after.values()) <= 0.25
    assert max(before.values()) > 0.25
    for step, norm in before.items():
        assert after[step] == pytest.approx(min(norm, 0.25), rel=1e-6)


def test_clip_holds_the_logged_norms_of_the_gpt_below_it(run, tmp_path):
    run("char_gpt", f"--clip 0.25 --log {tmp_path}")
    found = scalars(tmp_path)
    before, after = found["grad_norm/pre"].values(), found["grad_norm/post"].values()
    assert len(before) == 30
    assert max(after) <= 0.25 < max(before)
    assert set(found["loss/training"]) == set(found["loss/validation"]) == {10, 20, 30}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_only_a_limit_that_norms_reach_changes_the_training(run, name):
    free, loose, tight = (
        curve(name, run(name, f"--lr 0.5 --clip {clip}")) for clip in ("none", "1e6", "0.1")
    )
    assert free == loose
    assert free[2] == [0, 0, 0]
    assert tight[1] != free[1]


def test_perplexities_stand_beside_the_norms_in_the_log(run, tmp_path):
    printed = run("word_language_model", f"--log {tmp_path}")
    [(trained, validated)] = re.findall(r"training (\S+), validation (\S+)$", printed, re.MULTILINE)
    found = scalars(tmp_path)
    assert found["perplexity/training"] == {30: pytest.approx(float(trained), abs=0.01)}
    assert found["perplexity/validation"] == {30: pytest.approx(float(validated), abs=0.01)}


def test_parameters_are_named_in_the_log_by_the_model(run, tmp_path):
    run("word_language_model", f"--clip growth --log {tmp_path}")
    found = scalars(tmp_path)
    assert {"parameter_norm/embed.weight", "parameter_norm/layers.weight_hh_l0"} < set(found)


@pytest.fixture
def short_text(modules, monkeypatch):
    """A text of which an epoch is 20 steps."""
    monkeypatch.setattr(modules["word_language_model"], "topics", {"": "a b, c d. " * 238})


def test_epochs_follow_each_other_until_the_steps_are_done(run, short_text):
    printed = run("word_language_model", "--epochs 9", steps=50)
    assert re.findall(r"^epoch (\d)", printed, re.MULTILINE) == ["1", "2", "3"]
    assert "of the norms in 50 steps were clipped" in printed
    printed = run("word_language_model", "--epochs 2", steps=50)
    assert re.findall(r"^epoch (\d)", printed, re.MULTILINE) == ["1", "2"]
    assert "of the norms in 40 steps were clipped" in printed


def test_the_learning_rate_falls_where_the_validation_does_not_improve(run, short_text):
    printed = run("word_language_model", "--epochs 4 --lr 1e-6", steps=100)
    rates = re.findall(r"^epoch \d  lr (\S+)", printed, re.MULTILINE)
    assert [*map(float, rates)] == [1e-6, 1e-6, 2.5e-7, 6.25e-8]


@pytest.mark.parametrize("model", MODELS)
def test_recurrent_models_carry_their_state_from_piece_to_piece(modules, model):
    words = modules["word_language_model"]
    options = words.parsed([*TINY["word_language_model"].split(), f"--model={model}", "--bptt=40"])
    kind = words.Transformer if model == "Transformer" else words.Recurrent
    network, text = kind(options, 10), torch.randint(10, (81, 2))
    short, long = (words.evaluate(network, text, length).item() for length in (5, 40))
    assert (short == pytest.approx(long, rel=1e-6)) is (model != "Transformer")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["LSTM", "Transformer"])
def test_tied_layers_are_one_parameter_and_learn(run, model):
    assert_learns("word_language_model", run("word_language_model", f"--model {model} --tied"))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("word_language_model", "--tied --nhid 20", "--tied needs an --nhid that equals --emsize"),
        ("word_language_model", "--model Transformer --nhead 3", "--emsize has to be a multiple"),
        ("word_language_model", "--steps 0", "argument --steps: '0': give a whole number above 0"),
        ("word_language_model", "--bptt 3.5", "argument --bptt: '3.5': give a whole number"),
        ("char_gpt", "--heads 3", "--width has to be a multiple of --heads"),
        ("char_gpt", "--accumulate -2", "argument --accumulate: '-2': give a whole number above 0"),
        ("char_gpt", "--batch-size many", "argument --batch-size: 'many': give a whole number"),
    ],
)
def test_options_that_cannot_be_meant_are_an_error(modules, capsys, name, options, reason):
    with pytest.raises(SystemExit) as stopped:
        modules[name].main(options.split())
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_the_same_seed_trains_the_same_model(run):
    first, again, other = (
        run("word_language_model", f"--seed {seed} --dropout 0.2") for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_half_precision_and_accumulation_learn_and_are_clipped(run, tmp_path, amp):
    options = f"--amp {amp} --accumulate 2 --clip 0.25 --log {tmp_path}"
    assert_learns("char_gpt", run("char_gpt", options))
    found = scalars(tmp_path)
    assert 0.25 < max(found["grad_norm/pre"].values()) < 100  # whatever the scale
    assert max(found["grad_norm/post"].values()) <= 0.25


def test_accumulated_batches_count_as_their_mean(run, tmp_path):
    for count in (1, 4):
        run("char_gpt", f"--accumulate {count} --log {tmp_path / str(count)}", steps=1, interval=1)
    one, four = (scalars(tmp_path / count)["grad_norm/pre"][0] for count in ("1", "4"))
    assert four == pytest.approx(one, rel=0.5)


def test_the_gpt_writes_as_many_letters_as_it_is_asked_for(run):
    written = run("char_gpt", "--sample 40", steps=1).partition("engine=")[2].partition("\n")[2]
    assert len(written) == 41  # print() ends the line


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ("zscoer", "could not convert string to float: 'zscoer'"),
        ("-1", "max_norm is -1.0"),
        ("nan", "max_norm is nan"),
        ("zscore:", "could not convert"),
        ("zscore:many", "could not convert"),
        ("percentile:101", "percentile is 101.0"),
        ("agc:0", "factor is 0.0"),
        ("none:1", "could not convert"),
    ],
)
def test_a_wrong_clip_is_an_error_that_names_the_choices(modules, capsys, name, clip, reason):
    with pytest.raises(SystemExit) as stopped:
        modules[name].main([f"--clip={clip}"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert f"argument --clip: '{clip}': {reason}" in message
    assert "a number, none, or a rule" in message
    assert all(rule in message for rule in RULES)


def from_the_command_line(name, *options):
    return subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}.py", *options],
        cwd=EXAMPLES.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_each_script_runs_from_the_command_line_without_a_warning(name):
    options = f"{TINY[name]} --steps 30 --log-interval 10"
    done = from_the_command_line(name, *options.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert_learns(name, done.stdout)


@pytest.mark.slow
def test_a_wrong_clip_ends_a_script_with_status_2():
    done = from_the_command_line("char_gpt", "--clip", "zscoer")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr

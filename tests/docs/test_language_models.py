"""The examples that train language models: every model, every rule of ``--clip``."""

import importlib
import math
import re
import runpy
import sys

import pytest

from gradclip.cli.demo.training import one_thread
from tests.support.curves import steps_in, values_in
from tests.support.docs import EXAMPLES, run_example

MODULES = ("rules", "word_language_model", "char_gpt")
MODELS = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU", "Transformer")
RULES = ("warmup", "percentile", "quantile", "auto", "zscore", "mean", "median", "average")
RULES += ("growth", "agc")
WORDS, LETTERS = SCRIPTS = MODULES[1:]
TINY = {
    WORDS: "--emsize 16 --nhid 16 --nlayers 1 --batch-size 8 --bptt 8 --dropout 0",
    LETTERS: "--width 16 --layers 1 --heads 2 --context 16 --batch-size 8 --sample 5 --lr 0.02",
}
ROWS = {
    WORDS: r"^step +(\d+)  perplexity +(\S+)  (\d+)% of the norms clipped$",
    LETTERS: r"^step +(\d+)  nats per letter: training (\S+), validation \S+  (\d+)% of ",
}


@pytest.fixture(scope="module")
def modules():
    """The scripts as modules, imported where they lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in MODULES}
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def run(modules, capsys):
    """Run a script on a tiny model; return what it printed."""

    @one_thread()
    def run(name, options, *, steps=30, interval=10):
        arguments = f"{TINY[name]} --steps {steps} --log-interval {interval} {options}"
        modules[name].main(arguments.split())
        printed, complaints = capsys.readouterr()
        assert complaints == ""
        return printed

    return run


def table_rows(name, printed):
    """Return the steps, the perplexities or losses, and the shares of clipped steps in percent."""
    rows = re.findall(ROWS[name], printed, re.MULTILINE)
    return [list(map(float, column)) for column in zip(*rows, strict=True)]


def assert_learns(name, printed):
    steps, values, _ = table_rows(name, printed)
    assert steps == [10, 20, 30]
    assert all(map(math.isfinite, values))
    assert values[-1] < 0.95 * values[0]


@pytest.mark.parametrize("model", MODELS)
def test_each_model_of_words_learns_and_is_clipped(run, tmp_path, model):
    """The log has the norms before and after clipping, and the perplexities beside them."""
    printed = run(WORDS, f"--model {model} --clip 0.25 --log {tmp_path}")
    assert_learns(WORDS, printed)
    assert table_rows(WORDS, printed)[2][-1] > 0
    assert f"Curves: tensorboard --logdir {tmp_path}" in printed
    curves = values_in(tmp_path)
    before, after = curves["grad_norm/pre"], curves["grad_norm/post"]
    assert max(after) <= 0.25 < max(before)
    assert after == pytest.approx([min(norm, 0.25) for norm in before], rel=1e-6)
    [ends] = re.findall(r"training (\S+), validation (\S+)$", printed, re.MULTILINE)
    for part, end in zip(("training", "validation"), ends, strict=True):
        assert curves[f"perplexity/{part}"] == [pytest.approx(float(end), abs=0.01)]
    steps = steps_in(tmp_path)
    assert steps["grad_norm/pre"] == steps["grad_norm/post"] == [*range(30)]
    assert steps["perplexity/training"] == steps["perplexity/validation"] == [30]
    assert "parameter_norm/embed.weight" in curves


HALF = [f"--amp {dtype} --accumulate 2" for dtype in ("bfloat16", "float16")]


@pytest.mark.parametrize("options", ["", *(pytest.param(o, marks=pytest.mark.slow) for o in HALF)])
def test_the_gpt_learns_is_clipped_and_writes_letters(run, tmp_path, options):
    """Norms are the true ones, whatever the scale."""
    printed = run(LETTERS, f"{options} --clip 0.25 --sample 40 --log {tmp_path}")
    assert_learns(LETTERS, printed)
    curves, steps = values_in(tmp_path), steps_in(tmp_path)
    assert max(curves["grad_norm/post"]) <= 0.25 < max(curves["grad_norm/pre"]) < 100
    assert options or len(curves["grad_norm/pre"]) == 30
    assert steps["loss/training"] == steps["loss/validation"] == [10, 20, 30]
    written = printed.partition("--logdir")[2].partition("\n")[2]
    assert len(written) == 41  # print() ends the line


@pytest.mark.slow
@pytest.mark.parametrize("clip", ["0.25", "none", *RULES])
@pytest.mark.parametrize(("name", "options"), [(WORDS, "--lr 4"), (LETTERS, "")])
def test_models_learn_with_each_rule(run, name, options, clip):
    assert_learns(name, run(name, f"{options} --clip {clip}"))


def test_epochs_end_with_the_steps_and_lower_the_learning_rate(run, modules, monkeypatch):
    """Where the validation does not improve; an epoch of this text has 20 steps."""
    monkeypatch.setattr(modules[WORDS], "topics", {"": "a b, c d. " * 238})
    printed = run(WORDS, "--epochs 9", steps=50)
    assert re.findall(r"^epoch (\d)", printed, re.MULTILINE) == ["1", "2", "3"]
    assert "of the norms in 50 steps were clipped" in printed
    printed = run(WORDS, "--epochs 4 --lr 1e-6", steps=100)
    rates = re.findall(r"^epoch \d  lr (\S+)", printed, re.MULTILINE)
    assert [*map(float, rates)] == [1e-6, 1e-6, 2.5e-7, 6.25e-8]
    assert "of the norms in 80 steps were clipped" in printed


def test_the_rules_of_clip_are_those_that_are_tested(modules, capsys):
    runpy.run_path(str(EXAMPLES / "rules.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.findall(r"^--clip (\S+)", printed, re.MULTILINE) == ["1.0", "none", *RULES]
    options = modules["rules"].clipping("agc:0.02")
    assert (options["scope"], options["max_norm"].factor) == ("unit", 0.02)


INVALID = {
    "zscoer": "could not convert string to float: 'zscoer'",
    "-1": "max_norm is -1.0",
    "percentile:101": "percentile is 101.0",
    **dict.fromkeys(("zscore:many", "none:1"), "could not convert"),
}


@pytest.mark.parametrize(
    ("name", "option", "reason"),
    [
        (WORDS, "--tied --nhid 20", "--tied needs an --nhid that equals --emsize"),
        (WORDS, "--model Transformer --nhead 3", "--emsize has to be a multiple"),
        (WORDS, "--steps 0", "argument --steps: '0': give a whole number above 0"),
        (WORDS, "--bptt 3.5", "argument --bptt: '3.5': give a whole number"),
        (LETTERS, "--heads 3", "--width has to be a multiple of --heads"),
        (LETTERS, "--accumulate -2", "argument --accumulate: '-2': give a whole number above 0"),
        *(
            (name, f"--clip={clip}", f"argument --clip: '{clip}': {reason}")
            for name in SCRIPTS
            for clip, reason in INVALID.items()
        ),
    ],
)
def test_an_invalid_option_is_an_error(modules, capsys, name, option, reason):
    with pytest.raises(SystemExit) as stopped:
        modules[name].main(option.split())
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert reason in message
    if "--clip" in option:
        assert "a number, none, or a rule" in message
        assert all(rule in message for rule in RULES)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_runs_from_the_command_line_without_a_warning(name):
    options = f"{TINY[name]} --steps 30 --log-interval 10"
    assert_learns(name, run_example(f"{name}.py", *options.split()))

"""The command line, as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points

import pytest

import gradclip
from gradclip import GradientClipper, JsonlSink
from gradclip.cli.main import main

WITHOUT_THE_EXTRA = """
import sys
sys.modules["matplotlib"] = sys.modules["rich"] = None
from gradclip.cli import main
sys.exit(main(["demo", "--steps", "2", "--out", {out!r}]))
"""

# A shell that starts the tests in the background may have them ignore SIGINT.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from gradclip.cli import main
sys.exit(main(["demo", "--steps", "100000"]))
"""


def refused(capsys, *arguments):
    """Return the one line on stderr with which the arguments are refused."""
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1
    return printed.err


# Help


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gradclip {gradclip.__version__}\n"


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "report" in printed


def test_help_of_the_demo_names_its_options_and_their_defaults(capsys):
    assert main(["demo", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("--steps", "--seed", "--max-norm", "--out", "{rnn-tanh,rnn-relu,lstm,gru}"):
        assert part in printed
    for start in ("(default: 300)", "(default: 1.0)", "(default: rnn-tanh)", "(default: demo)"):
        assert start in printed


def test_the_script_calls_main():
    [script] = entry_points(group="console_scripts", name="gradclip")
    assert script.load() is main


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "found", "needed"),
    [
        (["--steps", "0"], "--steps: found '0'", "give a whole number >= 1"),
        (["--steps", "-3"], "--steps: found '-3'", "give a whole number >= 1"),
        (["--steps", "2.5"], "--steps: found '2.5'", "give a whole number >= 1"),
        (["--steps", "many"], "--steps: found 'many'", "give a whole number >= 1"),
        (["--steps", ""], "--steps: found ''", "give a whole number >= 1"),
        (["--seed", "-1"], "--seed: found '-1'", "give a whole number, 0 to 2^63 - 1"),
        (["--seed", str(2**63)], f"--seed: found '{2**63}'", "give a whole number"),
        (["--seed", "x"], "--seed: found 'x'", "give a whole number"),
        (["--max-norm", "-1"], "--max-norm: found '-1'", "give a finite number >= 0"),
        (["--max-norm", "nan"], "--max-norm: found 'nan'", "give a finite number >= 0"),
        (["--max-norm", "inf"], "--max-norm: found 'inf'", "give a finite number >= 0"),
        (["--max-norm=-inf"], "--max-norm: found '-inf'", "give a finite number >= 0"),
        (["--max-norm", "big"], "--max-norm: found 'big'", "give a finite number >= 0"),
        (["--cell", "rnn"], "--cell: invalid choice: 'rnn'", "rnn-tanh"),
        (["--cell", "LSTM"], "--cell: invalid choice: 'LSTM'", "lstm"),
        (["--step", "3"], "--step", "see 'gradclip --help'"),
        (["--steps"], "--steps: expected one argument", "see 'gradclip demo --help'"),
        (["extra"], "extra", "see 'gradclip --help'"),
    ],
    ids=" ".join,
)
def test_a_bad_option_is_refused_in_one_line(capsys, tmp_path, arguments, found, needed):
    line = refused(capsys, "demo", "--out", str(tmp_path / "out"), *arguments)
    assert line.startswith("gradclip")
    assert found in line
    assert needed in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["train"]])
def test_a_missing_or_unknown_command_is_refused(capsys, arguments):
    line = refused(capsys, *arguments)
    assert "COMMAND" in line
    assert "see 'gradclip --help'" in line


@pytest.fixture
def logged(tmp_path, training):
    run = training()
    with GradientClipper(run.optimizer, 2.0, log=JsonlSink(tmp_path / "run.jsonl")):
        run.take(*[1.0, 3.0] * 150)
    return tmp_path / "run.jsonl"


def test_the_report_shows_a_run_and_a_line_of_code(capsys, logged):
    assert main(["report", str(logged)]) == 0
    shown = capsys.readouterr().out
    assert str(logged) in shown
    assert "50.00%" in shown
    assert "    GradientClipper(optimizer, " in shown


def test_the_report_speaks_json(capsys, logged):
    assert main(["report", "--json", str(logged), str(logged)]) == 0
    first, second = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert first == second
    assert (first["steps"], first["clip_rate"], first["quantiles"]["50.0"]) == (300, 0.5, 2.0)
    assert first["advice"]["line"].startswith("GradientClipper(")


def test_the_report_warns_of_what_it_cannot_read_and_shows_the_rest(capsys, logged):
    logged.write_bytes(logged.read_bytes()[:-5])
    assert main(["report", str(logged)]) == 0
    printed = capsys.readouterr()
    assert "1 of its lines are not steps" in printed.err
    assert "299 (0 to 298)" in printed.out


def test_the_report_of_nothing_is_refused(capsys, tmp_path):
    assert "RUN" in refused(capsys, "report")
    assert "does not exist" in refused(capsys, "report", str(tmp_path / "nowhere"))
    assert "no run in it" in refused(capsys, "report", str(tmp_path))


# Folders that cannot be written


def make_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("theirs")


@pytest.mark.parametrize(
    ("out", "file", "what"),
    [
        ("out", "out", "is a file"),
        ("file/out", "file", "cannot be written (Not a directory)"),
        ("out", "out/unclipped", "is a file"),
        ("out", "out/clipped", "is a file"),
        ("out\0", "other", "it is no path"),
    ],
)
def test_a_file_in_the_way_is_refused(capsys, tmp_path, out, file, what):
    make_file(tmp_path / file)
    line = refused(capsys, "demo", "--steps", "1", "--out", f"{tmp_path}/{out}")
    assert line.startswith("gradclip demo: argument --out: found ")
    assert what in line
    assert "give a folder that can be made and written" in line
    assert (tmp_path / file).read_text() == "theirs"


def test_a_folder_in_place_of_the_picture_is_refused(capsys, tmp_path):
    (tmp_path / "demo.png").mkdir()
    line = refused(capsys, "demo", "--steps", "1", "--out", str(tmp_path))
    assert "demo.png is a folder" in line


def test_an_empty_folder_name_is_refused(capsys):
    assert "found ''" in refused(capsys, "demo", "--steps", "1", "--out", "")


def test_a_folder_that_takes_no_file_is_refused(capsys, tmp_path, monkeypatch):
    # Root may write everywhere: the file system has to refuse.
    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    line = refused(capsys, "demo", "--steps", "1", "--out", str(tmp_path))
    assert "cannot be written (Read-only file system)" in line


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc on this system")
def test_a_file_system_without_folders_is_refused(capsys):
    assert "/proc" in refused(capsys, "demo", "--steps", "1", "--out", "/proc/gradclip")


def test_a_refusal_leaves_the_logs_of_an_earlier_demo(capsys, tmp_path):
    assert main(["demo", "--steps", "1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    for path in (tmp_path / "clipped").iterdir():
        path.unlink()
    (tmp_path / "clipped").rmdir()
    (tmp_path / "clipped").write_text("theirs")
    refused(capsys, "demo", "--steps", "1", "--out", str(tmp_path))
    assert len(list((tmp_path / "unclipped").iterdir())) == 1


# Whole processes


def test_the_demo_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "gradclip", "demo", "--steps", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stderr.splitlines() if " clipping: " in line]
    assert len(shown) == 8  # progress, four lines a run
    assert "final loss" in done.stdout
    assert (tmp_path / "demo/demo.png").exists()


@pytest.mark.slow
def test_the_demo_runs_without_the_extra(tmp_path):
    code = WITHOUT_THE_EXTRA.format(out=str(tmp_path))
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "final loss" in done.stdout
    assert 'pip install "gradclip[report]"' in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clipped", "unclipped"]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for other processes on Windows")
def test_ctrl_c_ends_it_with_a_line(tmp_path):
    command = [sys.executable, "-c", INTERRUPTIBLE]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as demo:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("demo/unclipped/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        demo.send_signal(signal.SIGINT)
        _, said = demo.communicate(timeout=60)
    assert demo.returncode == 130
    last = said.splitlines()[-1]
    assert last == "gradclip demo: interrupted; what was logged until then is in demo"
    assert "KeyboardInterrupt" not in said


# Pictures of runs


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_report_draws_runs_and_says_where(capsys, logged, tmp_path, ending):
    path = tmp_path / f"report.{ending}"
    assert main(["report", str(logged), str(logged), "--plot", str(path)]) == 0
    printed = capsys.readouterr()
    assert "    GradientClipper(optimizer, " in printed.out
    assert printed.err == f"Picture: {path}\n"
    begin = b"\x89PNG\r\n\x1a\n" if ending == "png" else b"<?xml"
    assert path.read_bytes().startswith(begin)


def test_the_report_still_speaks_json_alone_when_it_draws(capsys, logged, tmp_path):
    assert main(["report", "--json", "--plot", f"{tmp_path}/a.png", str(logged)]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[0]["steps"] == 300


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("a.pdf", "ends with .png or .svg"),
        ("a", "ends with .png or .svg"),
        ("", "ends with .png or .svg"),
        ("folder.png", "is a folder"),
        ("nowhere/a.png", "There is no folder"),
    ],
)
def test_a_picture_that_cannot_be_is_refused_before_anything_is_read(
    capsys, logged, tmp_path, monkeypatch, path, what
):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.iterdir())
    assert what in refused(capsys, "report", str(logged), "--plot", path)
    assert what in refused(capsys, "report", "nothing.jsonl", "--plot", path)
    assert sorted(tmp_path.iterdir()) == there


def test_too_many_runs_for_a_picture_are_refused(capsys, logged, tmp_path):
    line = refused(capsys, "report", *[str(logged)] * 13, "--plot", str(tmp_path / "a.png"))
    assert "Found 13 runs: a picture has room for 12" in line
    assert not (tmp_path / "a.png").exists()


def test_a_picture_without_matplotlib_names_the_extra(capsys, logged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused(capsys, "report", str(logged), "--plot", str(tmp_path / "a.png"))
    assert 'pip install "gradclip[report]"' in line
    assert main(["report", str(logged)]) == 0

"""The command line: help, refusals in one line, pictures of reports, and whole processes."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from unittest.mock import Mock

import pytest

import gradclip
from gradclip.cli import main
from tests.support.report import log_norms

WHOLE, FINITE, SUFFIX = "a whole number >= 1", "a finite number >= 0", "ends with .png or .svg"
PAGE_SUFFIX = "ends with .html"


@pytest.fixture
def refused(capsys):
    """Return the one line on stderr with which some arguments are refused."""

    def refused(*arguments):
        capsys.readouterr()
        assert main(list(arguments)) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.endswith("\n")
        assert printed.err.count("\n") == 1
        return printed.err

    return refused


@pytest.fixture
def logged_run(tmp_path):
    return str(log_norms(tmp_path / "run.jsonl", [1.0, 3.0] * 150, 2.0))


DEFAULTS = [f"(default: {default})" for default in ("300", "1.0", "rnn-tanh", "demo")]
DEMO = ["--steps", "--seed", "--max-norm", "--out", "{rnn-tanh,rnn-relu,lstm,gru}", *DEFAULTS]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version"], [f"gradclip {gradclip.__version__}"]),
        (["--help"], ["demo", "report"]),
        (["demo", "--help"], DEMO),
    ],
)
def test_version_and_help(capsys, arguments, words):
    """Help names options and their defaults; the installed script calls the same function."""
    [script] = entry_points(group="console_scripts", name="gradclip")
    assert script.load() is main
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert [word for word in words if word not in printed] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *((f"demo --steps={n}", f"--steps: found '{n}': give {WHOLE}") for n in (0, 2.5, "")),
        ("demo --seed -1", "--seed: found '-1': give a whole number, 0 to 2^63 - 1"),
        (f"demo --seed {2**63}", f"--seed: found '{2**63}': give a whole number"),
        ("demo --seed x", "--seed: found 'x': give a whole number"),
        *((f"demo --max-norm={n}", f"found '{n}': give {FINITE}") for n in (-1, "nan", "big")),
        ("demo --cell LSTM", "--cell: invalid choice: 'LSTM'"),
        ("demo --step 3", "see 'gradclip --help'"),
        ("demo --steps", "--steps: expected one argument (see 'gradclip demo --help')"),
        ("demo extra", "see 'gradclip --help'"),
        ("demo --out=", "found ''"),
        ("demo --out=out\0", "it is not a path"),
        ("demo --out=file", "file is a file: give a folder that can be made and written"),
        ("demo --out=file/out", "cannot be written (Not a directory)"),
        ("demo --out=taken", "clipped is a file"),
        ("demo --out=pictured", "demo.png, the path of the picture, is a folder"),
        ("demo --out=paged", "demo.html, the path of the page, is a folder"),
        ("", "COMMAND (see 'gradclip --help')"),
        ("train", "COMMAND"),
        ("report", "RUN"),
        ("report nothing.jsonl --plot a.pdf", SUFFIX),
        ("report nothing.jsonl --plot=", SUFFIX),
        ("report nothing.jsonl --plot a\0.png", SUFFIX),
        ("report nothing.jsonl --plot folder.png", "is a folder"),
        ("report nothing.jsonl --plot nowhere/a.png", "There is no folder 'nowhere'"),
        ("report nothing.jsonl --html a.htm.png", PAGE_SUFFIX),
        ("report nothing.jsonl --html=", PAGE_SUFFIX),
        ("report nothing.jsonl --html a\0.html", PAGE_SUFFIX),
        ("report nothing.jsonl --html folder.html", "is a folder"),
        ("report nothing.jsonl --html nowhere/a.html", "There is no folder 'nowhere'"),
        (f"report{13 * ' run.jsonl'} --plot a.png", "Found 13 runs: a picture has room for 12"),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    refused, tmp_path, monkeypatch, logged_run, arguments, message
):
    """Before anything is read, trained or written."""
    monkeypatch.chdir(tmp_path)
    folders = ("taken", "pictured/demo.png", "paged/demo.html", "folder.png", "folder.html")
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    for file in ("file", "taken/clipped"):
        (tmp_path / file).write_text("theirs")
    line = refused(*arguments.split(" ") if arguments else ())
    assert line.startswith("gradclip")
    assert message in line
    assert (tmp_path / "file").read_text() == (tmp_path / "taken/clipped").read_text() == "theirs"
    assert not [*tmp_path.rglob("events*"), *tmp_path.rglob("a*")]


def test_a_folder_that_cannot_be_written_is_refused(refused, tmp_path, monkeypatch):
    if os.path.isdir("/proc/self"):  # a file system without folders of others
        assert "/proc" in refused("demo", "--steps", "1", "--out", "/proc/gradclip")
    read_only = Mock(side_effect=OSError(30, "Read-only file system"))  # root may write elsewhere
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    line = refused("demo", "--steps", "1", "--out", str(tmp_path))
    assert "cannot be written (Read-only file system)" in line


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_report_is_drawn(capsys, logged_run, tmp_path, ending):
    path = tmp_path / f"report.{ending}"
    assert main(["report", logged_run, logged_run, "--plot", str(path)]) == 0
    printed = capsys.readouterr()
    assert "50.00%" in printed.out
    assert "    GradientClipper(optimizer, " in printed.out
    assert printed.err == f"Picture: {path}\n"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n" if ending == "png" else b"<?xml")
    assert main(["report", "--json", "--plot", str(path), logged_run]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[0]["steps"] == 300


def test_a_page_is_written(capsys, logged_run, tmp_path):
    """Beside the printed report, without a note on standard output."""
    path = tmp_path / "page.html"
    assert main(["report", "--json", "--html", str(path), logged_run]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out, parse_constant=pytest.fail)[0]["steps"] == 300
    assert printed.err == f"Page: {path}, to be opened in a browser\n"
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_picture_without_matplotlib_names_the_extra(refused, logged_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused("report", logged_run, "--plot", str(tmp_path / "a.png"))
    assert 'pip install "gradclip[report]"' in line
    assert main(["report", logged_run]) == 0


WITHOUT_THE_EXTRA = 'sys.modules["matplotlib"] = sys.modules["rich"] = None'
# A shell that starts the tests in the background may have them ignore SIGINT.
INTERRUPTIBLE = "signal.signal(signal.SIGINT, signal.default_int_handler)"


def demo_after(statement, steps):
    """Return a command that runs the demo after a statement; a warning is an error."""
    start = f"import signal, sys; {statement}; from gradclip.cli import main; "
    run = f"sys.exit(main(['demo', '--steps', '{steps}']))"
    return [sys.executable, "-W", "error", "-c", start + run]


def test_the_demo_runs_without_the_extra_and_without_a_warning(tmp_path):
    command = demo_after(WITHOUT_THE_EXTRA, 2)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    progress = [line for line in done.stderr.splitlines() if " clipping: " in line]
    assert len(progress) == 4
    assert "final loss" in done.stdout
    assert 'pip install "gradclip[report]"' in done.stdout
    files = sorted(path.name for path in tmp_path.glob("demo/*"))
    assert files == ["clipped", "demo.html", "unclipped"]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for other processes on Windows")
def test_ctrl_c_ends_the_demo_with_a_line(tmp_path):
    command = demo_after(INTERRUPTIBLE, 100_000)
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as demo:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("demo/unclipped/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        demo.send_signal(signal.SIGINT)
        _, printed = demo.communicate(timeout=60)
    assert demo.returncode == 130
    # Not always the last: torch 2.6 leaves a folder that Python warns of when it ends.
    assert "gradclip demo: interrupted; the logs so far are in demo" in printed.splitlines()
    assert "KeyboardInterrupt" not in printed

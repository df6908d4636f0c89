"""What the README shows is run, and what it points to for a claim is there."""

from __future__ import annotations

import ast
import inspect
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import gradclip
from gradclip import GradientClipper, MemorySink, thresholds
from gradclip.cli import main as cli
from gradclip.engines.layout import is_narrow
from gradclip.engines.native import engine as native
from gradclip.records import replays

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FRAMEWORKS = re.compile("lightning|transformers|accelerate")
EVERY = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
SNIPPETS = [code for code in EVERY if not FRAMEWORKS.search(code)]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda code: code.split("\n")[0])
def test_the_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(OrderedDict(body=nn.Linear(3, 2), head=nn.Linear(2, 1)))
    stage = nn.ModuleDict({"embed": nn.Embedding(3, 2)})
    across = "ranks=" in snippet
    names = {
        "stage": stage,
        "gradclip": gradclip,
        "GradientClipper": gradclip.GradientClipper,
        "model": model,
        "optimizer": torch.optim.SGD((stage if across else model).parameters(), lr=0.1),
        "data": [torch.ones(2, 3)] * 3,
        "loss": lambda model, batch: model(batch).sum(),
    }
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with alone_in_a_group() if across else nullcontext():
        exec(snippet, names)
    if "clipper" in names:
        names["clipper"].close()


@contextmanager
def alone_in_a_group():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def test_the_first_snippet_clips_and_logs(tmp_path, monkeypatch):
    test_the_snippets_run(SNIPPETS[0], tmp_path, monkeypatch)
    assert list((tmp_path / "runs/a").iterdir())


def test_the_options_are_those_of_the_clipper():
    shown = set(re.findall(r"^    (\w+)=", SNIPPETS[1], flags=re.MULTILINE))
    assert shown <= set(inspect.signature(gradclip.GradientClipper).parameters)


# What shows a claim: code in square brackets

PROSE = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
BRACKETS = re.compile(r"\[(`[^`]*`(?:,\s+`[^`]*`)*)\](?!\()")
HEADING = re.compile(r"^##+ (.+)$", re.MULTILINE)


def pointers_in(text: str) -> list[str]:
    return [code for each in BRACKETS.findall(text) for code in re.findall("`([^`]*)`", each)]


def sections_of(text: str) -> dict[str, str]:
    """Return what stands below each heading, up to the next one."""
    first, *rest = HEADING.split(text)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}


def bullets_of(text: str) -> list[str]:
    return re.findall(r"^- .*(?:\n  .*)*", text, flags=re.MULTILINE)


@cache
def names_of_tests(path: Path) -> list[str]:
    """Return the names of the tests in a file or a folder, as pytest collects them."""
    files = path.rglob("*.py") if path.is_dir() else [path]
    trees = [ast.parse(file.read_text()) for file in files if file.name.startswith("test_")]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [node.name for node in functions if node.name.startswith("test_")]


def missing(pointer: str) -> str | None:
    """Return what there is not of that which a pointer leads to."""
    words = shlex.split(pointer)
    if words[0].startswith("tests"):
        words = ["python", "-m", "pytest", *words]
    while "=" in words[0]:
        del words[0]
    match words:
        case ["python", "-m", "pytest", path, *options]:
            if not (ROOT / path).exists():
                return f"file {path}"
            names = names_of_tests(ROOT / path)
            match options:
                case [] if names:
                    return None
                case ["-k", word] if any(word in name for name in names):
                    return None
            return "test"
        case ["python", "-m", module, *_]:
            file = ROOT / f"{module.replace('.', '/')}.py"
            return None if file.exists() and "__main__" in file.read_text() else f"module {module}"
        case ["make", target]:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return None if target in targets else f"target {target}"
        case ["python", script, *_] | [script]:
            return None if (ROOT / script).is_file() else f"script {script}"
    return "command"


@pytest.mark.parametrize("pointer", sorted(set(pointers_in(PROSE))))
def test_what_shows_a_claim_is_there(pointer):
    assert missing(pointer) is None


def test_every_section_says_what_shows_it():
    assert [name for name, text in sections_of(PROSE).items() if not pointers_in(text)] == []


def test_every_bullet_says_what_shows_it():
    bullets = bullets_of(PROSE)
    assert len(bullets) > 30
    assert [bullet for bullet in bullets if not pointers_in(bullet)] == []


def test_no_path_or_command_in_brackets_goes_unseen():
    """One that is spelt in another way than `BRACKETS` has it would be checked by nobody."""
    opened = re.findall(r"\[`[^\]]*\](?!\()", PROSE)
    assert len(opened) == len(BRACKETS.findall(PROSE))
    assert re.findall(r"[^\[,\s]\s*`tests/[^`]*`", PROSE) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "tests/test_nothing.py",
        "tests/behaviour/clipper/test_step.py -k nothing_of_the_kind",
        "tests/behaviour/clipper/test_step.py -m closure",
        "tests/conftest.py",
        "python -m benchmarks.nothing",
        "python -m benchmarks.common.shapes",
        "python examples/nothing.py",
        "make nothing",
        ".ci/nothing",
    ],
)
def test_what_is_not_there_is_found_out(wrong):
    assert missing(wrong) is not None


def test_links_lead_somewhere():
    headings = [re.sub(r"[^\w -]", "", name).lower() for name in HEADING.findall(PROSE)]
    anchors = {name.replace(" ", "-") for name in headings}
    for link in re.findall(r"\]\(([^)]+)\)", PROSE):
        if link.startswith("#"):
            assert link[1:] in anchors
        elif not link.startswith("https://"):
            assert (ROOT / link).is_file(), link


# Claims that no other test shows: how it is installed and run


def test_the_library_knows_neither_torch_nor_python():
    """So that it is tied to no version of them. An extension of torch's knows both."""
    if not Path(native.LIBRARY).exists():
        pytest.skip("the native engine was not built")
    known = re.compile(rb"libtorch|libc10|libpython|\0_?Py[A-Z_]\w*\0")
    assert known.findall(Path(native.LIBRARY).read_bytes()) == []
    assert len(known.findall(Path(torch._C.__file__).read_bytes())) > 1


@pytest.mark.parametrize("target", ["demo", "test", "bench"])
def test_targets_make_a_venv_with_the_versions_of_the_constraints(target, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "--dry-run", f"PYTHON={sys.executable}", target]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    made = done.stdout.index(f"{sys.executable} -m venv .venv")
    installed = done.stdout.index("-m pip install --quiet --constraint constraints.txt --editable")
    assert 0 <= made < installed


def test_the_oldest_versions_are_those_that_are_said():
    text = (ROOT / "pyproject.toml").read_text()
    [torch_version] = re.findall(r'"torch>=([\d.]+)"', text)
    [python_version] = re.findall(r'^requires-python = ">=([\d.]+)"', text, re.MULTILINE)
    said = " ".join(sections_of(PROSE)["Versions"].split())
    assert f"from torch {torch_version} and Python {python_version} on" in said
    [tested] = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f"with torch {tested} and" in said


# What the table of rules says of norms and steps

ORDINARY = [1.0 + 0.1 * math.sin(step) for step in range(200)]


def fed(rule, norms, **options) -> tuple[GradientClipper, list[float], list[float]]:
    """Take a step with each norm; return the clipper, and the thresholds and norms afterwards."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    clipper = GradientClipper(optimizer, rule, **options)
    found, clipped = [], []
    for norm in norms:
        weight.grad = torch.tensor([norm])
        optimizer.step()
        found.append(clipper.last.threshold.item())
        clipped.append(weight.grad.item())
    return clipper, found, clipped


@pytest.mark.parametrize("later", [1, 64, 128, 129])
def test_of_the_rules_one_by_the_mean_misses_spikes_for_128_steps_after_one(later):
    norms = [*ORDINARY, 100.0, *ORDINARY[: later - 1], 50.0]
    clipper, _, _ = fed(thresholds.MeanDeviation(6), norms, exceed="skip")
    assert clipper.skipped == (1 if later <= 128 else 2)


def test_of_the_rules_zscore_follows_a_slow_rise():
    rising = [ORDINARY[step % 200] * 1.005**step for step in range(600)]
    assert fed(thresholds.ZScore(2.5), rising)[0].clip_rate() < 0.02
    assert rising[-1] > 15 * rising[0]


def test_of_the_rules_growth_limit_lets_norms_come_back_by_1_percent_a_step():
    _, _, clipped = fed(thresholds.GrowthLimit(1.01), [1.0, 1.0, 0.1, *[1.0] * 50])
    assert clipped[2:] == pytest.approx([0.1 * 1.01**step for step in range(51)], rel=1e-5)


def test_of_the_rules_a_number_for_each_parameter_turns_the_gradient():
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for weight, element in zip(weights, (0.5, 100.0), strict=True):
        weight.grad = torch.tensor([element])
    GradientClipper(torch.optim.SGD(weights, lr=0.0), 1.0, scope="parameter").step()
    assert [weight.grad.item() for weight in weights] == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize(
    ("rule", "steps"),
    [(thresholds.ZScore, 25), (thresholds.MeanDeviation, 63), (thresholds.MedianDeviation, 49)],
)
def test_in_the_first_steps_there_is_no_threshold_but_a_cap(rule, steps):
    assert fed(rule(), [*ORDINARY[: steps - 1], 1e6])[2][-1] == 1e6
    assert fed(rule(), [*ORDINARY[:steps], 1e6])[2][-1] < 1e6
    assert fed(rule(cap=5.0), [*ORDINARY[: steps - 1], 1e6])[2][-1] == pytest.approx(5.0)


def test_a_percentile_of_norms_that_are_mostly_idle_wants_a_floor():
    norms = [float(step % 5 > 0) for step in range(100)]  # idle in 20 % of the steps
    assert fed(thresholds.Percentile(10), norms)[2][-4:] == [0.0] * 4
    assert fed(thresholds.Percentile(10, floor=0.5), norms)[2][-4:] == [0.5] * 4
    assert fed(thresholds.Percentile(30), norms)[2][-4:] == [1.0] * 4


@pytest.mark.parametrize("rule", [thresholds.ZScore, thresholds.MovingAverage])
def test_norms_that_rise_at_once_and_for_good_are_left_out_for_good(rule):
    begun, _, _ = fed(rule(), ORDINARY, exceed="skip")
    risen, _, _ = fed(rule(), [*ORDINARY, *(10 * norm for norm in ORDINARY)], exceed="skip")
    assert risen.skipped - begun.skipped == len(ORDINARY)


# Devices, graphs, logs and the demo


@pytest.mark.usefixtures("like_a_device")
def test_torch_operators_on_a_device_multiply_also_by_1():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([0.6, 0.8 + 2**-20])
    bits, version = weight.grad.clone(), weight.grad._version
    GradientClipper(torch.optim.SGD([weight], lr=0.0), 5.0).step()
    assert weight.grad._version > version
    assert torch.equal(weight.grad, bits)


@pytest.mark.parametrize(("rows", "elements", "narrow"), [(65, 63, 1), (64, 63, 0), (65, 64, 0)])
def test_more_than_64_rows_shorter_than_64_are_left_to_torch_operators(rows, elements, narrow):
    assert is_narrow(torch.zeros(rows, elements)) == bool(narrow)


@pytest.mark.parametrize("count", [1, 10, 11, 300, 9_999])
def test_of_a_graph_as_many_records_are_kept_as_is_said(count):
    kept = replays.ReplayedRecords(torch.zeros(count)).capacity
    assert kept >= min(10_000, 100_000 // count)


def test_of_a_graph_an_incident_names_no_parameter(tape, captured):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    batch, sink = torch.ones(3, 2), MemorySink()
    clipper = GradientClipper(optimizer, 1.0, model=model, log=sink)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    def spoilt(by) -> None:
        batch.fill_(math.nan)
        by()
        batch.fill_(1.0)

    for _ in range(2):
        step()
    spoilt(step)
    with captured(), tape:
        step()
    spoilt(tape.replay)
    clipper.close()
    eager, replayed = (each.incident for each in sink.steps if each.incident)
    assert "weight" in eager
    assert "nan at step 4" in replayed
    assert "weight" not in replayed


def test_steps_are_written_in_batches_of_100(tmp_path, training):
    run = training()
    clipper = GradientClipper(run.optimizer, 1.0, log=tmp_path)
    run.take(*[1.0] * 99)
    assert not list(tmp_path.iterdir())
    run.take(1.0)
    [file] = tmp_path.iterdir()
    size = file.stat().st_size
    assert size > 0
    run.take(*[1.0] * 99)
    assert file.stat().st_size == size
    clipper.close()


def reader_of(log: Path):
    # Processes of several ranks import this file, and TensorBoard takes seconds.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(log), size_guidance={"scalars": 0})


@pytest.mark.parametrize("through_the_writer", [False, True])
def test_tensorboard_without_its_data_server_follows_one_file(
    tmp_path, training, through_the_writer
):
    from torch.utils.tensorboard import SummaryWriter

    run = training()
    writer = SummaryWriter(str(tmp_path))
    log = writer if through_the_writer else tmp_path
    reader = reader_of(tmp_path)
    with GradientClipper(run.optimizer, 1.0, log=log) as clipper:
        for _ in range(2):
            run.take(1.0)
            writer.add_scalar("loss", 1.0)
            clipper.flush()
            writer.flush()
            reader.Reload()
    writer.close()
    assert len(reader.Scalars("loss")) == 2
    assert len(reader.Scalars("grad_norm/pre")) == (2 if through_the_writer else 1)


@pytest.mark.slow
def test_the_explosion_of_the_demo_begins_in_the_recurrent_weights(tmp_path):
    assert cli.main(["demo", "--steps", "100", "--out", str(tmp_path / "demo")]) == 0
    reader = reader_of(tmp_path / "demo/unclipped").Reload()
    norms = [point.value for point in reader.Scalars("grad_norm/pre")]
    prefix = "parameter_norm/"
    tags = [tag for tag in reader.Tags()["scalars"] if tag.startswith(prefix)]
    named = {tag.removeprefix(prefix): [p.value for p in reader.Scalars(tag)] for tag in tags}
    top = norms.index(max(norms))  # how high depends on the processor: its roundings grow
    assert max(named, key=lambda name: named[name][top]).startswith("recurrent.weight")
    assert named["head.weight"][top] < 0.5 * norms[top]

"""Reports on what the loggers of trainers have written."""

import json
import math

import pytest
from torch.utils.tensorboard import SummaryWriter

from gradclip import ArgumentError
from gradclip.cli import main
from tests.support.curves import runs_in

NORMS = [3.0, 1.0, 4.0, math.nan, 2.0]
CLIPPED = [2.0, 1.0, 2.0, math.nan, 2.0]


def rows_behind(prefix: str) -> list[dict[str, float]]:
    """Return what a clipper's callback gives to a logger at each step, and a trainer's loss."""
    return [
        {
            f"{prefix}grad_norm/pre": norm,
            f"{prefix}grad_norm/post": clipped,
            f"{prefix}grad_norm/threshold": 2.0,
            f"{prefix}grad_norm/skipped_steps": float(step > 2),
            f"{prefix}parameter_norm/head.weight": norm / 2,
            f"{prefix}loss": 1.0,
        }
        for step, (norm, clipped) in enumerate(zip(NORMS, CLIPPED, strict=True))
    ]


def write_events(path, prefix: str, *, new_style: bool = False) -> None:
    """Write each number in an event of its own, as `SummaryWriter.add_scalar` does."""
    with SummaryWriter(str(path)) as writer:
        for step, numbers in enumerate(rows_behind(prefix)):
            for tag, number in numbers.items():
                writer.add_scalar(tag, number, step * 10, new_style=new_style)


def write_table(path, prefix: str) -> None:
    """Write a table as Lightning does: a row for each call of a logger, with empty cells."""
    path.mkdir(exist_ok=True)
    tags = [*rows_behind(prefix)[0], "epoch", "step"]
    lines = [",".join(tags)]
    for step, numbers in enumerate(rows_behind(prefix)):
        for part in (list(numbers)[:2], list(numbers)[2:]):
            cells = {tag: numbers[tag] for tag in part} | {"step": step * 10, "epoch": 0}
            lines.append(",".join(str(cells.get(tag, "")) for tag in tags))
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_state(path, prefix: str, count: int = 5) -> None:
    """Write a state as the Trainer of Transformers does, in which NaN is no JSON either."""
    path.mkdir(exist_ok=True, parents=True)
    history = [
        {"step": step * 10, "epoch": 0.1, **row} for step, row in enumerate(rows_behind(prefix))
    ]
    state = {"best_metric": None, "log_history": [*history[:count], {"train_runtime": 1.0}]}
    (path / "trainer_state.json").write_text(json.dumps(state))


WRITERS = {
    "events": write_events,
    "events with tensors": lambda path, prefix: write_events(path, prefix, new_style=True),
    "table": write_table,
    "state": write_state,
}


@pytest.mark.parametrize("prefix", ["", "train/", "a/b/"])
@pytest.mark.parametrize("kind", WRITERS)
def test_curves_behind_a_prefix(tmp_path, kind, prefix):
    """A run is put together from the numbers of a step, however they were written."""
    WRITERS[kind](tmp_path, prefix)
    [run] = runs_in(tmp_path)
    assert run.name.endswith(f" ({prefix}grad_norm)") == bool(prefix)
    assert run.steps.tolist() == [0, 10, 20, 30, 40]
    assert run.norms.tolist() == pytest.approx(NORMS, nan_ok=True)
    assert run.clipped_norms.tolist() == pytest.approx(CLIPPED, nan_ok=True)
    assert run.thresholds.tolist() == [2.0] * 5
    assert run.skipped.tolist() == [False] * 3 + [True, False]
    assert run.parameter_norms.names == ("head.weight",)
    assert run.clip_rate == 0.5


@pytest.mark.parametrize("tag", ["train/grad_norm", "grad_norm", "grad_2.0_norm_total"])
def test_norms_of_trainers_that_clip_by_themselves(tmp_path, tag, capsys):
    """The norm before clipping is all they log, so that the share of clipped steps is unknown."""
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(300):
            writer.add_scalar("train/learning_rate", 0.1, step)
            writer.add_scalar(tag, 1.0 + step % 7 / 10, step)
    [run] = runs_in(tmp_path)
    assert run.norms[:3].tolist() == pytest.approx([1.0, 1.1, 1.2])
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "not logged" in printed
    assert "Nothing needs clipping" in printed
    assert "never clipped" not in printed
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["clip_rate"] is None


def test_the_last_state_of_a_run_counts(tmp_path):
    """Each checkpoint has a longer log, and the event files beside them have the same."""
    for run, checkpoints in (("one", (2, 4)), ("two", (3, 10))):
        for count in checkpoints:
            write_state(tmp_path / run / f"checkpoint-{count}", "", min(count, 5))
    assert [len(run) for run in runs_in(tmp_path)] == [4, 5]
    [run] = runs_in(tmp_path / "one" / "checkpoint-2" / "trainer_state.json")
    assert len(run) == 2
    write_state(tmp_path / "one", "")
    assert [len(run) for run in runs_in(tmp_path)] == [5, 5]
    write_events(tmp_path / "one" / "runs", "train/")
    assert [run.name.split(" ")[-1] for run in runs_in(tmp_path)] == ["(train/grad_norm)"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"epoch,step,loss\n0,1,2.0\n"),
        ("metrics.csv", b"epoch,grad_norm/pre\n0,1\n"),
        ("metrics.csv", b"step,grad_norm/pre\nfirst,1\n0.5,1\n1,\n2,high\n"),
        ("metrics.csv", b"\xff\xfe\x00,\x00"),
        ("metrics.csv", b""),
        ("trainer_state.json", b'{"log_history": [{"step": 1, "loss": 2.0}, 5]}'),
        ("trainer_state.json", b'{"log_history": 5}'),
        ("trainer_state.json", b"[1, 2"),
        ("trainer_state.json", b"\xff"),
    ],
)
def test_files_without_norms(tmp_path, name, content):
    """They are no runs, and the error says what would be one."""
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ArgumentError, match="or the log of a trainer with the tag grad_norm"):
            runs_in(path)

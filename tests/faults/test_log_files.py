"""Logs that are damaged or hostile: what is whole in them is read, and a run that continues logs.

`gradclip report` is called as a user calls it: it answers, whatever a file holds.
"""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event

from gradclip import ArgumentError, GradientClipper, JsonlSink, LoggedStep, TensorBoardSink
from gradclip.cli.main import DONE, REFUSED, main
from gradclip.records.sinks.tfrecord import framed, header_of
from gradclip.report import Run, read_runs
from tests.support.curves import steps_in

STEPS = 30
DAMAGES = 60
KINDS = ("events", "jsonl")
WARNED = "(?s).*(cut short or damaged|not events of TensorBoard|of its lines are not steps)"


def where(folder: Path, kind: str) -> Path:
    return folder / ("events" if kind == "events" else "steps.jsonl")


def sink(folder: Path, kind: str) -> TensorBoardSink | JsonlSink:
    place = where(folder, kind)
    if kind == "events":
        return TensorBoardSink(place, flush_every=10, per_parameter=1)
    return JsonlSink(place, flush_every=10, per_parameter=1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def log(tmp_path: Path, training: Any, kind: str) -> Path:
    """The file of a run."""
    run = training()
    with GradientClipper(run.optimizer, 2.0, log=sink(tmp_path, kind)):
        run.take(*(1.0 + step % 5 for step in range(STEPS)))
    place = where(tmp_path, kind)
    return next(place.iterdir()) if kind == "events" else place


def run_read(path: Path) -> Run | None:
    """Return the run that is read, None where there is none; warn only of what is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", WARNED, UserWarning)
        try:
            return read_runs([path])[0]
        except ArgumentError:
            return None


def steps_read(path: Path) -> list[int]:
    run = run_read(path)
    return [] if run is None else run.steps.tolist()


def flipped(content: bytes, chance: random.Random) -> bytes:
    octets = bytearray(content)
    for _ in range(chance.choice((1, 2, 9))):
        octets[chance.randrange(len(octets))] ^= 0x80  # which makes no other number of a digit
    return bytes(octets)


def overwritten(content: bytes, chance: random.Random) -> bytes:
    begin = chance.randrange(len(content))
    return content[:begin] + chance.randbytes(50) + content[begin + 50 :]


def with_a_hole(content: bytes, chance: random.Random) -> bytes:
    begin = chance.randrange(len(content))
    return content[:begin] + content[begin + chance.randrange(1, 200) :]


def twice(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))] + content


WAYS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut short": lambda content, chance: content[: chance.randrange(len(content))],
    "flipped": flipped,
    "overwritten": overwritten,
    "a hole": with_a_hole,
    "garbage at the end": lambda content, chance: content + chance.randbytes(chance.randrange(99)),
    "garbage": lambda content, chance: chance.randbytes(chance.randrange(999)),
    "zeros at the end": lambda content, chance: content + bytes(chance.randrange(1, 9999)),
    "two beginnings": twice,
}


@pytest.mark.parametrize("way", WAYS)
def test_of_a_damaged_file_what_is_whole_is_read(log, kind, way):
    """Of an event file that is what comes before the damage, else all lines that are whole."""
    chance, content = random.Random(way), log.read_bytes()
    for _ in range(DAMAGES):
        spoilt = WAYS[way](content, chance)
        log.write_bytes(spoilt)
        found = steps_read(log)
        whole = whole_before(content, same_at_first(content, spoilt), kind)
        if way != "two beginnings":
            assert found[:whole] == [*range(whole)]
        if kind == "events" and found:
            assert run_read(log).norms.tolist() == [1.0 + step % 5 for step in found]
        if kind == "jsonl":
            left = {*spoilt.splitlines()}
            lines = content.splitlines()
            assert {*found} >= {step for step, line in enumerate(lines) if line in left}
        if kind == "events" and way not in ("garbage at the end", "zeros at the end"):
            assert len(found) <= STEPS
        if "at the end" in way:
            assert found == [*range(STEPS)]


def same_at_first(one: bytes, other: bytes) -> int:
    """Return how many bytes two files have alike before the first that differs."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def whole_before(content: bytes, end: int, kind: str) -> int:
    """Return how many steps are whole before a place in a file."""
    if kind == "jsonl":
        return content[:end].count(b"\n")
    whole, begin = 0, 0
    while begin < end:
        [length] = struct.unpack_from("<Q", content, begin)
        following = begin + 12 + length + 4
        if following > end:
            break
        event = Event.FromString(content[begin + 12 : following - 4])
        whole += any(value.tag == "grad_norm/pre" for value in event.summary.value)
        begin = following
    return whole


def test_an_empty_file_is_no_run_and_says_so(log, capsys):
    log.write_bytes(b"")
    assert main(["report", str(log)]) == REFUSED
    assert "has no steps in it (0 bytes)" in capsys.readouterr().err


def test_a_damaged_file_hides_no_other_run(log, tmp_path, kind):
    other = log.with_name(f"other-{log.name}")
    other.write_bytes(random.Random(0).randbytes(500))
    assert steps_read(tmp_path) == [*range(STEPS)]


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=" ".join)
@pytest.mark.parametrize("way", ["cut short", "flipped", "garbage at the end"])
def test_the_report_of_a_damaged_file_says_so(log, way, arguments, capsys):
    content, chance = log.read_bytes(), random.Random(3)
    log.write_bytes(content[:-7] if way == "cut short" else WAYS[way](content, chance))
    assert main(["report", str(log), *arguments]) == DONE
    printed = capsys.readouterr()
    assert f"gradclip report: {log}: " in printed.err
    assert "damaged" in printed.err or "no steps" in printed.err


@pytest.mark.parametrize("way", ["cut short", "flipped", "garbage", "overwritten"])
def test_a_run_that_continues_beside_a_damaged_file_is_logged(log, tmp_path, kind, way, training):
    content, chance = log.read_bytes(), random.Random(way)
    for _ in range(5):
        log.write_bytes(WAYS[way](content, chance))
        run = training()
        with GradientClipper(run.optimizer, 2.0, log=sink(tmp_path, kind)) as clipper:
            clipper.steps = STEPS
            run.take(*[1.0] * 15)
        found = steps_read(where(tmp_path, kind))
        assert found[-15:] == [*range(STEPS, STEPS + 15)]
        if kind == "events":
            steps = steps_in(log.parent)["grad_norm/pre"]
            assert steps[-15:] == [*range(STEPS, STEPS + 15)]
            for file in log.parent.iterdir():
                file.unlink()


# Hostile ones


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Let this process take no more than half a gigabyte on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + (1 << 29)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


LENGTHS = [1 << 31, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["events"], indirect=True)
def test_a_record_that_claims_to_be_huge_takes_no_memory(log, length, little_memory, capsys):
    """Its length is right by its checksum."""
    with log.open("ab") as file:
        file.write(header_of(length) + b"little")
    assert main(["report", "--json", str(log)]) == DONE
    printed = capsys.readouterr()
    assert json.loads(printed.out)
    assert "cut short or damaged" in printed.err


def answered(path: Path) -> None:
    """Check that the report answers, and that its JSON is some."""
    for arguments in (["--json"], []):
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", printed)
            patch.setattr("sys.stderr", io.StringIO())
            code = main(["report", *arguments, str(path)])
        assert code in (DONE, REFUSED)
        if code == DONE and arguments:
            json.loads(printed.getvalue(), parse_constant=pytest.fail)


NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from([0, -1, 1 << 53, 1 << 63, -(1 << 63), 1 << 64, 10**400, 1e308, 5e-324]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
    lambda inside: st.one_of(
        st.lists(inside, max_size=3), st.dictionaries(st.text(max_size=3), inside, max_size=3)
    ),
    max_leaves=4,
)
A_STEP = st.fixed_dictionaries(
    {
        name: st.one_of(NUMBERS, st.none(), JSON)
        for name in ("step", "norm", "clipped_norm", "threshold", "skipped")
    },
    optional={"parameter_norms": st.one_of(JSON, st.dictionaries(st.text(max_size=3), NUMBERS))},
)


@settings(max_examples=40)
@given(st.lists(st.one_of(A_STEP, JSON), max_size=6))
def test_whatever_a_line_holds_the_report_answers(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "hostile.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    answered(path)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"step":' * 20_000,
        b"9" * 100_000,
        b'{"step": 1, "norm": %s}' % (b"9" * 5000),
        b"\xff\xfe" * 1000,
        b"\x00" * 100_000,
        b'"\\ud800"',
        b"1],[2",
        b"{},{}",
    ],
    ids=lambda line: repr(line[:12]),
)
def test_a_hostile_line_is_passed_over(tmp_path, line):
    path = tmp_path / "steps.jsonl"
    step = LoggedStep(0, 0.0, 1.0, 1.0, None, 1.0, False, False, 0.0, 0, 0)
    for index in range(2):
        JsonlSink(path).write([step._replace(step=index)])
        with path.open("ab") as file:
            file.write(line + b"\n")
    assert steps_read(path) == [0, 1]


INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


@settings(max_examples=40)
@given(st.lists(st.tuples(INT64, st.floats(width=32), st.booleans()), max_size=8))
def test_whatever_an_event_holds_the_report_answers(tmp_path_factory, events):
    path = tmp_path_factory.getbasetemp() / "events.out.tfevents.0.hostile"
    contents = []
    for step, number, named in events:
        tag = f"parameter_norm/{chr(abs(step) % 0xD800)}" if named else "grad_norm/threshold"
        values = [{"tag": "grad_norm/pre", "simple_value": number}]
        values += [{"tag": "grad_norm/post", "simple_value": 1.0}]
        values += [{"tag": tag, "simple_value": number}]
        contents.append(Event(step=step, summary={"value": values}).SerializeToString())
    path.write_bytes(framed(contents))
    answered(path)


@settings(max_examples=40)
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_records_of_bytes_that_are_no_events_are_answered(tmp_path_factory, contents):
    path = tmp_path_factory.getbasetemp() / "events.out.tfevents.0.bytes"
    path.write_bytes(framed(contents))
    answered(path)

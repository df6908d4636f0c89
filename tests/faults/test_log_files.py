"""Of damaged and hostile logs, everything that is whole is read, and a run that continues logs.

`gradclip report` is called as a user calls it: it answers, whatever a file holds.
"""

import io
import json
import random
import resource
import struct
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event

from gradclip import ArgumentError, JsonlSink, LoggedStep, TensorBoardSink
from gradclip.cli import main
from tests.support.curves import framed, header_of, log_run, runs_in, steps_in

DONE, REFUSED = 0, 2
STEPS = 30
WARNED = "(?s).*(cut short or damaged|not events of TensorBoard|of its lines are not steps)"


def log_to(folder, kind, *norms, first=0):
    """Log steps with these norms; return the place of the log."""
    place = folder / {"events": "events", "jsonl": "steps.jsonl"}[kind]
    make = TensorBoardSink if kind == "events" else JsonlSink
    log_run(make(place, flush_every=10, per_parameter=1), *norms, first=first)
    return place


@pytest.fixture(params=["events", "jsonl"])
def kind(request):
    return request.param


@pytest.fixture
def log_file(tmp_path, kind):
    """The file of a run."""
    place = log_to(tmp_path, kind, *(1.0 + step % 5 for step in range(STEPS)))
    return next(place.iterdir()) if kind == "events" else place


def norms_read(path):
    """Return the norms by step, none if there is no run; warn only of damages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", WARNED, UserWarning)
        try:
            run, *_ = runs_in(path)
        except ArgumentError:
            return {}
    return dict(zip(run.steps.tolist(), run.norms.tolist(), strict=True))


def flipped(content, chance):
    octets = bytearray(content)
    for _ in range(chance.choice((1, 2, 9))):
        octets[chance.randrange(len(octets))] ^= 0x80  # which makes no other number of a digit
    return bytes(octets)


def overwritten(content, chance):
    begin = chance.randrange(len(content))
    return content[:begin] + chance.randbytes(50) + content[begin + 50 :]


def with_a_hole(content, chance):
    begin = chance.randrange(len(content))
    return content[:begin] + content[begin + chance.randrange(1, 200) :]


WAYS = {
    "cut short": lambda content, chance: content[: chance.randrange(len(content))],
    "flipped": flipped,
    "overwritten": overwritten,
    "a hole": with_a_hole,
    "garbage at the end": lambda content, chance: content + chance.randbytes(chance.randrange(99)),
    "garbage": lambda content, chance: chance.randbytes(chance.randrange(999)),
    "zeros at the end": lambda content, chance: content + bytes(chance.randrange(1, 9999)),
    "two beginnings": lambda content, chance: content[: chance.randrange(len(content))] + content,
}


@pytest.mark.parametrize("way", WAYS)
def test_damaged_file(log_file, kind, way):
    """Of an event file everything before the damage is read, else every line that is whole."""
    chance, content = random.Random(way), log_file.read_bytes()
    ends = [*ends_of_steps(content)] if kind == "events" else []
    for _ in range(40):
        spoilt = WAYS[way](content, chance)
        log_file.write_bytes(spoilt)
        norms = norms_read(log_file)
        if kind == "events":
            whole = sum(spoilt[:end] == content[:end] for end in ends)
            assert [*norms][:whole] == [*range(whole)] or way == "two beginnings"
            assert [*norms.values()] == [1.0 + step % 5 for step in norms]
            assert len(norms) <= STEPS or "at the end" in way
        else:
            left = {*spoilt.splitlines()}
            lines = content.splitlines()
            assert {*norms} >= {step for step, line in enumerate(lines) if line in left}
        if "at the end" in way:
            assert [*norms] == [*range(STEPS)]


def ends_of_steps(content):
    """Yield the places in an event file at which steps are whole."""
    begin = 0
    while begin < len(content):
        [length] = struct.unpack_from("<Q", content, begin)
        record, begin = content[begin + 12 :][:length], begin + 12 + length + 4
        if any(v.tag == "grad_norm/pre" for v in Event.FromString(record).summary.value):
            yield begin


def test_damaged_file_hides_no_other_run(log_file, tmp_path):
    log_file.with_name(f"other-{log_file.name}").write_bytes(random.Random(0).randbytes(500))
    assert [*norms_read(tmp_path)] == [*range(STEPS)]


@pytest.mark.parametrize("way", ["cut short", "flipped", "garbage", "overwritten"])
def test_run_that_continues_beside_a_damaged_file(log_file, tmp_path, kind, way):
    content, chance, following = log_file.read_bytes(), random.Random(way), [*range(30, 45)]
    for _ in range(5):
        log_file.write_bytes(WAYS[way](content, chance))
        place = log_to(tmp_path, kind, *[1.0] * 15, first=STEPS)
        assert [*norms_read(place)][-15:] == following
        if kind == "events":
            assert steps_in(place)["grad_norm/pre"][-15:] == following
            for file in place.iterdir():
                file.unlink()


@pytest.fixture
def little_memory():
    """Let this process take no more than half a gigabyte on top of its memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + (1 << 29)
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("length", [1 << 31, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("kind", ["events"], indirect=True)
def test_record_that_claims_to_be_huge_takes_no_memory(log_file, length, little_memory, capsys):
    """Its length is right by its checksum."""
    with log_file.open("ab") as file:
        file.write(header_of(length) + b"little")
    assert main(["report", "--json", str(log_file)]) == DONE
    printed = capsys.readouterr()
    assert json.loads(printed.out)
    assert "cut short or damaged" in printed.err


def check_answered(path):
    """Check that the report answers, and that its JSON is strict."""
    for arguments in (["--json"], []):
        with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()):
            code = main(["report", *arguments, str(path)])
        assert code in (DONE, REFUSED)
        if code == DONE and arguments:
            json.loads(printed.getvalue(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from([0, -1, 1 << 53, 1 << 63, -(1 << 63), 1 << 64, 10**400, 1e308, 5e-324]),
)
SHORT = st.text(max_size=3)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, SHORT),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(SHORT, inside, max_size=3),
    max_leaves=4,
)
FIELDS = ("step", "norm", "clipped_norm", "threshold", "skipped")
A_STEP = st.fixed_dictionaries(
    {name: st.one_of(NUMBERS, st.none(), JSON) for name in FIELDS},
    optional={"parameter_norms": JSON | st.dictionaries(SHORT, NUMBERS)},
)


@settings(max_examples=40)
@given(st.lists(A_STEP | JSON, max_size=6))
def test_any_lines_are_answered(folder, lines):
    path = folder / "steps.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    check_answered(path)


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
def test_hostile_line_is_ignored(tmp_path, line):
    path = tmp_path / "steps.jsonl"
    step = LoggedStep(0, 0.0, 1.0, 1.0, None, 1.0, False, False, 0.0, 0, 0)
    for index in range(2):
        JsonlSink(path).write([step._replace(step=index)])
        with path.open("ab") as file:
            file.write(line + b"\n")
    assert [*norms_read(path)] == [0, 1]


INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def event_of(step, number, *, named):
    tag = f"parameter_norm/{chr(abs(step) % 0xD800)}" if named else "grad_norm/threshold"
    numbers = {"grad_norm/pre": number, "grad_norm/post": 1.0, tag: number}
    values = [{"tag": tag, "simple_value": value} for tag, value in numbers.items()]
    return Event(step=step, summary={"value": values}).SerializeToString()


EVENTS = st.builds(event_of, INT64, st.floats(width=32), named=st.booleans())
RECORDS = st.binary(max_size=60)


@settings(max_examples=120)
@given(st.one_of([st.lists(kind, max_size=8) for kind in (EVENTS, RECORDS, EVENTS | RECORDS)]))
def test_any_records_are_answered(folder, contents):
    """Events, and records that are none."""
    path = folder / "events.out.tfevents.0.hostile"
    path.write_bytes(framed(contents))
    check_answered(path)

"""Of damaged and hostile logs, everything that is whole is read, and a run that continues logs.

`gradclip report` is called as a user calls it: it answers, whatever a file holds.
"""

import io
import json
import random
import resource
import struct
import warnings
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


def place_of(folder, kind):
    return folder / ("events" if kind == "events" else "steps.jsonl")


def log_to(folder, kind, *norms, first=0):
    make = TensorBoardSink if kind == "events" else JsonlSink
    sink = make(place_of(folder, kind), flush_every=10, per_parameter=1)
    log_run(sink, *norms, first=first)


@pytest.fixture(params=["events", "jsonl"])
def kind(request):
    return request.param


@pytest.fixture
def log_file(tmp_path, kind):
    """The file of a run."""
    log_to(tmp_path, kind, *(1.0 + step % 5 for step in range(STEPS)))
    place = place_of(tmp_path, kind)
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
    for _ in range(40):
        spoilt = WAYS[way](content, chance)
        log_file.write_bytes(spoilt)
        norms = norms_read(log_file)
        if way != "two beginnings":
            whole = whole_before(content, same_at_first(content, spoilt), kind)
            assert [*norms][:whole] == [*range(whole)]
        if kind == "events":
            assert [*norms.values()] == [1.0 + step % 5 for step in norms]
            assert len(norms) <= STEPS or "at the end" in way
        else:
            left = {*spoilt.splitlines()}
            lines = content.splitlines()
            assert {*norms} >= {step for step, line in enumerate(lines) if line in left}
        if "at the end" in way:
            assert [*norms] == [*range(STEPS)]


def same_at_first(one, other):
    """Return how many bytes two files have alike before the first that differs."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def whole_before(content, end, kind):
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


def test_damaged_file_hides_no_other_run(log_file, tmp_path):
    log_file.with_name(f"other-{log_file.name}").write_bytes(random.Random(0).randbytes(500))
    assert [*norms_read(tmp_path)] == [*range(STEPS)]


@pytest.mark.parametrize("way", ["cut short", "flipped", "garbage", "overwritten"])
def test_run_that_continues_beside_a_damaged_file(log_file, tmp_path, kind, way):
    content, chance = log_file.read_bytes(), random.Random(way)
    for _ in range(5):
        log_file.write_bytes(WAYS[way](content, chance))
        log_to(tmp_path, kind, *[1.0] * 15, first=STEPS)
        assert [*norms_read(place_of(tmp_path, kind))][-15:] == [*range(STEPS, STEPS + 15)]
        if kind == "events":
            steps = steps_in(log_file.parent)["grad_norm/pre"]
            assert steps[-15:] == [*range(STEPS, STEPS + 15)]
            for file in log_file.parent.iterdir():
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
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", printed)
            patch.setattr("sys.stderr", io.StringIO())
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
few = settings(max_examples=40)


@few
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


@few
@given(st.lists(st.tuples(INT64, st.floats(width=32), st.booleans()), max_size=8))
def test_any_events_are_answered(folder, events):
    contents = []
    for step, number, named in events:
        tag = f"parameter_norm/{chr(abs(step) % 0xD800)}" if named else "grad_norm/threshold"
        numbers = {"grad_norm/pre": number, "grad_norm/post": 1.0, tag: number}
        values = [{"tag": tag, "simple_value": value} for tag, value in numbers.items()]
        contents.append(Event(step=step, summary={"value": values}).SerializeToString())
    path = folder / "events.out.tfevents.0.hostile"
    path.write_bytes(framed(contents))
    check_answered(path)


@few
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_records_that_are_not_events_are_answered(folder, contents):
    path = folder / "events.out.tfevents.0.bytes"
    path.write_bytes(framed(contents))
    check_answered(path)

"""Records are framed as TensorBoard frames them, including the checksum."""

import random

import pytest

from gradclip.records.sinks import tfrecord
from tests.support.curves import framed, header_of

LENGTHS = [0, 1, 2, 7, 8, 63, 200, 1000, 1023, 1024, 1025, 1028, 2048, 3000]
SOURCE = random.Random(0)


@pytest.mark.parametrize(
    "lengths",
    [[], *([length] for length in LENGTHS), SOURCE.choices(LENGTHS, k=60)],
    ids=lambda lengths: f"{len(lengths)} of {lengths[:1]}",
)
def test_records_are_those_of_tensorboards_writer(lengths):
    contents = [SOURCE.randbytes(length) for length in lengths]
    assert tfrecord.framed(contents) == framed(contents)
    for length in lengths:
        assert tfrecord.header_of(length) == header_of(length)

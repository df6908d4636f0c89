"""Records are framed as TensorBoard frames them, including the checksum."""

import random

import numpy as np
import pytest

from gradclip.records.sinks import tfrecord
from tests.support.curves import framed, header_of


@pytest.mark.parametrize(
    ("content", "checksum"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
    ids=["CRC catalogue", "RFC 3720, zeros", "RFC 3720, ones", "RFC 3720, rising"],
)
def test_checksum_is_castagnolis(content, checksum):
    assert tfrecord.crc32c(np.frombuffer(content, np.uint8)[None]).tolist() == [checksum]


LENGTHS = [0, 1, 2, 7, 8, 63, 200, 1000, 1023, 1024, 1025, 1028, 2048, 3000]


@pytest.mark.parametrize("length", LENGTHS)
def test_records_are_those_of_tensorboards_writer(length):
    content = random.Random(length).randbytes(length)
    assert tfrecord.framed([content]) == framed([content])
    assert tfrecord.header_of(length) == header_of(length)


def test_records_of_many_lengths_keep_their_order():
    source = random.Random(0)
    contents = [source.randbytes(source.choice(LENGTHS)) for _ in range(60)]
    assert tfrecord.framed(contents) == framed(contents)
    assert tfrecord.framed([]) == b""

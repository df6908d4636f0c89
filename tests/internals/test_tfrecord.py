"""Records are framed as TensorBoard frames them, checksum included."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from tensorboard.summary.writer.record_writer import RecordWriter

from gradclip.records.sinks.tfrecord import crc32c, framed


def test_the_checksum_is_castagnolis() -> None:
    """The check value of the CRC catalogue, and the test vectors of RFC 3720."""
    assert crc(b"123456789") == 0xE3069283
    assert crc(bytes(32)) == 0x8A9136AA
    assert crc(b"\xff" * 32) == 0x62A8AB43
    assert crc(bytes(range(32))) == 0x46DD794E


def crc(content: bytes) -> int:
    [found] = crc32c(np.frombuffer(content, np.uint8)[None]).tolist()
    return int(found)


LENGTHS = [0, 1, 2, 7, 8, 63, 200, 1000, 1023, 1024, 1025, 1028, 2048, 3000]


@pytest.mark.parametrize("length", LENGTHS)
def test_records_are_those_of_tensorboards_writer(length: int) -> None:
    content = random.Random(length).randbytes(length)
    assert crc(content) == pywrap_tensorflow.crc32c(content)
    stream = io.BytesIO()
    RecordWriter(stream).write(content)
    assert framed([content]) == stream.getvalue()


def test_records_of_many_lengths_keep_their_order() -> None:
    source = random.Random(0)
    contents = [source.randbytes(source.choice(LENGTHS)) for _ in range(60)]
    stream = io.BytesIO()
    for content in contents:
        RecordWriter(stream).write(content)
    assert framed(contents) == stream.getvalue()
    assert framed([]) == b""

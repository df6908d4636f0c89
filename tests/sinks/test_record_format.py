"""Records are framed as TensorBoard frames them, checksum included."""

from __future__ import annotations

import io
import random

import pytest
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from tensorboard.summary.writer.record_writer import RecordWriter

from gradclip.sinks.record_format import crc32c, framed


def test_the_checksum_is_castagnolis() -> None:
    """The check value of the CRC catalogue, and the test vectors of RFC 3720."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 63, 200, 1000])
def test_records_are_those_of_tensorboards_writer(length: int) -> None:
    content = random.Random(length).randbytes(length)
    assert crc32c(content) == pywrap_tensorflow.crc32c(content)
    stream = io.BytesIO()
    RecordWriter(stream).write(content)
    assert framed(content) == stream.getvalue()

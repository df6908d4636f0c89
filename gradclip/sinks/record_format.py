"""The records of TensorBoard's event files: a length, its checksum, the bytes, their checksum.

TensorBoard's own writer computes the checksum in Python, a byte at a time, which would cost more
than all the rest of logging. A CRC is linear over bits, so what a byte adds depends on its value
and place alone: here numpy looks up all bytes of a record at once.
"""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_BLOCK = 1024
"""Bytes that are looked up at once: tables of 1 MB serve records of every length."""


def framed(content: bytes) -> bytes:
    """Return the record that holds ``content``."""
    return header_of(len(content)) + content + checksum_of(content)


@lru_cache(maxsize=64)  # the events of a run have few different lengths
def header_of(length: int) -> bytes:
    """Return what comes before a content of some length: that, and its checksum."""
    header = struct.pack("<Q", length)
    return header + checksum_of(header)


def checksum_of(content: bytes) -> bytes:
    """Return the checksum, rotated and shifted as the format wants it."""
    crc = crc32c(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)


def crc32c(content: bytes) -> int:
    """Return the CRC-32C (Castagnoli) checksum."""
    values = np.frombuffer(content, np.uint8)
    first = len(values) % _BLOCK
    additions, places, of_zeros = _tables()
    found = additions.take(places[_BLOCK - first :] + values[:first])
    crc = int(np.bitwise_xor.reduce(found)) ^ of_zeros[first]
    for begin in range(first, len(values), _BLOCK):
        block = values[begin : begin + _BLOCK].copy()
        # What came before is as if it were added to the first bytes of the block.
        block[:4] ^= np.frombuffer(struct.pack("<I", crc ^ 0xFFFFFFFF), np.uint8)
        crc = int(np.bitwise_xor.reduce(additions.take(places + block))) ^ 0xFFFFFFFF
    return crc


@cache
def _tables() -> tuple[NDArray[np.uint32], NDArray[np.int64], list[int]]:
    """Return what each value of each byte of a block adds, where those begin, zeros' checksums."""
    by_value = _by_value()
    rows, of_zeros = [by_value], [0xFFFFFFFF]
    for _ in range(_BLOCK):
        rows.append(_shifted(rows[-1], by_value))
        of_zeros.append(int(_shifted(np.uint32(of_zeros[-1]), by_value)))
    places = np.arange(_BLOCK, dtype=np.int64) * 256
    return np.concatenate(rows[:_BLOCK][::-1]), places, [each ^ 0xFFFFFFFF for each in of_zeros]


def _shifted(registers: NDArray[np.uint32], by_value: NDArray[np.uint32]) -> Any:
    return by_value[registers & 0xFF] ^ (registers >> 8)


def _by_value() -> NDArray[np.uint32]:
    registers = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        registers = np.where(registers & 1, registers >> 1 ^ _POLYNOMIAL, registers >> 1)
    return registers

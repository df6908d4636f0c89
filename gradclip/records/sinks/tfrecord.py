"""The records of TensorBoard's event files: a length, its checksum, the bytes, their checksum.

TensorBoard's own writer computes the checksum in Python, a byte at a time, which would cost more
than all the rest of logging. A CRC is linear over bits, so what a byte adds depends on its value
and place alone: here numpy looks up all bytes of a record at once.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
_BLOCK = 1024
"""Bytes that are looked up at once: tables of 1 MB serve records of every length."""


def framed(contents: Sequence[bytes]) -> bytes:
    """Return the records that hold some contents; many at a time cost a fraction each."""
    checksums: list[bytes] = [b""] * len(contents)
    by_length: dict[int, list[int]] = {}
    for place, content in enumerate(contents):
        by_length.setdefault(len(content), []).append(place)
    for length, places in by_length.items():
        joined = b"".join(contents[place] for place in places)
        values = np.frombuffer(joined, np.uint8).reshape(len(places), length)
        for place, crc in zip(places, crc32c(values).tolist(), strict=True):
            checksums[place] = _masked(crc)
    records = zip(contents, checksums, strict=True)
    return b"".join(header_of(len(each)) + each + checksum for each, checksum in records)


@lru_cache(maxsize=64)  # the events of a run have few different lengths
def header_of(length: int) -> bytes:
    """Return what comes before a content of some length: that, and its checksum."""
    header = struct.pack("<Q", length)
    return header + checksum_of(header)


def checksum_of(content: bytes) -> bytes:
    """Return the checksum, rotated and shifted as the format wants it."""
    [crc] = crc32c(np.frombuffer(content, np.uint8)[None]).tolist()
    return _masked(crc)


def _masked(crc: int) -> bytes:
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)


def crc32c(values: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the CRC-32C (Castagnoli) checksum of each row of bytes."""
    additions, places, of_zeros = _tables()
    first = values.shape[1] % _BLOCK
    found = additions.take(places[_BLOCK - first :] + values[:, :first])
    crc: NDArray[np.uint32] = np.bitwise_xor.reduce(found, axis=1) ^ of_zeros[first]
    for begin in range(first, values.shape[1], _BLOCK):
        block = values[:, begin : begin + _BLOCK].copy()
        # What came before is as if it were added to the first bytes of the block.
        block[:, :4] ^= (~crc).astype("<u4").view(np.uint8).reshape(-1, 4)
        crc = ~np.bitwise_xor.reduce(additions.take(places + block), axis=1)
    return crc


@cache
def _tables() -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint32]]:
    """Return what each value of each byte of a block adds, where those begin, zeros' checksums."""
    by_value = _by_value()
    rows, of_zeros = [by_value], [0xFFFFFFFF]
    for _ in range(_BLOCK):
        rows.append(_shifted(rows[-1], by_value))
        of_zeros.append(int(_shifted(np.uint32(of_zeros[-1]), by_value)))
    places = np.arange(_BLOCK, dtype=np.int64) * 256
    return np.concatenate(rows[:_BLOCK][::-1]), places, ~np.array(of_zeros, dtype=np.uint32)


def _shifted(registers: NDArray[np.uint32], by_value: NDArray[np.uint32]) -> Any:
    return by_value[registers & 0xFF] ^ (registers >> 8)


def _by_value() -> NDArray[np.uint32]:
    registers = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        registers = np.where(registers & 1, registers >> 1 ^ _POLYNOMIAL, registers >> 1)
    return registers

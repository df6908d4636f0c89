"""Frames the records of TensorBoard's event files: length, its checksum, bytes, their checksum.

TensorBoard's own writer computes the checksum in Python, a byte at a time, which would cost more
than all the rest of logging. A CRC is linear over bits, so the contribution of a byte depends only
on its value and its position: numpy looks up the contributions of all bytes at once and takes their
exclusive or.
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
"""Bytes that are looked up at once; the table of 1 MB serves records of every length."""


def framed(contents: Sequence[bytes]) -> bytes:
    """Return a record for each content, joined. Many at a time cost a fraction of one by one."""
    records = zip(contents, checksums_of(contents), strict=True)
    return b"".join(header_of(len(content)) + content + checksum for content, checksum in records)


@lru_cache(maxsize=64)  # the events of a run have few different lengths
def header_of(length: int) -> bytes:
    """Return what precedes a content of this length: the length and its checksum."""
    header = struct.pack("<Q", length)
    return header + checksum_of(header)


def checksum_of(content: bytes) -> bytes:
    """Return the checksum of a content, masked as the format asks for."""
    [checksum] = checksums_of([content])
    return checksum


def checksums_of(contents: Sequence[bytes]) -> list[bytes]:
    """Return the masked checksum of each content; contents of one length are computed together."""
    checksums = [b""] * len(contents)
    by_length: dict[int, list[int]] = {}
    for index, content in enumerate(contents):
        by_length.setdefault(len(content), []).append(index)
    for length, indices in by_length.items():
        joined = b"".join(contents[index] for index in indices)
        values = np.frombuffer(joined, np.uint8).reshape(len(indices), length)
        for index, crc in zip(indices, crc32c(values).tolist(), strict=True):
            checksums[index] = _masked(crc)
    return checksums


def _masked(crc: int) -> bytes:
    """Rotate a checksum and add a constant: CRCs of data that holds CRCs are weak otherwise."""
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)


def crc32c(values: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the CRC-32C (Castagnoli) checksum of each row of bytes."""
    additions, offsets, of_zeros = _tables()
    first = values.shape[1] % _BLOCK
    looked_up = additions.take(offsets[_BLOCK - first :] + values[:, :first])
    crc: NDArray[np.uint32] = np.bitwise_xor.reduce(looked_up, axis=1) ^ of_zeros[first]
    for begin in range(first, values.shape[1], _BLOCK):
        block = values[:, begin : begin + _BLOCK].copy()
        # The state after the bytes before enters as if it were added to the block's first bytes.
        block[:, :4] ^= (~crc).astype("<u4").view(np.uint8).reshape(-1, 4)
        crc = ~np.bitwise_xor.reduce(additions.take(offsets + block), axis=1)
    return crc


@cache
def _tables() -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint32]]:
    """Return the tables for a block.

    Returns:
        What each byte value adds at each position, flat; the offset of each position in that
        table; and the checksum of so many zeros.
    """
    by_value = _by_value()
    rows, of_zeros = [by_value], [0xFFFFFFFF]
    for _ in range(_BLOCK):
        rows.append(_shifted(rows[-1], by_value))
        of_zeros.append(int(_shifted(np.uint32(of_zeros[-1]), by_value)))
    offsets = np.arange(_BLOCK, dtype=np.int64) * 256
    return np.concatenate(rows[:_BLOCK][::-1]), offsets, ~np.array(of_zeros, dtype=np.uint32)


def _shifted(registers: NDArray[np.uint32], by_value: NDArray[np.uint32]) -> Any:
    return by_value[registers & 0xFF] ^ (registers >> 8)


def _by_value() -> NDArray[np.uint32]:
    registers = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        registers = np.where(registers & 1, registers >> 1 ^ _POLYNOMIAL, registers >> 1)
    return registers

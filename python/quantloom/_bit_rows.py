"""Rows of codes as rows of 32-bit words, lowest bits first: how planes of codes are stored."""

from __future__ import annotations

import numpy as np

__all__ = ["pack_rows", "unpack_rows"]

_CHUNK = 1 << 20  # codes at a time: each takes a byte for each of its bits


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[rows, count]``, integers of which the lowest `bits` (1 to 8) count, as words int32 ``[rows,
    ceil(count * bits / 32)]``."""
    rows, count = codes.shape
    words = np.empty((rows, -(-count * bits // 32)), np.int32)
    step = max(1, _CHUNK // max(1, count))
    for first in range(0, rows, step):
        part = codes[first : first + step].astype(np.uint8)
        flags = (part[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
        stream = np.zeros((len(part), words.shape[1] * 32), np.uint8)
        stream[:, : count * bits] = flags.reshape(len(part), -1)
        words[first : first + step] = np.packbits(stream, axis=1, bitorder="little").view(np.int32)
    return words


def unpack_rows(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The codes ``[rows, count]`` of ``pack_rows``, as uint8, or uint16 for those of 9 to 16 bits."""
    words = np.ascontiguousarray(words)
    kind = np.uint8 if bits <= 8 else np.uint16
    codes = np.empty((len(words), count), kind)
    step = max(1, _CHUNK // max(1, count))
    for first in range(0, len(words), step):
        part = words[first : first + step].view(np.uint8)
        flags = np.unpackbits(part, axis=1, count=count * bits, bitorder="little")
        flags = flags.reshape(len(part), count, bits).astype(kind) << np.arange(bits, dtype=kind)
        codes[first : first + step] = flags.sum(-1, dtype=kind)
    return codes

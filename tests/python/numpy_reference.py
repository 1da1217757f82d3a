"""Slow, obvious NumPy versions of what the library does, for tests to compare with."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np


def unpack_bits(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of a dense stream of 32-bit words, lowest bits first."""
    flags = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")[: count * bits]
    return (flags.reshape(count, bits) << np.arange(bits)).sum(axis=1).astype(np.int64)


def group_of_column(q) -> np.ndarray:
    """The group of each column, [k]."""
    _, k = q.shape
    if "group_index" in q.planes:
        return np.asarray(q.planes["group_index"], dtype=np.int64)
    size = q.format.group_size
    return np.arange(k) // size if isinstance(size, int) else np.zeros(k, dtype=np.int64)


def codes(q) -> np.ndarray:
    """The codes, [n, k]."""
    n, k = q.shape
    stream = np.asarray(q.planes["codes"])
    rows = [unpack_bits(stream[r], q.format.bits, k) for r in range(n)]
    return np.array(rows, dtype=np.int64).reshape(n, k)


def scales_of(q) -> np.ndarray:
    """The scale of each row and group, float32, [n, G]."""
    scales = np.asarray(q.planes["scales"]).astype(np.float32)
    return np.repeat(scales, q.shape[0], axis=0) if q.format.group_size == "tensor" else scales


def scales_and_zeros(q) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row and group of a uniform grid, float32, [n, G]."""
    n, _ = q.shape
    scales = scales_of(q)
    groups = scales.shape[1]
    if q.format.symmetric:
        zero = json.loads(q.format.to_json())["zero_point"]
        return scales, np.full((n, groups), zero, dtype=np.float32)
    stored = np.asarray(q.planes["zeros"])
    if q.format.group_size == "tensor":
        return scales, np.full((n, 1), unpack_bits(stored[0], q.format.bits, 1)[0], dtype=np.float32)
    zeros = np.array([unpack_bits(stored[g], q.format.bits, n) for g in range(groups)]).reshape(groups, n)
    return scales, zeros.T.astype(np.float32)


def decode(q) -> np.ndarray:
    """W', float32: scale * (code - zero_point), scale * table[code], or scale * a sum of vectors."""
    if hasattr(q.format, "dense"):
        return with_outliers(q)
    if hasattr(q.format, "scale_group"):
        return additive_sums(q)
    group = group_of_column(q)
    if hasattr(q.format, "zero_bits"):
        scales, zeros = (bilevel(q, name) for name in ("scale", "zero"))
        return scales[:, group] * (codes(q).astype(np.float32) - zeros[:, group])
    if "signs" in q.planes:
        return binary_sums(q, group)
    if "shifts" in q.planes:
        return significant_digits(q, group)
    if hasattr(q.format, "codebooks"):
        return scales_of(q)[:, group] * vectors(q)
    if "codebook" in q.planes:
        return scales_of(q)[:, group] * np.asarray(q.planes["codebook"]).astype(np.float32)[codes(q)]
    scales, zeros = scales_and_zeros(q)
    return scales[:, group] * (codes(q).astype(np.float32) - zeros[:, group])


def binary_sums(q, group: np.ndarray) -> np.ndarray:
    """The offset and each plane's scale, added or subtracted in turn, float32, [n, k]."""
    n, k = q.shape
    total = np.zeros((n, k), dtype=np.float32)
    if "offsets" in q.planes:
        total = np.asarray(q.planes["offsets"]).astype(np.float32)[:, group]
    for words, scales in zip(np.asarray(q.planes["signs"]), np.asarray(q.planes["scales"]), strict=True):
        added = np.array([unpack_bits(row, 1, k) for row in words]).reshape(n, k) == 1
        scale = scales.astype(np.float32)[:, group]
        total = total + np.where(added, scale, -scale)
    return total


def significant_digits(q, group: np.ndarray) -> np.ndarray:
    """The row's scale times the code, two's complement, at the group's shift, float32, [n, k]."""
    n, k = q.shape
    bits = q.format.bits
    digits = (codes(q).astype(np.int32) ^ 1 << (bits - 1)) - (1 << (bits - 1))
    # Shifts of 0 to 8 - bits, a stream for each row.
    groups = int(group.max()) + 1 if k else 0
    stored = np.asarray(q.planes["shifts"])
    fields = [unpack_bits(stored[r], (8 - bits).bit_length(), groups) for r in range(n)]
    shifts = np.array(fields, dtype=np.int32).reshape(n, groups)
    if k == 0:
        return np.zeros((n, k), dtype=np.float32)
    return scales_of(q) * (digits << shifts[:, group]).astype(np.float32)


def codes_of_spqr(q) -> np.ndarray:
    """The codes of a SpQR tensor with outliers, [n, k]."""
    n, k = q.shape
    stream, bits = np.asarray(q.planes["codes"]), q.format.dense.bits
    return np.array([unpack_bits(stream[r], bits, k) for r in range(n)]).reshape(n, k)


def bilevel(q, name: str) -> np.ndarray:
    """The scales or zero points of a SpQR format, float32, [n, G]: step * (code - zero)."""
    n, _ = q.shape
    bits = getattr(q.format, f"{name}_bits")
    stored = np.asarray(q.planes[f"{name}s"])
    groups = stored.shape[0]
    fields = np.array([unpack_bits(stored[g], bits, n) for g in range(groups)]).reshape(groups, n)
    grids = np.asarray(q.planes[f"{name}_grids"]).astype(np.float32)[:, np.arange(n) // q.format.block]
    return (grids[..., 0] * (fields.astype(np.float32) - grids[..., 1])).T


def with_outliers(q) -> np.ndarray:
    """The dense part, and what the planes of outliers add to it, float32, [n, k]."""
    planes = {name: plane for name, plane in q.planes.items() if not name.startswith("outlier_")}
    values = decode(SimpleNamespace(shape=q.shape, format=q.format.dense, planes=planes)).copy()
    offsets, columns, added = (q.planes[f"outlier_{name}"] for name in ("offsets", "columns", "values"))
    for row in range(q.shape[0] if q.shape[1] else 0):
        mine = slice(offsets[row], offsets[row + 1])
        values[row, columns[mine]] += added[mine].astype(np.float32)
    return values


def vectors(q) -> np.ndarray:
    """What the codes of a vector codebook stand for, before scaling, float32, [n, k]."""
    n, k = q.shape
    form, stream = q.format, np.asarray(q.planes["codes"])
    count = -(-k // form.dim)
    tables = np.asarray(q.planes["codebook"]).astype(np.float32)
    rows = [unpack_bits(stream[r], form.bits, count * form.codebooks) for r in range(n)]
    codes = np.array(rows, dtype=np.int64).reshape(n, count, form.codebooks)
    total = np.zeros((n, count, form.dim), dtype=np.float32)
    for book in range(form.codebooks):
        total = total + tables[book][codes[:, :, book]]
    return total.reshape(n, count * form.dim)[:, :k]


def additive_tables(q) -> np.ndarray:
    """Those of an additive format, perhaps codes into levels, [tables, entries, out_group, in_group]."""
    form = q.format
    if "codebook" in q.planes:
        return np.asarray(q.planes["codebook"]).astype(np.float32)
    entries, dim = 2**form.bits, form.out_group * form.in_group
    levels = np.asarray(q.planes["codebook_levels"]).astype(np.float32)
    tables = np.zeros((form.codebooks, entries, dim), dtype=np.float32)
    for book, words in enumerate(np.asarray(q.planes["codebook_codes"])):
        codes = unpack_bits(words, form.table_bits, entries * dim).reshape(entries, dim)
        for entry in range(entries):
            own = levels[book, entry * form.table_groups // entries].reshape(dim, -1)
            tables[book, entry] = own[np.arange(dim), codes[entry]]
    return tables.reshape(form.codebooks, entries, form.out_group, form.in_group)


def additive_scales(q) -> np.ndarray:
    """Those of an additive format, perhaps codes into levels, [row groups, scales]."""
    if "scales" in q.planes:
        return np.asarray(q.planes["scales"]).astype(np.float32)
    levels = np.asarray(q.planes["scale_levels"]).astype(np.float32)
    count, words = -(-q.shape[1] // q.format.scale_group), np.asarray(q.planes["scale_codes"])
    codes = [unpack_bits(row, q.format.scale_bits, count) for row in words]
    return np.take_along_axis(levels, np.array(codes, dtype=np.int64).reshape(len(words), count), axis=1)


def additive_sums(q) -> np.ndarray:
    """The scale of a block times the sum of its entries, float32, [n, k]."""
    n, k = q.shape
    form, stream = q.format, np.asarray(q.planes["codes"])
    count, rows = -(-k // form.in_group), stream.shape[0]
    tables, scales = additive_tables(q), additive_scales(q)
    fields = [unpack_bits(stream[r], form.bits, count * form.codebooks) for r in range(rows)]
    codes = np.array(fields, dtype=np.int64).reshape(rows, count, form.codebooks)
    total = np.zeros((rows, count, form.out_group, form.in_group), dtype=np.float32)
    for book in range(form.codebooks):
        total = total + tables[book][codes[:, :, book]]
    if k == 0:
        return np.zeros((n, k), dtype=np.float32)
    per_scale = count if form.scale_group == "channel" else form.scale_group // form.in_group
    total = scales[:, np.arange(count) // per_scale, None, None] * total
    whole = total.transpose(0, 2, 1, 3).reshape(rows * form.out_group, count * form.in_group)
    return whole[:n, :k]


def nearest_column(
    w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and decoded values of one column under given parameters, half to even."""
    chosen = np.clip(np.rint(w / scale + zero), 0, 2**bits - 1)
    return chosen.astype(np.int64), scale * (chosen - zero)


def gptq_codes(w, sum_xx, tokens, q, damp, act_order) -> np.ndarray:
    """GPTQ in float64 with the scales and zero points of `q`, by inverting the Hessian of the columns
    that are left anew in each step (Frantar et al., 2022, equations 2 and 3).

    Only for groups that were fitted before the walk. Returns the codes, [n, k].
    """
    w = w.astype(np.float64).copy()
    n, k = w.shape
    hessian = sum_xx / tokens
    dead = np.diag(hessian) == 0
    damping = damp * np.diag(hessian).mean()
    w[:, dead] = 0
    hessian = hessian + damping * np.eye(k)
    scales, zeros = (part.astype(np.float64) for part in scales_and_zeros(q))
    group = group_of_column(q)
    order = np.argsort(-np.diag(sum_xx), kind="stable") if act_order else np.arange(k)
    result = np.zeros((n, k), dtype=np.int64)
    for step, column in enumerate(order):
        left = order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        g = group[column]
        result[:, column], decoded = nearest_column(w[:, column], scales[:, g], zeros[:, g], q.format.bits)
        error = (w[:, column] - decoded) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
    return result

"""SpQR's tiles: the layout that its published kernels read, as packed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantloom import _arrays, _checks
from quantloom._bit_rows import pack_rows, unpack_rows
from quantloom.formats import Outliers, SpQR
from quantloom.tensors import PackedTensor

_TILE = 16


def _array(tensors: Mapping[str, Any], name: str, dtype: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"tensor {name}: got none, expected one of dtype {dtype}")
    described = _arrays.plane(f"tensor {name}", tensors[name])
    _arrays.require_cpu(f"tensor {name}", described)
    value = tensors[name]
    value = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    if value.dtype != dtype:
        raise TypeError(f"tensor {name}: got {value.dtype.name}, expected {dtype}")
    if value.ndim != 1:
        raise ValueError(f"tensor {name}: got {value.ndim} dimensions, expected 1")
    return value


def from_spqr(tensors: Mapping[str, Any], shape: tuple[int, int]) -> PackedTensor:
    """The packed tensor, ``Outliers`` around ``SpQR(3, 16, 3, 3, 16)``, of the arrays ``dense_weights``,
    ``row_offsets`` and ``col_vals`` of SpQR's inference library.

    Both orders of outliers are taken: by rows (offsets ``[n + 1]``) and interleaved by tiles of 16 rows
    (``[n / 16 + 1]``), where entries of 0 in column 0 that come after others of their row are padding.
    Outliers are what is added to the dense values, as the library's kernels do. It computes in float16, and
    this one in float32: decoded values agree up to float16's rounding.

    Args:
        tensors: the arrays by name: int64 ``[n / 16 * ceil(k / 16) * 16]``, int32, int32. A non-empty
            ``in_perm`` among them holds the order of the columns: the stored column j is column in_perm[j]
            of the matrix. It has 16 bits for each, two in an int32, the first one in the lower half.
        shape: ``(n, k)``, n a multiple of 16, k at most 65536.

    Raises TypeError or ValueError naming the array that contradicts the shape.
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors: got {_checks.type_name(tensors)}, expected a mapping of names to arrays")
    if isinstance(shape, (str, bytes)) or not hasattr(shape, "__len__") or len(shape) != 2:
        raise TypeError(f"shape: got {shape!r}, expected a pair (n, k)")
    n, k = (_checks.integer("shape", extent, 1) for extent in shape)
    if n % _TILE or k > 65536:
        raise ValueError(f"shape: got {(n, k)}, expected n a multiple of 16 and k of at most 65536")
    kind = "torch" if any(hasattr(value, "detach") for value in tensors.values()) else "numpy"
    dense = _array(tensors, "dense_weights", "int64")
    row_tiles, column_tiles = n // _TILE, -(-k // _TILE)
    if dense.size != row_tiles * column_tiles * _TILE:
        raise ValueError(
            f"tensor dense_weights: got {dense.size} words, expected {row_tiles * column_tiles * _TILE}, one"
            f" for each row of the tiles of {(n, k)}"
        )
    planes = _dense_planes(dense.view(np.uint64).reshape(row_tiles, column_tiles, _TILE), n, k)
    rows, columns, values = _outliers(tensors, n, k)
    permutation = tensors.get("in_perm")
    if permutation is not None and len(permutation):
        order = _permutation(_array(tensors, "in_perm", "int32"), k)
        planes["codes"] = planes["codes"][:, np.argsort(order)]
        group_index = np.empty(k, np.int32)
        group_index[order] = np.arange(k) // _TILE
        planes["group_index"] = group_index
        columns = order[columns]
    planes["codes"] = pack_rows(planes["codes"], 3)
    places = rows * k + columns
    ranked = np.argsort(places, kind="stable")
    if (np.diff(places[ranked]) == 0).any():
        twice = places[ranked][1:][np.diff(places[ranked]) == 0][0]
        raise ValueError(
            f"tensor col_vals: got two outliers in row {twice // k}, column {twice % k}, expected one"
        )
    offsets = np.searchsorted(places[ranked], np.arange(n + 1) * k).astype(np.int32)
    planes["outlier_offsets"] = offsets
    planes["outlier_columns"] = columns[ranked].astype(np.uint16)
    planes["outlier_values"] = values[ranked]
    q = PackedTensor(Outliers(SpQR(3, 16, 3, 3, 16), count=len(places)), (n, k), planes)
    return q if kind == "numpy" else q.to("torch")


def to_spqr(q: PackedTensor) -> dict[str, Any]:
    """The arrays of SpQR's inference library: ``dense_weights, row_offsets, col_vals, in_perm``, with
    outliers by rows; ``in_perm`` is empty unless columns of a group are not consecutive.

    Args:
        q: ``SpQR(3, 16, 3, 3, 16)``, alone or in ``Outliers``, with n a multiple of 16, k at most 65536 and,
            where there is a plane group_index, full groups.

    No code changes. The library's kernels compute in float16. Raises ValueError for what tiles cannot hold.
    """
    if not isinstance(q, PackedTensor):
        raise TypeError(f"q: got {_checks.type_name(q)}, expected a PackedTensor")
    if q.transform is not None:
        raise RuntimeError(f"q: got the transform {q.transform.spec}, which the layout cannot hold")
    n, k = q.shape
    reason = tiles_refusal(q.format, n, k)
    if reason is not None:
        raise ValueError(f"q: {reason}")
    planes = q.to("cpu").to("numpy").planes
    groups = -(-k // _TILE)
    codes = unpack_rows(planes["codes"], 3, k)
    order = np.arange(k)
    if "group_index" in planes:
        group_index = planes["group_index"]
        order = np.argsort(group_index, kind="stable")
        if not np.array_equal(group_index[order], np.arange(k) // _TILE):
            raise ValueError(
                f"q: got a group_index with groups that are not full, expected {_TILE} columns each"
            )
        codes = codes[:, order]
    fields = np.zeros((n // _TILE, groups, _TILE, 18), np.uint64)
    padded = np.zeros((n, groups * _TILE), np.uint64)
    padded[:, :k] = codes
    fields[..., 2:] = padded.reshape(n // _TILE, _TILE, groups, _TILE).transpose(0, 2, 1, 3)
    for i, name in enumerate(("scales", "zeros")):
        fields[..., i] = unpack_rows(planes[name], 3, n).reshape(groups, n // _TILE, _TILE).transpose(1, 0, 2)
    words = (fields << (np.arange(18, dtype=np.uint64) * 3)).sum(-1, dtype=np.uint64)
    # [groups, blocks, step or zero, of scales or of zero points], then a byte for two rows each.
    numbers = np.stack([planes["scale_grids"], planes["zero_grids"]], axis=-1)
    parts = np.ascontiguousarray(numbers.transpose(1, 0, 2, 3).reshape(n // _TILE, groups, 4)).view(np.uint8)
    words |= np.repeat(parts, 2, axis=-1).astype(np.uint64) << np.uint64(54)
    arrays = {"dense_weights": words.reshape(-1).view(np.int64), **_stored_outliers(planes, n, order)}
    pairs = np.zeros(k + k % 2 if "group_index" in planes else 0, np.uint16)
    pairs[:k] = order[: pairs.size]
    arrays["in_perm"] = pairs.view(np.int32)
    if q.kind == "numpy":
        return arrays
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def tiles_refusal(form: Any, n: int, k: int) -> str | None:
    """Why tiles cannot hold a matrix [n, k] of a format; None if they can."""
    dense = form.dense if isinstance(form, Outliers) else form
    expected = SpQR(3, _TILE, 3, 3, _TILE)
    if dense != expected:
        return f"spqr holds {expected.spec} alone or with outliers, got {form.spec}"
    if n % _TILE or not 0 < k <= 65536:
        return f"spqr needs out_features in multiples of 16 and at most 65536 in_features, got {n} and {k}"
    return None


def _stored_outliers(planes: Mapping[str, np.ndarray], n: int, order: np.ndarray) -> dict[str, np.ndarray]:
    """Offsets of rows, and entries with the stored columns, rising within a row."""
    if "outlier_offsets" not in planes:
        return {"row_offsets": np.zeros(n + 1, np.int32), "col_vals": np.zeros(0, np.int32)}
    offsets = np.asarray(planes["outlier_offsets"])
    rows = np.repeat(np.arange(n), np.diff(offsets))
    columns = np.argsort(order)[planes["outlier_columns"].astype(np.int64)]
    values = planes["outlier_values"].view(np.uint16).astype(np.uint32)
    entries = (values << 16) | columns.astype(np.uint32)
    ranked = np.lexsort((columns, rows))
    return {"row_offsets": offsets.astype(np.int32), "col_vals": entries[ranked].view(np.int32)}


def _dense_planes(words: np.ndarray, n: int, k: int) -> dict[str, np.ndarray]:
    """The planes of words [n / 16, ceil(k / 16), 16], one for each row of a tile: bits 0-2 the code of the
    row's scale, 3-5 that of its zero point, 6-53 those of its weights, 54-61 a byte of the tile's four
    float16 numbers, the same in rows 2 m and 2 m + 1.
    """
    fields = ((words[..., None] >> (np.arange(18, dtype=np.uint64) * 3)) & 7).astype(np.int64)
    # [n / 16, ceil(k / 16), 16 rows, ...] to rows of the matrix.
    codes = fields[..., 2:].transpose(0, 2, 1, 3).reshape(n, -1)[:, :k]
    by_group = fields.transpose(3, 1, 0, 2).reshape(18, -1, n)
    parts = ((words >> np.uint64(54)) & 255).astype(np.uint8)
    if (parts[..., 0::2] != parts[..., 1::2]).any():
        raise ValueError("tensor dense_weights: got rows of a tile that disagree about its numbers")
    # Step of scales, step of zero points, zero of scales, zero of zero points.
    numbers = np.ascontiguousarray(parts[..., 0::2].transpose(1, 0, 2)).view(np.float16)
    return {
        "codes": codes,
        "scales": pack_rows(by_group[0], 3),
        "zeros": pack_rows(by_group[1], 3),
        "scale_grids": np.ascontiguousarray(numbers[..., 0::2]),
        "zero_grids": np.ascontiguousarray(numbers[..., 1::2]),
    }


def _outliers(tensors: Mapping[str, Any], n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and values."""
    offsets = _array(tensors, "row_offsets", "int32").astype(np.int64)
    entries = _array(tensors, "col_vals", "int32").view(np.uint32)
    tiled = offsets.size == n // _TILE + 1
    if not tiled and offsets.size != n + 1:
        raise ValueError(
            f"tensor row_offsets: got {offsets.size} numbers, expected {n + 1} (by rows) or {n // _TILE + 1}"
            " (by tiles)"
        )
    if offsets[0] != 0 or offsets[-1] > entries.size or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"tensor row_offsets: got {offsets[0]} to {offsets[-1]}, expected offsets that do not fall, from"
            f" 0 to at most {entries.size}, the entries of col_vals"
        )
    if tiled and (offsets % _TILE).any():
        raise ValueError("tensor row_offsets: got offsets of tiles that are no multiples of 16")
    entries = entries[: offsets[-1]]
    counts = np.diff(offsets)
    if tiled:
        rows = np.repeat(np.arange(n // _TILE) * _TILE, counts) + np.arange(entries.size) % _TILE
        kept = entries != 0
        rows, entries = rows[kept], entries[kept]
    else:
        rows = np.repeat(np.arange(n), counts)
    columns = (entries & 0xFFFF).astype(np.int64)
    if (columns >= k).any():
        raise ValueError(f"tensor col_vals: got column {columns.max()}, expected columns below {k}")
    values = (entries >> np.uint32(16)).astype(np.uint16).view(np.float16)
    if not np.isfinite(values).all():
        raise ValueError("tensor col_vals: got a value that is not finite")
    return rows, columns, values


def _permutation(pairs: np.ndarray, k: int) -> np.ndarray:
    order = np.ascontiguousarray(pairs).view(np.uint16).astype(np.int64)[:k]
    if not np.array_equal(np.sort(order), np.arange(k)):
        raise ValueError(f"tensor in_perm: got numbers that do not order {k} columns")
    return order

"""Tiles of SpQR's published kernels, read into packed tensors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy_reference as reference
import pytest
import quantloom as ql
import torch


def fields(plane: np.ndarray, count: int) -> np.ndarray:
    rows = [reference.unpack_bits(row, 3, count) for row in np.asarray(plane)]
    return np.array(rows).reshape(len(plane), count)


def tiles_of(q, interleaved: bool, order=None) -> dict[str, np.ndarray]:
    """The arrays of a matrix, one word and one entry at a time; `order`: stored columns in that order."""
    n, k = q.shape
    codes, groups = reference.codes_of_spqr(q), -(-k // 16)
    order = np.arange(k) if order is None else order
    scales, zeros = (fields(q.planes[name], n) for name in ("scales", "zeros"))
    words = []
    for tile in range(n // 16):
        for group in range(groups):
            steps = (q.planes["scale_grids"][group, tile], q.planes["zero_grids"][group, tile])
            numbers = np.array([steps[0][0], steps[1][0], steps[0][1], steps[1][1]], np.float16).tobytes()
            for r in range(16):
                row = 16 * tile + r
                word = int(scales[group, row]) | int(zeros[group, row]) << 3 | numbers[r // 2] << 54
                for j in range(16):
                    if 16 * group + j < k:
                        word |= int(codes[row, order[16 * group + j]]) << (6 + 3 * j)
                words.append(word)
    offsets, columns, values = (q.planes[f"outlier_{name}"] for name in ("offsets", "columns", "values"))
    stored = np.argsort(order)  # of each column
    by_row = [
        [(int(values[i : i + 1].view(np.uint16)[0]) << 16) | int(stored[columns[i]]) for i in range(*ends)]
        for ends in pairwise(offsets)
    ]
    entries, ends = [], [0]
    for first in range(0, n, 16 if interleaved else 1):
        block = by_row[first : first + (16 if interleaved else 1)]
        longest = max(map(len, block))
        entries += [row[i] if i < len(row) else 0 for i in range(longest) for row in block]
        ends.append(len(entries))
    return {
        "dense_weights": np.array(words, np.uint64).view(np.int64),
        "row_offsets": np.array(ends, np.int32),
        "col_vals": np.array(entries, np.uint32).view(np.int32),
    }


def sample(rng, n, k, **options):
    x = rng.standard_normal((3 * k, k)).astype(np.float32)
    h = ql.Hessian(k)
    h.add(x)
    w = (rng.standard_normal((n, k)) ** 3).astype(np.float32)
    return ql.quantize(w, "spqr:3", ql.GPTQ(h, outliers=ql.OutlierSearch(percent=3), **options))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (32, 48), (48, 50), (16, 130)])
def test_tiles_become_planes(rng, shape, interleaved):
    q = sample(rng, *shape)
    tensors = tiles_of(q, interleaved)
    back = ql.layouts.from_spqr(tensors, shape)
    assert back.format == q.format
    assert back.planes.keys() == q.planes.keys()
    for name, plane in q.planes.items():
        np.testing.assert_array_equal(back.planes[name], plane, err_msg=name)
    as_torch = ql.layouts.from_spqr({name: torch.from_numpy(v) for name, v in tensors.items()}, shape)
    assert as_torch.kind == "torch"
    np.testing.assert_array_equal(as_torch.dequantize().numpy(), q.dequantize())


def test_permuted_columns(rng):
    q = sample(rng, 32, 70, static_groups=False)
    groups = np.asarray(q.planes["group_index"])
    order = np.argsort(groups, kind="stable")
    tensors = tiles_of(q, True, order)
    tensors["in_perm"] = order.astype(np.uint16).view(np.int32)
    back = ql.layouts.from_spqr(tensors, q.shape)
    assert back.planes.keys() == q.planes.keys()
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())
    tensors["in_perm"] = np.zeros(35, np.int32)
    with pytest.raises(ValueError, match="in_perm"):
        ql.layouts.from_spqr(tensors, q.shape)


def test_contradictions_are_refused(rng):
    q = sample(rng, 32, 48)
    good = tiles_of(q, False)

    def refuse(error, word, shape=(32, 48), **changes):
        with pytest.raises(error, match=word):
            ql.layouts.from_spqr(good | changes, shape)

    entries = good["col_vals"].copy()
    entries[0] = 48
    refuse(ValueError, "col_vals", col_vals=entries)
    entries = good["col_vals"].copy()
    entries[0] |= 0x7C00 << 16
    refuse(ValueError, "finite", col_vals=entries)
    row = int(np.argmax(np.diff(good["row_offsets"])))
    first = good["row_offsets"][row]
    if good["row_offsets"][row + 1] - first > 1:
        entries = good["col_vals"].copy()
        entries[first + 1] = entries[first]
        refuse(ValueError, "two outliers", col_vals=entries)
    refuse(ValueError, "row_offsets", row_offsets=good["row_offsets"][:-1])
    falling = good["row_offsets"].copy()
    falling[3] = 10**6
    refuse(ValueError, "row_offsets", row_offsets=falling)
    refuse(TypeError, "dense_weights", dense_weights=good["dense_weights"].view(np.int32))
    refuse(ValueError, "dense_weights", dense_weights=good["dense_weights"][1:])
    words = good["dense_weights"].copy()
    words[1] ^= 1 << 54
    refuse(ValueError, "disagree", dense_weights=words)
    words = good["dense_weights"].copy()
    for r in (2, 3):  # the high byte of the step of scales
        words[r] = (words[r] & ~(255 << 54)) | (0x7C << 54)
    words[:2] &= ~(255 << 54)
    refuse(ValueError, "scale_grids", dense_weights=words)
    refuse(ValueError, "dense_weights", shape=(32, 64))
    refuse(ValueError, "shape", shape=(30, 48))


@pytest.mark.parametrize("shape", [(16, 16), (32, 48), (48, 50), (16, 130)])
def test_planes_become_tiles(rng, shape):
    for q in (sample(rng, *shape), ql.quantize(rng.standard_normal(shape).astype(np.float32), "spqr:3")):
        tensors = ql.layouts.to_spqr(q)
        if "outlier_values" in q.planes:
            expected = tiles_of(q, False) | {"in_perm": np.zeros(0, np.int32)}
            assert tensors.keys() == expected.keys()
            for name, array in expected.items():
                assert tensors[name].dtype == array.dtype
                np.testing.assert_array_equal(tensors[name], array, err_msg=name)
        back = ql.layouts.from_spqr(tensors, shape)
        np.testing.assert_array_equal(back.dequantize(), q.dequantize())
        as_torch = ql.layouts.to_spqr(q.to("torch"))
        assert all(np.array_equal(value.numpy(), tensors[name]) for name, value in as_torch.items())


def test_permuted_planes_become_tiles(rng):
    q = sample(rng, 32, 71, static_groups=False)
    back = ql.layouts.from_spqr(ql.layouts.to_spqr(q), q.shape)
    assert back.planes.keys() == q.planes.keys()
    for name, plane in q.planes.items():
        np.testing.assert_array_equal(back.planes[name], plane, err_msg=name)


def test_what_tiles_cannot_hold(rng):
    w = rng.standard_normal((32, 48)).astype(np.float32)
    for spec in ("spqr:4", "spqr:3:g32", "spqr:3:g16:s4", "uniform:3:g16"):
        with pytest.raises(ValueError, match="spqr holds spqr:3"):
            ql.layouts.to_spqr(ql.quantize(w, spec))
    with pytest.raises(ValueError, match="multiples of 16"):
        ql.layouts.to_spqr(ql.quantize(w[:24], "spqr:3"))
    with pytest.raises(TypeError, match="PackedTensor"):
        ql.layouts.to_spqr(w)

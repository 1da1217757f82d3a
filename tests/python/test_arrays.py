"""Arrays of every kind go in, the same kind comes out, and memory lives as long as it is needed."""

from __future__ import annotations

import contextlib
import gc
import sys

import ml_dtypes
import numpy as np
import pytest
import quantloom as ql
import torch

NUMPY_DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
TORCH_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMATS = ["uniform:4:g32", "uniform:3:g20:asym:bf16", "uniform:8:channel:f32", "uniform:2:tensor:asym"]


class DLPackOnly:
    """An array of some other library."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **arguments):
        return self._array.__dlpack__(**arguments)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def bits(array) -> bytes:
    """The bytes of an array of any kind."""
    if isinstance(array, torch.Tensor):
        return array.contiguous().view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(array).tobytes()


def assert_same_planes(a: ql.PackedTensor, b: ql.PackedTensor) -> None:
    assert a.format == b.format
    assert a.shape == b.shape
    assert {name: bits(plane) for name, plane in a.planes.items()} == {
        name: bits(plane) for name, plane in b.planes.items()
    }


@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("index", range(3))
def test_numpy_and_torch_give_the_same_bytes(rng, spec, index):
    w = rng.standard_normal((17, 83)).astype(np.float32).astype(NUMPY_DTYPES[index])
    tensor = torch.tensor(w.astype(np.float32)).to(TORCH_DTYPES[index])
    from_numpy, from_torch = ql.quantize(w, spec), ql.quantize(tensor, spec)
    assert_same_planes(from_numpy, from_torch)
    assert from_numpy.kind == "numpy"
    assert all(isinstance(plane, np.ndarray) for plane in from_numpy.planes.values())
    assert from_torch.kind == "torch"
    assert all(isinstance(plane, torch.Tensor) for plane in from_torch.planes.values())
    # 16-bit input is read exactly: the same as its float32 copy.
    assert_same_planes(from_numpy, ql.quantize(w.astype(np.float32), spec))
    for dtype, torch_dtype in zip(NUMPY_DTYPES, TORCH_DTYPES):
        decoded, other = from_numpy.dequantize(dtype), from_torch.dequantize(torch_dtype)
        assert decoded.dtype == dtype
        assert other.dtype == torch_dtype
        assert bits(decoded) == bits(other)
    assert isinstance(from_torch.dequantize(), torch.Tensor)
    assert from_numpy.dequantize().dtype == np.float32


def test_dlpack_objects_are_read(rng):
    w = rng.standard_normal((5, 40)).astype(np.float32)
    q = ql.quantize(DLPackOnly(w), "uniform:4:g32")
    assert_same_planes(q, ql.quantize(w, "uniform:4:g32"))
    assert q.kind == "numpy"
    x = rng.standard_normal((3, 40)).astype(np.float32)
    np.testing.assert_array_equal(ql.matmul(DLPackOnly(x), q), ql.matmul(x, q))


def test_row_strides_are_followed(rng):
    w = rng.standard_normal((20, 100)).astype(np.float32)
    expected = ql.quantize(w[::3, 10:50].copy(), "uniform:4:g16")
    assert_same_planes(ql.quantize(w[::3, 10:50], "uniform:4:g16"), expected)
    view = torch.tensor(w)[::3, 10:50]
    assert_same_planes(ql.quantize(view, "uniform:4:g16"), expected)


def test_read_only_and_gradient_inputs_are_taken(rng):
    w = rng.standard_normal((6, 32)).astype(np.float32)
    expected = ql.quantize(w, "uniform:4:g16")
    w.setflags(write=False)
    assert_same_planes(ql.quantize(w, "uniform:4:g16"), expected)
    leaf = torch.tensor(w.copy(), requires_grad=True)
    assert_same_planes(ql.quantize(leaf, "uniform:4:g16"), expected)
    assert_same_planes(ql.quantize(torch.nn.Parameter(leaf), "uniform:4:g16"), expected)
    negated = torch.view_as_complex(torch.tensor(np.stack([w, -w], -1))).conj().imag  # a lazy negative
    assert negated.is_neg()
    assert_same_planes(
        ql.quantize(negated.unsqueeze(-1).contiguous()[..., 0].resolve_neg(), "uniform:4:g16"), expected
    )


def test_shapes_with_one_row_or_column_take_any_stride():
    column = np.arange(12, dtype=np.float32).reshape(12, 1)[::2]
    assert ql.quantize(column, "uniform:4:g8").shape == (6, 1)
    row = np.arange(24, dtype=np.float32).reshape(2, 12)[1:]
    assert ql.quantize(row, "uniform:4:g8").shape == (1, 12)
    stretched = np.lib.stride_tricks.as_strided(row, (1, 12), (0, 4))
    assert_same_planes(ql.quantize(stretched, "uniform:4:g8"), ql.quantize(row, "uniform:4:g8"))


def test_planes_outlive_their_tensor_and_their_source(rng):
    w = rng.standard_normal((64, 64)).astype(np.float32)
    q = ql.quantize(w, "uniform:4:g32")
    codes, expected = q.planes["codes"], q.planes["codes"].copy()
    del q, w
    gc.collect()
    trash = [np.ones((64, 8), np.int32) for _ in range(50)]
    np.testing.assert_array_equal(codes, expected)
    del trash


def test_planes_of_a_packed_tensor_keep_their_arrays_alive(rng):
    q = ql.quantize(rng.standard_normal((64, 64)).astype(np.float32), "uniform:4:g32")
    planes = {name: plane.copy() for name, plane in q.planes.items()}
    again = ql.PackedTensor(q.format, q.shape, planes)
    assert again.planes["codes"] is planes["codes"]
    del planes
    gc.collect()
    np.testing.assert_array_equal(again.dequantize(), q.dequantize())


def test_numpy_planes_are_read_only(rng, tmp_path):
    q = ql.quantize(rng.standard_normal((8, 64)).astype(np.float32), "uniform:4:g32")
    ql.save_tensors(tmp_path / "w.safetensors", {"w": q, "plain": np.ones(3, np.float32)})
    loaded = ql.load_tensors(tmp_path / "w.safetensors")
    for plane in [*q.planes.values(), *loaded["w"].planes.values(), loaded["plain"]]:
        assert not plane.flags.writeable
    as_torch = ql.load_tensors(tmp_path / "w.safetensors", kind="torch")
    as_torch["plain"] += 1  # memory of its own
    as_torch["w"].planes["codes"].zero_()
    q.to("torch").planes["codes"].zero_()
    assert loaded["w"].planes["codes"].any()
    assert q.planes["codes"].any()


def test_conversion_between_kinds_is_exact(rng):
    q = ql.quantize(rng.standard_normal((9, 50)).astype(np.float32), "uniform:5:g16:asym:bf16")
    there = q.to("torch")
    assert there.kind == "torch"
    assert there.planes["scales"].dtype == torch.bfloat16
    assert_same_planes(there, q)
    back = there.to("numpy")
    assert back.planes["scales"].dtype == ml_dtypes.bfloat16
    assert_same_planes(back, q)
    assert q.to("numpy") is q
    assert q.to("cpu") is q
    assert there.to("cpu") is there
    assert there.to(torch.device("cpu")) is there


def test_ten_thousand_calls_leave_reference_counts_level(rng):
    w = rng.standard_normal((4, 16)).astype(np.float32)
    x = rng.standard_normal((2, 16)).astype(np.float32)
    tensor = torch.tensor(w)
    rounding, format = ql.Nearest(), ql.Uniform(4, 16)
    q = ql.quantize(w, format)
    prepared = ql.prepare(q)
    watched = [w, x, tensor, rounding, format, q, prepared, np.dtype(np.float32), *q.planes.values()]

    def calls(count: int) -> None:
        for _ in range(count):
            ql.quantize(w, format, rounding)
            ql.quantize(tensor, format, rounding)
            q.dequantize()
            ql.matmul(x, prepared)
            with contextlib.suppress(ValueError):
                ql.matmul(w[:, :3], prepared)

    calls(100)
    gc.collect()
    before, blocks = [sys.getrefcount(item) for item in watched], sys.getallocatedblocks()
    calls(10_000)
    gc.collect()
    assert [sys.getrefcount(item) for item in watched] == before
    assert sys.getallocatedblocks() - blocks < 2_000

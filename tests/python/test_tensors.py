"""Files of packed and plain tensors."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest
import quantloom as ql
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

PLAIN_DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def assert_equal(a, b) -> None:
    if isinstance(a, ql.PackedTensor):
        assert isinstance(b, ql.PackedTensor)
        assert (a.format, a.shape) == (b.format, b.shape)
        assert set(a.planes) == set(b.planes)
        for name in a.planes:
            assert_equal(a.planes[name], b.planes[name])
        return
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


def test_a_file_gives_back_what_was_saved(rng, tmp_path):
    path = tmp_path / "model.safetensors"
    w = rng.standard_normal((20, 70)).astype(np.float32)
    tensors = {
        "a.b": ql.quantize(w, "uniform:3:g32:asym:bf16"),
        "a.c": ql.quantize(w, "uniform:8:tensor"),
        "norm": w[0].astype(ml_dtypes.bfloat16),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 3), np.int64),
    }
    ql.save_tensors(path, tensors, {"note": "größer", "": "empty key"})
    loaded = ql.load_tensors(path)
    assert list(loaded) == sorted(tensors)
    for name, value in tensors.items():
        assert_equal(loaded[name], value)
    assert loaded["a.b"].report is None
    metadata = ql.load_metadata(path)
    assert metadata["note"] == "größer"
    assert metadata[""] == "empty key"
    assert "quantloom" not in metadata
    as_torch = ql.load_tensors(path, kind="torch")
    assert as_torch["norm"].dtype == torch.bfloat16
    assert as_torch["a.b"].kind == "torch"
    assert_equal(as_torch["a.b"].to("numpy"), tensors["a.b"])
    assert as_torch["scalar"].shape == ()
    ql.save_tensors(tmp_path / "again.safetensors", as_torch, {"": "empty key", "note": "größer"})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_views_are_stored_as_what_they_show(rng, tmp_path):
    array = rng.standard_normal((6, 8)).astype(np.float32)
    tensor = torch.tensor(array)
    views = {
        "transposed": array.T,
        "reversed": array[::-1, ::2],
        "torch": tensor.t()[1:, ::2],
        "gradient": tensor.clone().requires_grad_(),
        "broadcast": np.broadcast_to(array[0], (3, 8)),
    }
    ql.save_tensors(tmp_path / "v.safetensors", views)
    loaded = ql.load_tensors(tmp_path / "v.safetensors")
    for name, value in views.items():
        expected = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        np.testing.assert_array_equal(loaded[name], expected)


def test_a_file_may_be_replaced_while_it_is_mapped(rng, tmp_path):
    path = tmp_path / "w.safetensors"
    array = rng.standard_normal((300, 100)).astype(np.float32)
    ql.save_tensors(path, {"w": array})
    loaded = ql.load_tensors(path)
    ql.save_tensors(path, {"w": loaded["w"][:1] * 0})
    np.testing.assert_array_equal(loaded["w"], array)
    assert ql.load_tensors(path)["w"].shape == (1, 100)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_failed_save_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "w.safetensors"
    ql.save_tensors(path, {"w": np.ones(3, np.float32)})
    before = path.read_bytes()
    with pytest.raises(TypeError, match="complex64"):
        ql.save_tensors(path, {"w": np.ones(3, np.float32), "z": np.ones(3, np.complex64)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_missing_files_and_folders_raise_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        ql.load_tensors(tmp_path / "nothing.safetensors")
    with pytest.raises(OSError, match="here"):
        ql.save_tensors(tmp_path / "not" / "here" / "w.safetensors", {"w": np.ones(3, np.float32)})
    with pytest.raises(OSError, match=tmp_path.name):
        ql.load_tensors(tmp_path)


def test_damage_is_found_and_named(rng, tmp_path):
    path = tmp_path / "w.safetensors"
    ql.save_tensors(
        path, {"layer": ql.quantize(rng.standard_normal((8, 64)).astype(np.float32), "uniform:4:g32")}
    )
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    for position in range(header, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            ql.load_tensors(path)
    for size in (0, 7, 8, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"w\.safetensors"):
            ql.load_tensors(path)


def test_metadata_of_other_formats_versions_is_refused(rng, tmp_path):
    path = tmp_path / "w.safetensors"
    ql.save_tensors(
        path, {"layer": ql.quantize(rng.standard_normal((8, 64)).astype(np.float32), "uniform:4:g32")}
    )
    text = path.read_bytes()
    assert text.count(b"uniform") == 1
    path.write_bytes(text.replace(b"uniform", b"unicorn"))
    with pytest.raises(ValueError, match="unicorn"):
        ql.load_tensors(path)


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
arrays = st.sampled_from(PLAIN_DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(names, arrays, max_size=5),
    st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3),
)
def test_any_arrays_and_metadata_come_back(tmp_path, tensors, metadata):
    metadata = {k: v for k, v in metadata.items() if k not in ("quantloom", "format")}
    path = tmp_path / "any.safetensors"
    ql.save_tensors(path, tensors, metadata)
    loaded = ql.load_tensors(path)
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert_equal(loaded[name], value)
    read = ql.load_metadata(path)
    assert {k: read[k] for k in metadata} == metadata


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 20),
    k=st.integers(0, 40),
    bits=st.integers(1, 8),
    group=st.one_of(st.integers(1, 50), st.sampled_from(["channel", "tensor"])),
    symmetric=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_packed_tensor_comes_back(tmp_path, n, k, bits, group, symmetric, dtype, seed):
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    q = ql.quantize(w, ql.Uniform(bits, group, symmetric, dtype))
    path = tmp_path / "packed.safetensors"
    ql.save_tensors(path, {"w": q})
    loaded = ql.load_tensors(path)["w"]
    assert_equal(loaded, q)
    np.testing.assert_array_equal(loaded.dequantize(), q.dequantize())

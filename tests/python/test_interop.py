"""Files shared with the safetensors package, in both directions."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import quantloom as ql
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (2, 3, 5)], ids=str)
def test_their_files_load_here(tmp_path, dtype, shape):
    tensors = {"a": (torch.randn(shape) * 9).to(dtype), "b.c": torch.ones(3).to(dtype)}
    safetensors.torch.save_file(tensors, tmp_path / "t.safetensors", {"format": "pt", "by": "them"})
    loaded = ql.load_tensors(tmp_path / "t.safetensors", kind="torch")
    for name, value in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], value)
    arrays = ql.load_tensors(tmp_path / "t.safetensors")
    assert all(str(dtype).endswith(array.dtype.name) for array in arrays.values())
    assert ql.load_metadata(tmp_path / "t.safetensors")["by"] == "them"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0, 2), (2, 3, 5)], ids=str)
def test_our_files_load_there(tmp_path, dtype, shape):
    tensors = {"a": (torch.randn(shape) * 9).to(dtype), "b.c": torch.ones(3).to(dtype)}
    ql.save_tensors(tmp_path / "t.safetensors", tensors, {"by": "us"})
    loaded = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], value)
    with safetensors.safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["by"] == "us"


def test_their_file_without_metadata_loads_here(tmp_path):
    safetensors.numpy.save_file({"x": np.arange(5)}, tmp_path / "t.safetensors")
    np.testing.assert_array_equal(ql.load_tensors(tmp_path / "t.safetensors")["x"], np.arange(5))


def test_a_quantized_file_opens_there(rng, tmp_path):
    path = tmp_path / "q.safetensors"
    q = ql.quantize(rng.standard_normal((12, 70)).astype(np.float32), "uniform:3:g32:asym:bf16")
    ql.save_tensors(path, {"model.layer": q, "norm": np.ones(12, ml_dtypes.bfloat16)})
    planes = safetensors.torch.load_file(path)
    assert set(planes) == {"model.layer.codes", "model.layer.scales", "model.layer.zeros", "norm"}
    with safetensors.safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["quantloom"])
    assert "model.layer" in json.dumps(description)
    again = ql.PackedTensor(
        q.format, q.shape, {name.rsplit(".", 1)[1]: value for name, value in planes.items() if name != "norm"}
    )
    np.testing.assert_array_equal(again.dequantize().numpy(), q.dequantize())


def test_their_copy_of_our_file_loads_as_plain_arrays(rng, tmp_path):
    q = ql.quantize(rng.standard_normal((12, 70)).astype(np.float32), "uniform:4:g32")
    ql.save_tensors(tmp_path / "ours.safetensors", {"layer": q})
    planes = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    safetensors.numpy.save_file(planes, tmp_path / "theirs.safetensors")
    loaded = ql.load_tensors(tmp_path / "theirs.safetensors")
    assert set(loaded) == {"layer.codes", "layer.scales"}
    np.testing.assert_array_equal(loaded["layer.codes"], q.planes["codes"])
